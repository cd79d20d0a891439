"""The rows of the running batch: neighbours, places, and tables that grow."""

from __future__ import annotations

import numpy as np

from fastllm.generation.batch import RunningBatch
from fastllm.generation.requests import Request, Sequence, Tokens
from fastllm.generation.sampling import SamplingParams


def _request(number, length=3, blocks=(7,), stops=(), **params):
    request = Request(number, np.arange(length), SamplingParams(**params), stops)
    request.blocks = np.array(blocks, np.int32)
    return request


def _join(batch, *sequences):
    for sequence in sequences:
        batch.append(sequence, place=sequence.key)
    batch.regroup()


def _keys(batch):
    assert [s.key for s in batch.sequences] == batch.key[: batch.size].tolist()
    return batch.key[: batch.size].tolist()


def test_a_row_says_how_its_sequence_draws():
    batch = RunningBatch(61)
    request = _request(
        0, 5, stops=(4, 9), max_new_tokens=70, min_new_tokens=2, temperature=0.5, top_k=3,
        top_p=0.25, min_p=0.125, repetition_penalty=1.5,
    )  # fmt: skip
    drawn = Tokens(np.array([50, 51]), np.zeros(2), np.zeros(2))
    _join(batch, Sequence(request, 0, 10), Sequence(request, 1, 11, drawn))
    assert batch.token[1] == 51 and batch.key[:2].tolist() == [10, 11]
    assert batch.position[:2].tolist() == [4, 6], "of the token that is not in the cache yet"
    assert batch.tail_length[:2].tolist() == [0, 1] and batch.count[:2].tolist() == [0, 2]
    assert batch.min_count[1] == 2 and batch.max_count[1] == 70 and batch.top_k[1] == 3
    assert batch.stop_tokens[1].tolist() == [4, 9]
    floats = batch.temperature, batch.top_p, batch.min_p, batch.repetition_penalty
    assert [array[1] for array in floats] == [0.5, 0.25, 0.125, 1.5]
    assert np.flatnonzero(batch.seen[0]).tolist() == [0, 1, 2, 3, 4]
    assert np.flatnonzero(batch.seen[1]).tolist() == [0, 1, 2, 3, 4, 50, 51]
    assert batch.tail_blocks.shape[1] == 2, "69 tokens are kept"


def test_rows_of_a_prompt_are_neighbours():
    batch = RunningBatch(61, rows=2)
    a, b, c = (_request(n, n + 1, blocks=(n,)) for n in range(3))
    _join(batch, Sequence(a, 0, 0), Sequence(b, 0, 1), Sequence(c, 0, 2))
    _join(batch, Sequence(c, 1, 3), Sequence(a, 1, 4), Sequence(b, 1, 5), Sequence(a, 2, 6))
    assert _keys(batch) == [0, 4, 6, 1, 5, 2, 3]
    assert batch.place[:7].tolist() == [0, 4, 6, 1, 5, 2, 3]
    group = batch.group[:7]
    assert batch.prefix_length[group].tolist() == [1, 1, 1, 2, 2, 3, 3]
    assert batch.prefix_blocks[group, 0].tolist() == [0, 0, 0, 1, 1, 2, 2]


def test_leaving_rows_are_closed_up_in_order():
    batch = RunningBatch(61)
    a, b = _request(0), _request(1)
    _join(batch, *(Sequence(a, i, i) for i in range(3)), *(Sequence(b, i, 3 + i) for i in range(2)))
    batch.remove(np.array([1, 3, 4]))
    assert _keys(batch) == [0, 2]
    assert a.running == 2 and b.running == 0 and b.slot == -1
    _join(batch, Sequence(b, 0, 9))
    assert _keys(batch) == [0, 2, 9] and b.slot >= 0
    batch.remove(np.array([0, 1, 2]))
    assert batch.size == 0 and a.slot == -1


def test_tables_grow_and_keep_what_is_in_them():
    batch = RunningBatch(61, rows=1)
    versions = {batch.version}
    requests = [_request(n, 70 * n + 1, blocks=range(n + 1), stops=range(n)) for n in range(5)]
    for number, request in enumerate(requests):
        _join(batch, Sequence(request, 0, number))
        versions.add(batch.version)
    assert len(versions) > 3 and batch.capacity >= 5
    for row, request in enumerate(requests):
        assert batch.prefix_blocks[batch.group[row], : row + 1].tolist() == list(range(row + 1))
        assert batch.prefix_length[batch.group[row]] == len(request.prompt)
        assert batch.stop_tokens[row].tolist() == [*range(row), *[-1] * (4 - row)]
    assert len(set(batch.group[:5].tolist())) == 5


def test_the_table_of_seen_tokens_is_there_while_a_row_needs_it():
    batch = RunningBatch(61)
    _join(batch, Sequence(_request(0), 0, 0))
    assert batch.seen.shape[1] == 0
    _join(batch, Sequence(_request(1, repetition_penalty=2.0), 0, 1))
    assert batch.seen.shape == (batch.capacity, 61)
    version = batch.version
    batch.remove(np.array([0]))
    assert np.flatnonzero(batch.seen[0]).tolist() == [0, 1, 2] and batch.version == version
    batch.remove(np.array([0]))
    assert batch.seen.shape[1] == 0 and batch.version > version

"""What a request says depends on itself alone: everything at once, checked against each alone."""

from __future__ import annotations

import random

import numpy as np
import pytest

from fastllm.generation import Engine, SamplingParams
from fastllm.generation.cache import blocks_of
from fastllm.generation.graphed_step import GraphedStep


class Letters:
    """A token for each letter."""

    def encode(self, text):
        return [ord(letter) - 64 for letter in text]

    def decode(self, ids):
        return "".join(chr(64 + i) for i in ids)


def _request(rng):
    """A prompt and a way to complete it; lengths at both sides of a block's end."""
    longest = rng.choice([1, 2, 5, 30, 64, 65, 66, 129, 150])
    options = {
        "max_new_tokens": longest,
        "num_return_sequences": rng.choice([1, 1, 2, 5]),
        "seed": rng.randrange(5),
        "stop_token_ids": tuple(rng.sample(range(61), rng.choice([0, 1, 3]))),
        "temperature": rng.choice([1.0, 1.0, 0.0, 1.5]),
        "repetition_penalty": rng.choice([1.0, 1.0, 1.3]),
        "top_k": rng.choice([0, 0, 5]),
        "stop_strings": rng.choice([(), (), (), ("AB", "C")]),
        "min_new_tokens": min(longest, rng.choice([0, 0, 3])),
    }
    prompt = [rng.randrange(61) for _ in range(rng.choice([1, 3, 63, 64, 65, 140]))]
    return prompt, SamplingParams(**options)


def _hear(said, outputs):
    for output in outputs:
        ids, text, reasons = said.setdefault((output.request_id, output.index), ([], [], []))
        ids += output.token_ids
        text += output.text
        reasons += [output.finish_reason] if output.finish_reason else []


def _check_books(engine):
    """Every block has one owner, and the rows of a prompt are neighbours."""
    batch, size = engine._batch, engine._batch.size
    prompts = [r.blocks for r in engine._requests.values() if r.blocks is not None]
    tails = [batch.tail_blocks[row, : batch.owned[row]] for row in range(size)]
    owned = np.concatenate([*prompts, *tails, np.empty(0, np.int32)])
    assert len(set(owned.tolist())) == len(owned) == engine._cache.used_blocks
    group = batch.group[:size]
    assert not size or np.count_nonzero(np.diff(group)) + 1 == len(set(group.tolist()))
    for row, sequence in enumerate(batch.sequences):
        blocks = sequence.request.blocks
        assert (batch.prefix_blocks[group[row], : len(blocks)] == blocks).all()
        assert batch.prefix_length[group[row]] == len(sequence.request.prompt)


@pytest.mark.parametrize("step", ["auto", "ops", "padded"])
@pytest.mark.parametrize("seed", range(4))
def test_company_changes_nothing(build, family, seed, step):
    rng = random.Random(100 * seed + sum(map(ord, family)))
    model = build(family, max_position_embeddings=512)
    requests = [_request(rng) for _ in range(rng.randrange(3, 8))]
    alone: dict[tuple[int, int], tuple[list[int], list[str], list[str]]] = {}
    for number, (prompt, params) in enumerate(requests):
        engine = Engine(model, Letters())
        engine.add_request(prompt, params, request_id=number)
        while engine.has_unfinished_requests():
            _hear(alone, engine.step())

    largest = max(blocks_of(len(p)) + blocks_of(s.max_new_tokens - 1) for p, s in requests)
    engine = Engine(
        model,
        Letters(),
        step="auto" if step == "padded" else step,
        max_batch_size=rng.choice([1, 3, 8, None]),
        cache_bytes=engine._cache.block_bytes * (largest + rng.choice([0, 1, 3, 20])),
        prefill_tokens=rng.choice([1, 100, 8192]),
    )
    if step == "padded":
        engine._step = GraphedStep(model, engine._cache, capture=False)
    said: dict[tuple[int, int], tuple[list[int], list[str], list[str]]] = {}
    arrivals, aborted = list(range(len(requests))), set()
    while arrivals or engine.has_unfinished_requests():
        if arrivals and rng.random() < 0.3:
            number = arrivals.pop(0)
            engine.add_request(*requests[number], request_id=number)
        if rng.random() < 0.01 and engine._requests:
            gone = rng.choice(list(engine._requests))
            engine.abort_request(gone)
            aborted.add(gone)
        _hear(said, engine.step())
        _check_books(engine)
    assert engine._cache.used_blocks == engine._batch.size == 0
    for key, expected in alone.items():
        assert key[0] in aborted or said[key] == expected
    assert len(aborted) < len(requests)

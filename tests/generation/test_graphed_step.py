"""The padded token step behind CUDA graphs: padding changes nothing, and graphs replay it."""

from __future__ import annotations

import pytest
import torch

from fastllm.generation import Engine, SamplingParams
from fastllm.generation.graphed_step import GraphedStep


def _said(engine, prompts, **options):
    for number, prompt in enumerate(prompts):
        params = SamplingParams(max_new_tokens=90 - 13 * number, seed=2, **options)
        engine.add_request(prompt, params)
    said: dict[tuple[int, int], tuple[list[int], list[float]]] = {}
    while engine.has_unfinished_requests():
        for output in engine.step():
            ids, logprobs = said.setdefault((output.request_id, output.index), ([], []))
            ids += output.token_ids
            logprobs += output.logprobs
    return said


def _check(found, expected):
    assert found.keys() == expected.keys()
    for key, (ids, logprobs) in expected.items():
        assert found[key][0] == ids
        assert found[key][1] == pytest.approx(logprobs, abs=1e-4)


@pytest.mark.parametrize("copies", [1, 3])
def test_padding_changes_nothing(build, family, prompts, copies):
    model = build(family, max_position_embeddings=200)
    options = {"num_return_sequences": copies, "stop_token_ids": (5, 11)}
    expected = _said(Engine(model, step="ops"), prompts, **options)
    engine = Engine(model)
    step = engine._step = GraphedStep(model, engine._cache, capture=False)
    _check(_said(engine, prompts, **options), expected)
    rows = {batch for batch, _ in step._sizes}
    assert len(rows) > 1 and rows <= {1, 2, 4, 8, 16}


def test_padding_is_the_last_row_once_more(build, prompts):
    model = build()
    engine = Engine(model)
    step = engine._step = GraphedStep(model, engine._cache, capture=False)
    for prompt in prompts[:3]:
        engine.add_request(prompt, SamplingParams(max_new_tokens=9, seed=0))
    engine.step()
    ((size, fixed),) = step._sizes.items()
    assert size == (4, 4)
    for name in ("token", "position", "block", "place", "group", "tail_length", "tail_blocks"):
        array = getattr(fixed.rows, name)
        assert len(array) == 4 and torch.equal(array[3], array[2]), name
    assert fixed.rows.prefix_length.tolist() == [9, 1, 14, 0]


def test_graphs_need_a_gpu(build):
    with pytest.raises(ValueError, match="needs a CUDA device"):
        Engine(build(), step="graphs")


@pytest.mark.cuda
def test_graphs_replay_the_step(build, family, prompts):
    model = build(family, max_position_embeddings=200).cuda()
    options = {"num_return_sequences": 3, "stop_token_ids": (5, 11)}
    expected = _said(Engine(model, step="ops"), prompts, **options)
    engine = Engine(model, step="graphs")
    assert engine.description == "CUDA graphs on cuda:0"
    _check(_said(engine, prompts, **options), expected)

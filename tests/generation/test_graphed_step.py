"""The token step behind CUDA graphs: the same text as op by op, however many tokens at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastllm.generation import Engine, SamplingParams, generate
from fastllm.generation.device_rows import MOST_STEPS, DeviceRows
from fastllm.generation.graphed_step import GraphedStep, endings, padded, size_of
from fastllm.model.lora import add_lora
from fastllm.model.lora_config import LoraConfig

MIXED = [
    {"stop_token_ids": (5, 11), "num_return_sequences": 3},
    {"stop_token_ids": (5, 11, 23), "min_new_tokens": 12, "temperature": 0.7},
    {"temperature": 0.0, "stop_token_ids": (), "num_return_sequences": 2},
    {"repetition_penalty": 1.4, "stop_token_ids": (7,)},
    {"top_k": 9, "top_p": 0.8, "stop_token_ids": (2, 3), "num_return_sequences": 2},
]


def _engine(model, step, **limits):
    engine = Engine(model, step="ops", **limits)
    if step == "padded":
        engine._step = GraphedStep(model, engine._cache, capture=False)
    elif step == "graphs":
        engine = Engine(model, step="graphs", **limits)
    return engine


def _completed(engine, prompts, options, at_once=64):
    for number, prompt in enumerate(prompts):
        own = options[number % len(options)]
        params = SamplingParams(max_new_tokens=90 - 13 * number, seed=2, **own)
        engine.add_request(prompt, params)
    said = {}
    while engine.has_unfinished_requests():
        for sequence in engine.advance(at_once):
            ids, logprobs, sampling = sequence.tokens.since(0)
            key = sequence.request.id, sequence.index
            said[key] = ids, logprobs, sampling, sequence.finish_reason
    assert engine._cache.used_blocks == engine._batch.size == 0
    return said


def _check(found, expected):
    assert found.keys() == expected.keys()
    for key, (ids, *logprobs, reason) in expected.items():
        assert found[key][0] == ids and found[key][-1] == reason, key
        for one, other in zip(found[key][1:3], logprobs, strict=True):
            assert one == pytest.approx(other, abs=1e-4)


@pytest.mark.parametrize("at_once", [1, 3, 64])
def test_same_text_as_op_by_op(build, family, prompts, at_once):
    """Rows end at any token, with what they asked for; the others go on."""
    model = build(family, max_position_embeddings=200)
    expected = _completed(_engine(model, "ops"), prompts, MIXED)
    engine = _engine(model, "padded")
    _check(_completed(engine, prompts, MIXED, at_once), expected)
    sizes = engine._step._sizes
    assert {size.rows for size in sizes} >= {8, 16}
    assert {size.filtered for size in sizes} == {False, True}
    assert 61 in {size.vocabulary for size in sizes}
    assert {reason for *_, reason in expected.values()} == {"stop", "length"}


@pytest.mark.parametrize("rows", [2, 3, None])
def test_little_room_changes_nothing(build, prompts, rows):
    """Rows join, leave, and are preempted while others are in the middle of a block."""
    model = build("mistral", max_position_embeddings=300)
    plain = [{"stop_token_ids": (5,), "num_return_sequences": 3}]
    expected = _completed(_engine(model, "ops"), prompts, plain)
    block = _engine(model, "ops")._cache.block_bytes
    engine = _engine(model, "padded", max_batch_size=rows, cache_bytes=7 * block)
    _check(_completed(engine, prompts, plain), expected)
    if rows is None:
        assert engine.stats.preemptions


def test_counts_what_rows_drew(build, prompts):
    model = build()
    options = [{"stop_token_ids": (5, 11), "num_return_sequences": 3}]
    engines = [_engine(model, step) for step in ("ops", "padded")]
    said = [_completed(engine, prompts, options) for engine in engines]
    total = sum(len(ids) - 1 for ids, *_ in said[0].values())
    assert [engine.stats.decode_tokens for engine in engines] == [total, total]


def test_padding_is_the_last_row_once_more(build, prompts):
    model = build()
    engine = _engine(model, "padded")
    for prompt in prompts * 2:
        engine.add_request(prompt, SamplingParams(max_new_tokens=20, seed=0, stop_token_ids=()))
    engine.advance(9)
    ((size, (rows, _)),) = engine._step._sizes.items()
    assert size.rows == 16 and engine._batch.size == 10
    newest = rows.newest
    for name in ("token", "position", "block", "place", "group", "tail_length", "tail_blocks"):
        tensor = getattr(newest, name)
        assert torch.equal(tensor[10:], tensor[9:10].expand(tensor[10:].shape)), name
    assert newest.tail_length[:10].tolist() == [10] * 10
    assert newest.prefix_length.tolist() == [9, 1, 14, 4, 7] * 2 + [0] * 6


def test_rows_that_have_ended_stay_where_they_are(build, prompts):
    model = build()
    engine = _engine(model, "padded")
    for number, prompt in enumerate(prompts):
        engine.add_request(prompt, SamplingParams(max_new_tokens=3 + 4 * number, seed=1))
    engine.advance(40)
    ((_, (rows, _)),) = engine._step._sizes.items()
    # The first token is of the prefill, and the last one of a row does not go into the cache. The
    # last row is in the middle when the host has seen that others have ended.
    assert rows.newest.tail_length[:5].tolist() == [2, 6, 10, 14, 17]


def test_sizes_are_few_and_near():
    sizes = sorted({padded(number) for number in range(1, 2000)})
    assert sizes[:15] == [1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128]
    assert len(sizes) < 35
    for number in range(1, 2000):
        assert number <= padded(number) <= max(2 * number, number + 8)
        assert padded(number) < 1.25 * number or number <= 32


def test_tables_hold_what_the_steps_need(build, prompts):
    engine = _engine(build(max_position_embeddings=2000), "padded")
    options = SamplingParams(max_new_tokens=900, seed=1, stop_token_ids=())
    engine.add_request(prompts[0], options)
    engine.advance(1)
    widths = []
    for length in (0, 191, 192, 193, 255, 256, 450, 700):
        engine._batch.tail_length[0] = length
        widths.append(size_of(engine._batch, MOST_STEPS, 61).tail_blocks)
    assert widths == [4, 4, 4, 8, 8, 8, 16, 16]


def test_a_row_ends_with_a_stop_token_or_its_last(build, prompts):
    engine = _engine(build(), "padded")
    for most in (3, 50):
        params = SamplingParams(max_new_tokens=most, seed=1, stop_token_ids=(4, 6))
        engine.add_request(prompts[0], params)
    engine.advance(1)
    batch = engine._batch
    assert batch.count[:2].tolist() == [2, 2]
    found = endings(batch, np.array([[9, 9], [9, 4], [6, 5]]))
    assert found.tolist() == [[True, False], [True, True], [True, False]]


def test_weights_are_read_again(build, prompts):
    model = build("qwen3")
    add_lora(model, LoraConfig(r=4, lora_alpha=8, target_modules=("q_proj", "down_proj")))
    engine = _engine(model, "padded")
    options = [{"stop_token_ids": ()}]
    before = _completed(engine, prompts, options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    sizes = dict(engine._step._sizes)
    engine.update_weights()
    assert engine._step._sizes == sizes, "nothing has moved"
    for fresh in (_engine(model, "padded"), _engine(model, "ops")):
        expected = _completed(fresh, prompts, options)
        assert {ids[0]: said for ids, said in expected.items()} != before
        again = _engine(model, "ops")
        again._step, again._step._cache = engine._step, again._cache
        _check(_completed(again, prompts, options), expected)
    model.model.norm.weight = torch.nn.Parameter(model.model.norm.weight.clone())
    engine.update_weights()
    assert not engine._step._sizes


def test_an_engine_completes_again_after_training(build, prompts):
    model = build()
    engine = _engine(model, "padded")
    for _ in range(2):
        options = {"seed": 1, "stop_token_ids": (5,)}
        expected = generate(model, prompts, 20, step="ops", **options)
        found = generate(model, prompts, 20, engine=engine, **options)
        assert [c.token_ids for c in found] == [c.token_ids for c in expected]
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        engine.update_weights()
    assert engine._step._sizes
    with pytest.raises(ValueError, match="prefill_tokens: the engine that was given has its own"):
        generate(model, prompts, 20, engine=engine, prefill_tokens=3)
    with pytest.raises(ValueError, match="idle engine of this model"):
        generate(build(), prompts, 20, engine=engine)


def test_logits_that_are_not_finite(build, prompts):
    model = build()
    engine = _engine(model, "padded")
    engine.add_request(prompts[0], SamplingParams(max_new_tokens=30, seed=0))
    engine.advance(1)
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    with pytest.raises(RuntimeError, match=r"not finite \(row 0 of 1\)"):
        engine.advance(20)


def test_graphs_need_a_gpu(build):
    with pytest.raises(ValueError, match="needs a CUDA device"):
        Engine(build(), step="graphs")


# -- on a GPU ----------------------------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.parametrize("at_once", [1, 64])
def test_graphs_replay_the_step(build, family, prompts, at_once):
    model = build(family, max_position_embeddings=200).cuda()
    expected = _completed(_engine(model, "ops"), prompts, MIXED)
    engine = _engine(model, "graphs")
    assert engine.description == "CUDA graphs on cuda:0: step 'graphs' was asked for"
    _check(_completed(engine, prompts, MIXED, at_once), expected)
    assert any(replay._graph is not None for _, replay in engine._step._sizes.values())


@pytest.mark.cuda
def test_graphs_serve_by_themselves(build, prompts):
    engine = Engine(build().cuda())
    assert engine.description == "CUDA graphs on cuda:0: the model is on cuda"


@pytest.mark.cuda
def test_graphs_replay_with_new_weights(build, prompts):
    model = build().cuda()
    engine = _engine(model, "graphs")
    options = [{"stop_token_ids": ()}]
    _completed(engine, prompts, options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    engine.update_weights()
    captured = [replay._graph for _, replay in engine._step._sizes.values()]
    assert any(graph is not None for graph in captured)
    with torch.no_grad():
        again = _completed(engine, prompts, options)
    expected = _completed(_engine(model, "ops"), prompts, options)
    numbers = sorted(again)
    _check({(n % 5, 0): again[n, 0] for n, _ in numbers}, expected)


@pytest.mark.cuda
def test_the_host_waits_only_for_what_was_drawn(build, prompts):
    """Many tokens at once: no call that waits for the device but the wait for their copy."""
    engine = _engine(build().cuda(), "graphs")
    for prompt in prompts:
        engine.add_request(prompt, SamplingParams(max_new_tokens=60, seed=0, stop_token_ids=()))
    engine.advance(24)
    rows, replay = next(iter(engine._step._sizes.values()))
    assert isinstance(rows, DeviceRows) and replay._graph is not None
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.no_grad():
            engine._step(engine._batch, 8)
    finally:
        torch.cuda.set_sync_debug_mode("default")

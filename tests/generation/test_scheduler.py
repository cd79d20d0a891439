"""Joining, leaving, waiting, and being preempted: none of it shows in what a request says."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastllm.generation import Engine, SamplingParams, Stats, generate
from fastllm.generation.cache import BLOCK

OPTIONS = {"seed": 4, "stop_token_ids": [5]}


@pytest.fixture
def long_model(build):
    return build("mistral", max_position_embeddings=512)


@pytest.fixture
def block_bytes(long_model):
    return Engine(long_model)._cache.block_bytes


def _tokens(completions):
    return [completion.token_ids for completion in completions]


def _finish(engine):
    """What every completion of every request says."""
    said: dict[tuple[int, int], list[int]] = {}
    while engine.has_unfinished_requests():
        for output in engine.step():
            said.setdefault((output.request_id, output.index), []).extend(output.token_ids)
    return said


def test_requests_join_and_leave_at_every_token(build, prompts):
    model = build()
    params = [
        SamplingParams(max_new_tokens=n, seed=1, num_return_sequences=copies, **more)
        for n, copies, more in (
            (30, 2, {}),
            (5, 1, {"temperature": 0.0}),
            (40, 3, {"top_k": 4}),
            (9, 2, {"repetition_penalty": 1.5}),
            (20, 1, {"min_p": 0.1, "stop_token_ids": (3, 7, 9, 12)}),
        )
    ]
    alone = {}
    for number, (prompt, some) in enumerate(zip(prompts, params, strict=True)):
        engine = Engine(model)
        engine.add_request(prompt, some, request_id=number)
        alone |= _finish(engine)
    engine = Engine(model, max_batch_size=5)
    said: dict[tuple[int, int], list[int]] = {}
    arrivals = list(enumerate(zip(prompts, params, strict=True)))
    while arrivals or engine.has_unfinished_requests():
        if arrivals and len(said) >= 2 * (5 - len(arrivals)) - 1:
            number, (prompt, some) = arrivals.pop(0)
            engine.add_request(prompt, some, request_id=number)
        for output in engine.step():
            said.setdefault((output.request_id, output.index), []).extend(output.token_ids)
    assert said == alone


@pytest.mark.parametrize(
    ("blocks", "penalty", "step"),
    [(4, 1.0, "auto"), (5, 1.3, "ops"), (6, 1.3, "auto"), (16, 1.0, "auto")],
)
def test_a_small_budget_changes_nothing_but_the_schedule(
    long_model, prompts, block_bytes, blocks, penalty, step
):
    """Completions of up to 3 blocks each, prompts of one."""
    prompts = prompts[:3]
    options = {**OPTIONS, "num_return_sequences": 2, "repetition_penalty": penalty, "step": step}
    expected = generate(long_model, prompts, 150, **options)
    assert len({len(tokens) for tokens in _tokens(expected)}) > 2
    stats = Stats()
    found = generate(
        long_model, prompts, 150, cache_bytes=blocks * block_bytes, stats=stats, **options
    )
    assert _tokens(found) == _tokens(expected)
    assert stats.peak_cache_bytes <= stats.cache_bytes <= blocks * block_bytes
    assert stats.preemptions > 0 or blocks > 5
    difference = [
        abs(a - b)
        for c, d in zip(found, expected, strict=True)
        for a, b in zip(c.logprobs, d.logprobs, strict=True)
    ]
    assert max(difference) < 1e-4


def test_the_latest_is_preempted_first_and_goes_on_first(long_model, block_bytes):
    engine = Engine(long_model, cache_bytes=7 * block_bytes)
    params = SamplingParams(max_new_tokens=190, stop_token_ids=(), seed=0)
    for number in range(3):
        engine.add_request([number + 1], params, request_id=number)
    last, ends = {}, {}
    step = 0
    while engine.has_unfinished_requests():
        step += 1
        for output in engine.step():
            last[output.request_id] = step
            if output.finish_reason:
                ends[output.request_id] = step
    assert engine.stats.preemptions >= 1
    assert ends[0] < ends[2] and ends[1] < ends[2]


def test_a_sequence_that_never_fits_is_refused(long_model, block_bytes):
    engine = Engine(long_model, cache_bytes=4 * block_bytes)
    fits = SamplingParams(max_new_tokens=2 * BLOCK + 1, seed=0, stop_token_ids=())
    message = f"needs {5 * block_bytes:,} bytes; expected at least that, found {4 * block_bytes:,}"
    with pytest.raises(ValueError, match=message):
        engine.add_request([1] * 129, fits)
    assert not engine.has_unfinished_requests()
    engine.add_request([1] * 128, fits)
    assert len(_finish(engine)[0, 0]) == 2 * BLOCK + 1
    assert engine.stats.peak_cache_bytes == 4 * block_bytes


def test_a_group_stores_its_prompt_once(build):
    model = build(max_position_embeddings=2200)
    prompt = torch.randint(0, 61, (2048,)).tolist()
    options = {"temperature": 0, "stop_token_ids": []}
    shared = Stats()
    generate(model, [prompt], 3, num_return_sequences=16, stats=shared, **options)
    one = Stats()
    generate(model, [prompt], 3, stats=one, **options)
    assert one.peak_cache_bytes * 16 >= 8 * shared.peak_cache_bytes
    block = Engine(model)._cache.block_bytes
    assert shared.peak_cache_bytes == (2048 // BLOCK + 16) * block
    assert shared.prefill_tokens == 2048


def test_memory_is_free_as_soon_as_a_row_ends(long_model):
    engine = Engine(long_model)
    cache = engine._cache
    for number, length in enumerate((70, 2, 200)):
        params = SamplingParams(max_new_tokens=length, stop_token_ids=(), num_return_sequences=2)
        engine.add_request([1] * (65 + number), params)
    seen = []
    while engine.has_unfinished_requests():
        engine.step()
        batch = engine._batch
        held = {request.id: request.prompt_blocks for request in engine._requests.values()}
        owned = int(batch.owned[: batch.size].sum())
        assert cache.used_blocks == sum(held.values()) + owned
        tails = [-(-int(n) // BLOCK) for n in batch.tail_length[: batch.size]]
        assert owned == sum(tails), "no block before it is needed"
        seen.append(len(held))
    assert set(seen) == {3, 2, 1, 0} - {3} and cache.used_blocks == 0


def test_the_pool_is_as_large_as_the_requests_can_need(long_model, block_bytes):
    stats = Stats()
    generate(long_model, [[1] * 65, [2]], 66, num_return_sequences=2, stats=stats)
    assert stats.cache_bytes == (2 + 1 + 4 * 2) * block_bytes
    stats = Stats()
    generate(long_model, [[1]] * 6, 66, max_batch_size=2, stats=stats)
    assert stats.cache_bytes == (2 * 2 + 3 * 1) * block_bytes


def test_one_copy_at_a_time_draws_from_the_logits_of_one_prefill(build, prompts):
    model = build()
    options = {"num_return_sequences": 5, **OPTIONS}
    expected = generate(model, prompts[:2], 12, **options)
    stats = Stats()
    found = generate(model, prompts[:2], 12, max_batch_size=1, stats=stats, **options)
    assert _tokens(found) == _tokens(expected)
    assert stats.prefill_tokens == len(prompts[0]) + len(prompts[1])


def test_long_tailed_lengths_cost_what_is_drawn(build, prompts):
    model = build()
    stats = Stats()
    found = generate(model, prompts, 60, num_return_sequences=4, stats=stats, **OPTIONS)
    lengths = [len(tokens) for tokens in _tokens(found)]
    assert len(set(lengths)) > 5
    assert stats.decode_tokens == sum(lengths) - len(lengths)
    assert stats.steps == max(lengths) - 1
    assert stats.prefill_tokens == sum(len(prompt) for prompt in prompts)
    assert stats.prefill_seconds > 0 and stats.decode_seconds > 0


def test_prompts_are_told_of_as_soon_as_their_last_completion_ends(build, prompts):
    model = build()
    told = []
    options = {"num_return_sequences": 3, "max_batch_size": 4, **OPTIONS}
    found = generate(
        model,
        prompts,
        40,
        on_finished=lambda number, group: told.append((number, group)),
        **options,
    )
    assert sorted(number for number, _ in told) == list(range(len(prompts)))
    assert all(group == found[3 * n : 3 * n + 3] for n, group in told)
    again = []
    generate(model, prompts, 40, on_finished=lambda number, _: again.append(number), **options)
    assert again == [number for number, _ in told]


def test_rows_that_join_keep_the_rows_of_a_prompt_together(build):
    engine = Engine(build(), max_batch_size=4)
    params = SamplingParams(max_new_tokens=20, num_return_sequences=3, seed=3, stop_token_ids=(5,))
    for number in range(6):
        engine.add_request([number + 1, 2], params)
    while engine.has_unfinished_requests():
        engine.step()
        group = engine._batch.group[: engine._batch.size]
        runs = np.count_nonzero(np.diff(group)) + 1
        assert not group.size or runs == len(set(group.tolist()))

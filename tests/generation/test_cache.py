"""The KV cache: what it stores, what it frees, and that decoding over it is exact."""

from __future__ import annotations

import pytest
import torch

from fastllm.generation.cache import DecodeAttend, KVCache, PrefillAttend
from fastllm.layout import PackedLayout


def _cache_with(lengths, rows=4, max_tail=1000):
    cache = KVCache(rows, max_tail)
    total = sum(lengths)
    numbers = torch.arange(total, dtype=torch.float32).view(total, 1, 1).expand(total, 2, 4)
    layers = [(numbers.clone(), -numbers.clone()) for _ in range(3)]
    cache.append(layers, PackedLayout(lengths).starts)
    return cache


@torch.no_grad()
def test_decoding_equals_the_forward_pass_without_a_cache(
    build, family, prompts, backend, device, monkeypatch
):
    monkeypatch.setattr("fastllm.generation.cache._FIRST_TAIL", 3)  # so that the tails grow
    model = build(family).to(device)
    copies, steps = 2, 11
    continuations = torch.randint(0, 61, (len(prompts) * copies, steps), device=device)

    layout = PackedLayout([len(p) for p in prompts], device=device)
    last = layout.starts[1:].long() - 1
    attend = PrefillAttend(layout, last)
    packed = torch.tensor([t for p in prompts for t in p], device=device)
    hidden = model.model(packed, attend, last)
    found = [model.lm_head(hidden).repeat_interleave(copies, 0)]

    cache = KVCache(len(continuations), steps)
    cache.append(attend.computed, layout.starts)
    group = torch.arange(len(prompts), device=device).repeat_interleave(copies).int()
    start = layout.starts.diff()[group.long()]
    rows = cache.take_rows(len(continuations))
    for step in range(steps):
        rows = cache.reserve(step + 1, rows, waiting=0)
        count = torch.full_like(rows, step + 1)
        attend = DecodeAttend(cache, group, rows, count, start + step, int(start.max()) + step + 1)
        found.append(model.lm_head(model.model(continuations[:, step], attend)))
    found = torch.stack(found, dim=1)

    for sequence, continuation in enumerate(continuations.tolist()):
        prompt = prompts[sequence // copies]
        whole = model(torch.tensor([prompt + continuation], device=device))[0]
        expected = whole[len(prompt) - 1 :]
        error = (found[sequence] - expected).abs().max() / expected.abs().max()
        assert error < 1e-5, f"sequence {sequence}"


def test_prompts_are_stored_once_however_many_sequences_continue_them():
    cache = _cache_with([3, 5])
    assert cache.num_prompts == 2
    assert cache.prefix[0][0].shape == (8, 2, 4)
    assert cache.num_bytes == 3 * 2 * 8 * 2 * 4 * 4


def test_a_second_prefill_continues_the_row():
    cache = _cache_with([3, 5])
    more = [(torch.full((2, 2, 4), 7.0), torch.full((2, 2, 4), 8.0)) for _ in range(3)]
    cache.append(more, PackedLayout([1, 1]).starts)
    assert cache.prefix_starts.tolist() == [0, 3, 8, 9, 10]
    assert cache.prefix_starts.dtype == torch.int32
    assert cache.prefix[2][0][:, 0, 0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 7, 7]


def test_prompts_that_nobody_continues_leave_the_cache():
    cache = _cache_with([3, 2, 4, 1])
    groups = cache.keep_prompts(torch.tensor([3, 1, 1], dtype=torch.int32))
    assert groups.tolist() == [1, 0, 0]
    assert cache.prefix_starts.tolist() == [0, 2, 3]
    assert cache.prefix[1][0][:, 0, 0].tolist() == [3, 4, 9]
    assert cache.prefix[1][1][:, 1, 3].tolist() == [-3, -4, -9]
    cache.keep_prompts(torch.tensor([], dtype=torch.int32))
    assert cache.num_prompts == 0 and cache.num_bytes == 0


def test_rows_are_used_again_and_survivors_do_not_move():
    cache = _cache_with([2])
    rows = cache.reserve(1, cache.take_rows(4), waiting=3)
    assert cache.free_rows == 0
    before = cache.tails[0][0]
    cache.give_back(rows[torch.tensor([1, 2])])
    assert cache.free_rows == 2
    assert cache.take_rows(1).tolist() == [1]
    assert cache.tails[0][0] is before


def test_tails_grow_with_the_longest_sequence_and_keep_only_the_living(monkeypatch):
    monkeypatch.setattr("fastllm.generation.cache._FIRST_TAIL", 4)
    cache = _cache_with([2], rows=4, max_tail=11)
    rows = cache.reserve(1, cache.take_rows(4), waiting=0)
    assert cache.tail_capacity == 4
    for layer, (k, v) in enumerate(cache.tails):
        k.copy_(torch.arange(4.0)[:, None, None, None] + 10 * layer)
        v.copy_(k + 100)
    cache.give_back(rows[:2])
    rows = cache.reserve(5, rows[2:], waiting=0)
    assert cache.tail_capacity == 8
    assert cache.tails[0][0].shape[0] == 2, "rows that nobody can need are not allocated again"
    assert rows.tolist() == [0, 1]
    for layer, (k, v) in enumerate(cache.tails):
        assert k[:, :4, 0, 0].tolist() == [[2 + 10 * layer] * 4, [3 + 10 * layer] * 4]
        assert v[:, :4, 1, 1].tolist() == [[102 + 10 * layer] * 4, [103 + 10 * layer] * 4]
        assert not k[:, 4:].any() and not v[:, 4:].any()
    assert cache.reserve(9, rows, waiting=1).tolist() == [0, 1]
    assert cache.tail_capacity == 11, "never longer than a sequence can become"
    assert cache.take_rows(1).tolist() == [2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tails_have_the_dtype_of_the_keys(dtype):
    cache = KVCache(2, 10)
    cache.append([(torch.zeros(3, 1, 4, dtype=dtype),) * 2], PackedLayout([3]).starts)
    cache.reserve(1, cache.take_rows(2), waiting=0)
    assert cache.tails[0][0].dtype == dtype

"""The cache of blocks: whose they are, what is in them, and that decoding over it is exact."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastllm.generation.batch import RunningBatch
from fastllm.generation.cache import BLOCK, BlockCache, blocks_of
from fastllm.generation.requests import Request
from fastllm.generation.sampling import SamplingParams
from fastllm.generation.scheduler import Scheduler
from fastllm.generation.token_step import DecodeAttend, StepRows
from fastllm.generation.transcript import Transcript


def _cache(blocks, **options):
    cache = BlockCache(3, 2, 4, torch.float32, **options)
    cache.grow(blocks)
    return cache


def test_bytes_of_a_block():
    cache = _cache(5)
    assert cache.block_bytes == 3 * 2 * 2 * 4 * BLOCK * 4
    assert sum(t.nbytes for t in (*cache.keys, *cache.values)) == 5 * cache.block_bytes
    assert BlockCache(3, 2, 4, torch.bfloat16).block_bytes == cache.block_bytes // 2
    assert [blocks_of(n) for n in (0, 1, 64, 65)] == [0, 1, 1, 2]


def test_a_block_has_one_owner():
    cache = _cache(10)
    first, second = cache.take(3), cache.take(4)
    assert first.tolist() == [0, 1, 2] and second.tolist() == [3, 4, 5, 6]
    assert (cache.used_blocks, cache.free_blocks) == (7, 3)
    cache.give_back(first)
    cache.give_back(second[2:])
    assert cache.free_blocks == 8
    again = cache.take(8)
    assert sorted([*again, *second[:2]]) == list(range(10))
    assert cache.most_used == 10 and cache.free_blocks == 0


def test_blocks_that_were_used_come_before_fresh_ones():
    cache = _cache(100)
    for _ in range(20):
        taken = [cache.take(n) for n in (3, 1, 2)]
        for blocks in taken[::-1]:
            cache.give_back(blocks)
    assert max(cache.take(6)) == 5


def test_growing_keeps_what_is_stored_and_the_budget():
    cache = BlockCache(3, 2, 4, torch.float32, most_bytes=9 * 3 * 2 * 2 * 4 * BLOCK * 4 + 1)
    assert cache.most_blocks == 9 and cache.capacity == 0
    cache.grow(4)
    taken = cache.take(3)
    cache.give_back(taken[1:2])
    for layer, (k, v) in enumerate(zip(cache.keys, cache.values, strict=True)):
        k[:3], v[:3] = layer, -layer
    version = cache.version
    cache.grow(3)
    assert cache.capacity == 4 and cache.version == version
    cache.grow(100)
    assert cache.capacity == 9 and cache.version > version
    for layer, (k, v) in enumerate(zip(cache.keys, cache.values, strict=True)):
        assert (k[:3] == layer).all() and (v[:3] == -layer).all()
    assert sorted([*cache.take(7), 0, 2]) == list(range(9))


def test_packed_rows_fill_blocks():
    cache = _cache(4)
    k = torch.arange(100.0)[:, None, None] + torch.arange(8.0).view(2, 4) / 10
    rows = torch.arange(100).clamp(max=99)
    rows = torch.cat((rows, torch.full((28,), 99))).view(2, BLOCK)
    cache.write_rows(1, k, -k, torch.tensor([3, 1]), rows)
    found_k = cache.keys[1][[3, 1]].permute(0, 3, 1, 2).flatten(0, 1)
    found_v = cache.values[1][[3, 1]].permute(0, 2, 1, 3).flatten(0, 1)
    assert torch.equal(found_k[:100], k) and torch.equal(found_v[:100], -k)
    cache.write_tokens(1, k[:2], k[2:4], torch.tensor([3, 0]), torch.tensor([5, 63]))
    assert torch.equal(cache.keys[1][3, :, :, 5], k[0])
    assert torch.equal(cache.keys[1][0, :, :, 63], k[1])
    assert torch.equal(cache.values[1][3, :, 5], k[2])
    assert torch.equal(cache.values[1][0, :, 63], k[3])


@torch.no_grad()
def test_decoding_equals_the_forward_pass_without_a_cache(build, family, backend, device):
    """Prompts and tails that end within a block, at its end, and beyond it."""
    model = build(family, max_position_embeddings=300).to(device)
    prompts = [torch.randint(0, 61, (n,)).tolist() for n in (64, 9, 130)]
    copies, steps = 2, 70
    continuations = torch.randint(0, 61, (len(prompts) * copies, steps))

    config = model.config
    sizes = config.num_hidden_layers, config.num_key_value_heads, config.head_dim
    cache, batch = BlockCache(*sizes, torch.float32, device), RunningBatch(61, rows=2)
    scheduler = Scheduler(batch, cache, Transcript(), 100, 8192)
    params = SamplingParams(max_new_tokens=steps + 1, num_return_sequences=copies)
    for number, prompt in enumerate(prompts):
        request = Request(number, np.array(prompt), params, ())
        scheduler.add(request, list(range(copies)))
    prefill, joined = scheduler.join()
    assert joined and len(prefill.prompts) == len(prompts) and batch.size == 6
    hidden = prefill.run(model, cache)
    found = [model.lm_head(hidden).repeat_interleave(copies, 0)]
    batch.position[:6] += 1
    for step in range(steps):
        scheduler.reserve(1)
        batch.token[:6] = continuations[:, step]
        rows = StepRows.next_of(batch).on(device)
        attend = DecodeAttend(cache, rows, int(batch.position[:6].max()) + 1)
        found.append(model.lm_head(model.model(rows.token, attend)))
        batch.position[:6] += 1
    found = torch.stack(found, dim=1)

    for sequence, continuation in enumerate(continuations.tolist()):
        prompt = prompts[sequence // copies]
        whole = model(torch.tensor([prompt + continuation], device=device))[0]
        expected = whole[len(prompt) - 1 :]
        error = (found[sequence] - expected).abs().max() / expected.abs().max()
        assert error < 1e-5, f"sequence {sequence}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cache_has_the_dtype_of_the_keys(dtype):
    cache = BlockCache(1, 1, 4, dtype)
    cache.grow(1)
    assert cache.keys[0].dtype == cache.values[0].dtype == dtype


def test_without_a_budget_half_of_the_free_memory_is_the_limit(monkeypatch):
    monkeypatch.setattr("fastllm.generation.cache._free_memory", lambda device: 1 << 30)
    cache = BlockCache(3, 2, 4, torch.float32)
    assert cache.most_blocks == (1 << 29) // cache.block_bytes

"""Heads as rows of pairs: what the kernels of queries and keys do with a tile of them.

A tile is a few heads, one after another in memory: of one token or of several. Channel i of a head
is paired with channel i + HALF.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.backends.compiler import GPUTarget

from .configs import config
from .numerics import narrow


def num_tiles(x: Tensor, constants: dict[str, Any]) -> int:
    """Tiles of x [T, H, D]."""
    return -(-(x.shape[0] * x.shape[1]) // constants["ROWS"])


@functools.cache
def tile_constants(
    kernel: str, dtype: torch.dtype, head_dim: int, _gpu: GPUTarget
) -> dict[str, Any]:
    """Constants of a launch on heads of this size; the table has the pairs of a tile."""
    constants = dict(config(kernel, dtype, head_dim))
    half = head_dim // 2
    block = triton.next_power_of_2(half)
    rows = max(1, constants.pop("PAIRS") // block)
    return {"HALF": half, "ROWS": rows, "BLOCK": block, **constants}


@triton.jit
def heads_of(tile, num_tokens, pairs, HEADS: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr):
    """Token and head of each row of a tile [ROWS, 1], and which of its pairs are there."""
    rows = (tile * ROWS + tl.arange(0, ROWS))[:, None]
    token = rows // HEADS if HEADS > 0 else rows
    return token, rows - token * HEADS, (token < num_tokens) & (pairs < HALF)


@triton.jit
def load_pairs(heads_ptr, pairs, mask, HALF: tl.constexpr):
    """Channels i and i + HALF of each head, in fp32."""
    a = tl.load(heads_ptr + pairs, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(heads_ptr + HALF + pairs, mask=mask, other=0.0).to(tl.float32)
    return a, b


@triton.jit
def store_pairs(heads_ptr, a, b, pairs, mask, HALF: tl.constexpr):
    dtype = heads_ptr.dtype.element_ty
    tl.store(heads_ptr + pairs, narrow(a, dtype), mask=mask)
    tl.store(heads_ptr + HALF + pairs, narrow(b, dtype), mask=mask)


@triton.jit
def angles_of(cos_ptr, sin_ptr, positions_ptr, token, num_tokens, pairs, mask, HALF: tl.constexpr):
    """Every row loads its angles, from the cache: no thread waits for another that has them."""
    position = token
    if positions_ptr is not None:
        position = tl.load(positions_ptr + token, mask=token < num_tokens, other=0).to(tl.int64)
    offsets = position * HALF + pairs
    cos = tl.load(cos_ptr + offsets, mask=mask, other=0.0, eviction_policy="evict_last")
    sin = tl.load(sin_ptr + offsets, mask=mask, other=0.0, eviction_policy="evict_last")
    return cos, sin


@triton.jit
def rstd_of(a, b, eps, HALF: tl.constexpr):
    # torch.compile passes Python floats as fp64, which would spread to the whole tile.
    mean = tl.sum(a * a + b * b, axis=1)[:, None] / (2 * HALF)
    return tl.rsqrt(mean + tl.cast(eps, tl.float32))


@triton.jit
def normalised(a, b, norm_ptr, head, pairs, mask, eps, HALF: tl.constexpr):
    """The head over its root mean square, times the weight; as it is without a weight."""
    if norm_ptr is not None:
        rstd = rstd_of(a, b, eps, HALF)
        wa, wb = load_pairs(norm_ptr + head * 0, pairs, mask, HALF)
        a, b = a * rstd * wa, b * rstd * wb
    return a, b


@triton.jit
def rotated(a, b, cos, sin, INVERSE: tl.constexpr):
    if INVERSE:
        sin = -sin
    return a * cos - b * sin, b * cos + a * sin

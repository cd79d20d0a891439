"""Tiles of rows and the streaming softmax, as decoding reads and sums them."""

from __future__ import annotations

import triton
import triton.language as tl

from .numerics import dot, narrow

# As a window, it lets every key through.
NO_WINDOW = 2**30


def head_block(head_dim: int) -> int:
    """Columns of a tile of heads: a power of two, at least what a tensor core takes."""
    return max(16, triton.next_power_of_2(head_dim))


@triton.jit
def load_rows(
    ptr,
    count,
    STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr,
):
    """A tile [ROWS, BLOCK_D] of rows of D elements: zeros past D, and past `count` if MASKED."""
    rows = tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, BLOCK_D)[None, :]
    pointers = ptr + rows * STRIDE + columns
    if MASKED and BLOCK_D == D:
        return tl.load(pointers, mask=rows < count, other=0.0)
    if MASKED:
        return tl.load(pointers, mask=(rows < count) & (columns < D), other=0.0)
    if BLOCK_D == D:
        return tl.load(pointers)
    return tl.load(pointers, mask=columns < D, other=0.0)


@triton.jit
def softmax_step(scores, scale, v, out, top, total, PRECISION: tl.constexpr):
    """Adds a block of keys to a streaming softmax.

    Args:
        scores: q k^T [M, N] of the block, -inf where a query does not see a key.
        scale: factor of the scores, > 0, times log2(e).
        v: values [N, D].
        out, top, total: the running sum of p v [M, D], maximum and sum of p [M].
    """
    new_top = tl.maximum(top, tl.max(scores, axis=1) * scale)
    p = tl.exp2(scores * scale - new_top[:, None])
    rescale = tl.exp2(top - new_top)
    total = total * rescale + tl.sum(p, axis=1)
    out = dot(narrow(p, v.dtype), v, out * rescale[:, None], PRECISION)
    return out, new_top, total

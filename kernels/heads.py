"""Tiles of heads: rows of D channels, in two parts where D is not a power of two.

A tile has a power of two of columns. Heads of 80 or 96 channels are 64 and 16 or 32 more, so that
neither memory nor tensor cores pay for the 128 that would hold them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .numerics import dot, narrow

# The fewest columns that a tensor core multiplies.
_NARROWEST = 16


def head_parts(head_dim: int) -> tuple[int, int]:
    """Columns of the two parts of a tile of heads; the second is 0 where one part does.

    They hold `head_dim` and perhaps a few more columns, which are zeros.
    """
    whole = max(_NARROWEST, triton.next_power_of_2(head_dim))
    first = whole // 2
    extra = max(_NARROWEST, triton.next_power_of_2(head_dim - first)) if head_dim > first else 0
    return (first, extra) if first >= _NARROWEST and first + extra < whole else (whole, 0)


@triton.jit
def load_part(
    ptr,
    stride,
    count,
    FIRST: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Columns FIRST.. of rows of D channels: zeros past D, and past `count` rows if MASKED."""
    rows = tl.arange(0, ROWS)[:, None]
    columns = FIRST + tl.arange(0, COLUMNS)[None, :]
    pointers = ptr + rows * stride + columns
    if MASKED and FIRST + COLUMNS <= D:
        return tl.load(pointers, mask=rows < count, other=0.0)
    if MASKED:
        return tl.load(pointers, mask=(rows < count) & (columns < D), other=0.0)
    if FIRST + COLUMNS <= D:
        return tl.load(pointers)
    return tl.load(pointers, mask=columns < D, other=0.0)


@triton.jit
def zero_heads(ROWS: tl.constexpr, BLOCK_D: tl.constexpr, EXTRA: tl.constexpr):
    """Both parts of a tile of sums; the second means nothing where EXTRA is 0."""
    part = tl.zeros((ROWS, BLOCK_D), tl.float32)
    extra = part
    if EXTRA:
        extra = tl.zeros((ROWS, EXTRA), tl.float32)
    return part, extra


@triton.jit
def load_heads(
    ptr,
    stride,
    count,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EXTRA: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Both parts of a tile of rows; the second means nothing where EXTRA is 0."""
    part = load_part(ptr, stride, count, 0, ROWS, D, BLOCK_D, MASKED)
    extra = part
    if EXTRA:
        extra = load_part(ptr, stride, count, BLOCK_D, ROWS, D, EXTRA, MASKED)
    return part, extra


@triton.jit
def fetch_heads(
    descriptor, extra_descriptor, row, column, BLOCK_D: tl.constexpr, EXTRA: tl.constexpr
):
    """The same by bulk copies, for rows that are all there."""
    part = descriptor.load([row, column])
    extra = part
    if EXTRA:
        extra = extra_descriptor.load([row, column + BLOCK_D])
    return part, extra


@triton.jit
def store_part(
    ptr,
    tile,
    stride,
    count,
    FIRST: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    rows = tl.arange(0, ROWS)[:, None]
    columns = FIRST + tl.arange(0, COLUMNS)[None, :]
    mask = (rows < count) & (columns < D)
    tl.store(ptr + rows * stride + columns, narrow(tile, ptr.dtype.element_ty), mask=mask)


@triton.jit
def store_heads(
    ptr,
    part,
    extra,
    stride,
    count,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EXTRA: tl.constexpr,
):
    """Stores the first `count` rows, D columns of each."""
    store_part(ptr, part, stride, count, 0, ROWS, D, BLOCK_D)
    if EXTRA:
        store_part(ptr, extra, stride, count, BLOCK_D, ROWS, D, EXTRA)


@triton.jit
def over_channels(a, a_extra, b, b_extra, EXTRA: tl.constexpr, PRECISION: tl.constexpr):
    """a b^T of two tiles of heads: [rows of a, rows of b]."""
    product = dot(a, tl.trans(b), None, PRECISION)
    if EXTRA:
        product = dot(a_extra, tl.trans(b_extra), product, PRECISION)
    return product


@triton.jit
def over_rows(
    weights, b, b_extra, total, total_extra, EXTRA: tl.constexpr, PRECISION: tl.constexpr
):
    """A tile of heads, total + weights b, with weights [rows of the total, rows of b]."""
    weights = narrow(weights, b.dtype)
    total = dot(weights, b, total, PRECISION)
    if EXTRA:
        total_extra = dot(weights, b_extra, total_extra, PRECISION)
    return total, total_extra

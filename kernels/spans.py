"""Who sees whom on the packed, prefix-shared layout, in blocks.

A query sees two *spans* of keys: the whole prefix segment, if there is one, and its own segment up
to itself. A key is seen by its own segment from itself on, and by every segment that continues it.
Everything is decided in sequence positions, so a sliding window reaches from an answer into its
prompt. A span is cut into blocks; those that are visible whole need no mask.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def visible(query_position, key_position, window):
    """Whether a query sees a key of its own sequence."""
    return (key_position <= query_position) & (key_position > query_position - window)


@triton.jit
def load_positions(query_rows_ptr, positions_ptr, count, BLOCK: tl.constexpr):
    """Sequence positions of the first `count` of BLOCK queries, -1 for the others."""
    queries = tl.arange(0, BLOCK)
    rows = tl.load(query_rows_ptr + queries, mask=queries < count, other=0)
    return tl.load(positions_ptr + rows, mask=queries < count, other=-1)


@triton.jit
def prefix_length(segment, starts_ptr, prefix_ptr):
    """Tokens that come before a segment in its sequence."""
    prefix = tl.load(prefix_ptr + segment)
    known = prefix >= 0
    end = tl.load(starts_ptr + prefix + 1, mask=known, other=0)
    return end - tl.load(starts_ptr + prefix, mask=known, other=0)


@triton.jit
def first_span(segment, prefix_ptr):
    """0 where a segment has a prefix, else 1: the spans that its queries see end at 2."""
    return tl.where(tl.load(prefix_ptr + segment) >= 0, 0, 1)


@triton.jit
def key_span(own, segment, oldest, newest, window, starts_ptr, prefix_ptr, BLOCK: tl.constexpr):
    """Keys of the prefix (own = 0) or of the segment (own = 1) that a tile of queries sees.

    Args:
        oldest, newest: positions of the first and the last query.

    Returns:
        Packed row and position of the first key, end position, and the blocks (see `cut`).
    """
    source = tl.where(own == 1, segment, tl.load(prefix_ptr + segment))
    start = tl.load(starts_ptr + source)
    stop = tl.load(starts_ptr + source + 1)
    before = prefix_length(source, starts_ptr, prefix_ptr)
    position = tl.maximum(before, oldest - window + 1)
    end = before + stop - start
    blocks, leading, whole = cut(
        position, tl.minimum(end, newest + 1), newest - window + 1, oldest + 1, BLOCK
    )
    return (
        (start + position - before).to(tl.int64),
        position,
        end,
        blocks,
        leading,
        whole,
    )


@triton.jit
def query_span(
    segment,
    oldest,
    newest,
    window,
    starts_ptr,
    prefix_ptr,
    query_rows_ptr,
    query_starts_ptr,
    BLOCK: tl.constexpr,
):
    """Queries of a segment that see a tile of keys.

    Args:
        oldest, newest: positions of the first and the last key.

    Returns:
        First query, end, and the blocks (see `cut`).
    """
    start = tl.load(starts_ptr + segment)
    stop = tl.load(starts_ptr + segment + 1)
    low = tl.load(query_starts_ptr + segment)
    high = tl.load(query_starts_ptr + segment + 1)
    shift = start - prefix_length(segment, starts_ptr, prefix_ptr)
    first = first_query(oldest + shift, start, stop, low, high, query_rows_ptr)
    end = first_query(newest + window + shift, start, stop, low, high, query_rows_ptr)
    see_all = first_query(newest + shift, start, stop, low, high, query_rows_ptr)
    lose_one = first_query(oldest + window + shift, start, stop, low, high, query_rows_ptr)
    blocks, leading, whole = cut(first, end, see_all, lose_one, BLOCK)
    return first.to(tl.int64), end, blocks, leading, whole


@triton.jit
def first_query(row, start, stop, low, high, query_rows_ptr):
    """First query at or after a packed row, among queries low..high of segment rows start..stop.

    A row has one query at most, so the answer lies between two bounds. They are equal when every
    row has a query; otherwise a binary search is left.
    """
    first = tl.maximum(low, high - tl.maximum(stop - row, 0))
    last = tl.minimum(high, low + tl.maximum(row - start, 0))
    while first < last:
        middle = (first + last) // 2
        before = tl.load(query_rows_ptr + middle) < row
        first = tl.where(before, middle + 1, first)
        last = tl.where(before, last, middle)
    return first


@triton.jit
def cut(first, end, whole_first, whole_end, BLOCK: tl.constexpr):
    """Cuts first..end into blocks, of which those inside whole_first..whole_end need no mask.

    Returns:
        The number of blocks, how many come before the first whole one, and how many are whole.
    """
    blocks = tl.cdiv(tl.maximum(end - first, 0), BLOCK)
    leading = tl.minimum(tl.cdiv(tl.maximum(whole_first - first, 0), BLOCK), blocks)
    inside = tl.maximum(tl.minimum(whole_end, end) - first, 0) // BLOCK
    return blocks, leading, tl.maximum(inside - leading, 0)


@triton.jit
def nth_block(index, leading, whole, MASKED: tl.constexpr):
    """Place in the span of the index-th whole block, or of the index-th other one if MASKED."""
    if MASKED:
        return index + tl.where(index >= leading, whole, 0)
    return leading + index

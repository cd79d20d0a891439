"""What a program reads of its schedule (see schedules.py): its tile, its blocks, who sees whom.

Everything is said in packed rows. A query sees two ranges of rows: a part of its own segment up to
itself, and a part of the segment that this one continues. A tile of queries sees two *spans* of
rows, cut into blocks, of which those that each of its queries sees whole need no mask.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Integers in the record of a tile of queries, of a piece of work of keys, and of a run of queries.
TILE = tl.constexpr(12)
PIECE = tl.constexpr(8)
RUN = tl.constexpr(5)


@triton.jit
def query_tile(tiles_ptr, H: tl.constexpr):
    """This program's tile of queries: its record, its first query, how many, and the head.

    The heads of a tile are neighbours in the order of launching: those that share a key head read
    the same keys and values at the same time.
    """
    program = tl.program_id(0)
    record = tiles_ptr + (program // H).to(tl.int64) * TILE
    return record, tl.load(record).to(tl.int64), tl.load(record + 1), (program % H).to(tl.int64)


@triton.jit
def load_spans(record):
    """Two spans of keys: first row, end, blocks before the whole ones, whole blocks."""
    first, second = record + 2, record + 6
    return (
        tl.load(first),
        tl.load(first + 1),
        tl.load(first + 2),
        tl.load(first + 3),
        tl.load(second),
        tl.load(second + 1),
        tl.load(second + 2),
        tl.load(second + 3),
    )


@triton.jit
def block_of(index, masked, spans, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """The index-th whole block of both spans, or the index-th other one if MASKED.

    Args:
        masked: how many blocks of the first span are not whole.

    Returns:
        Its first row, and the rows from there to the end of its span.
    """
    start, end, leading, whole, second_start, second_end, second_leading, second_whole = spans
    before = masked if MASKED else whole
    second = index >= before
    place = index - tl.where(second, before, 0)
    leading = tl.where(second, second_leading, leading)
    if MASKED:
        place += tl.where(place >= leading, tl.where(second, second_whole, whole), 0)
    else:
        place += leading
    row = tl.where(second, second_start, start) + place * BLOCK
    return row, tl.where(second, second_end, end) - row


@triton.jit
def load_piece(record):
    """Row, count, first run, end, first head of the group, heads, part, and which bounds count."""
    row, count = tl.load(record).to(tl.int64), tl.load(record + 1)
    first_run, last_run = tl.load(record + 2), tl.load(record + 3)
    first_head, heads, part = tl.load(record + 4), tl.load(record + 5), tl.load(record + 6)
    return row, count, first_run, last_run, first_head, heads, part, tl.load(record + 7)


@triton.jit
def load_run(record):
    """First query, end, blocks before the whole ones, whole blocks, blocks."""
    first, end, leading = tl.load(record), tl.load(record + 1), tl.load(record + 2)
    return first, end, leading, tl.load(record + 3), tl.load(record + 4)


@triton.jit
def load_bounds(bounds_ptr, queries, first, count, BLOCK: tl.constexpr):
    """First and last row that each of `count` queries sees in one segment; none for the others."""
    rows = tl.arange(0, BLOCK)
    bounds_ptr += first + rows
    low = tl.load(bounds_ptr, mask=rows < count, other=0)
    high = tl.load(bounds_ptr + tl.cast(queries, tl.int64), mask=rows < count, other=-1)
    return low, high


@triton.jit
def keys_of(row, left, BLOCK: tl.constexpr):
    """Packed rows of a block of keys, and -2, which no query sees, past its `left` rows."""
    places = tl.arange(0, BLOCK)
    return tl.where(places < left, row + places, -2)


@triton.jit
def within(keys, low, high):
    """Whether keys, given by their packed rows, lie within low..high."""
    return (keys >= low) & (keys <= high)


@triton.jit
def nth_block(index, leading, whole, MASKED: tl.constexpr):
    """Place in a span of the index-th whole block, or of the index-th other one if MASKED."""
    if MASKED:
        return index + tl.where(index >= leading, whole, 0)
    return leading + index

"""Which tokens a program of decode attention reads, and for whom."""

from __future__ import annotations

import triton
import triton.language as tl

# Tokens of a block of the cache.
BLOCK = tl.constexpr(64)
# Tokens of a split, in a run that needs no more than MOST_SPLITS of them; a longer run has so many
# splits, of more tokens. Few enough for a single sequence to fill a GPU, and enough for a split to
# read many times what it writes.
SPLIT = tl.constexpr(256)
MOST_SPLITS = tl.constexpr(32)


@triton.jit
def of_neighbours(
    lengths_ptr,
    group_ptr,
    tail_lengths_ptr,
    place,
    key_head,
    num_sequences,
    num_columns,
    prefix_splits,
    splits,
    window,
    ROWS: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
):
    """A split of the prompt of a sequence and its neighbours: that it is one of a prompt, where the
    prompt's row of the table is, where the split begins and ends, the first token that anybody
    sees, the rows of q, which of them there are, the first token that each sees, the places of
    their results."""
    first, split = place // prefix_splits, place % prefix_splits
    group, members, shortest = neighbours(
        group_ptr, tail_lengths_ptr, first, num_sequences, ROWS // (H // K)
    )
    length = tl.load(lengths_ptr + group)
    begin, end = part(length, split)
    end = tl.where(members > 0, end, begin)
    member = tl.arange(0, ROWS) // (H // K)
    valid = member < members
    sequence = (first + member).to(tl.int64)
    rows = sequence * H + key_head * (H // K) + tl.arange(0, ROWS) % (H // K)
    tails = tl.load(tail_lengths_ptr + sequence, mask=valid, other=0)
    oldest = tl.maximum(length + tails - window, 0)
    seen = tl.maximum(length + shortest - window, 0)
    table, places = group.to(tl.int64) * num_columns, rows * splits + split
    return 1, table, begin, end, seen, rows, valid, oldest, places


@triton.jit
def of_one(
    lengths_ptr,
    place,
    key_head,
    num_columns,
    tail_splits,
    splits,
    window,
    ROWS: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
):
    """The same of the tail of one sequence."""
    sequence, split = (place // tail_splits).to(tl.int64), place % tail_splits
    length = tl.load(lengths_ptr + sequence)
    begin, end = part(length, split)
    member = tl.arange(0, ROWS)
    rows = sequence * H + key_head * (H // K) + member
    seen = tl.maximum(length - window, 0)
    oldest = tl.zeros((ROWS,), tl.int32) + seen
    # The splits of the tail come after those of the prompt.
    places = rows * splits + (splits - tail_splits) + split
    table, valid = sequence * num_columns, member < H // K
    return 0, table, begin, end, seen, rows, valid, oldest, places


@triton.jit
def block_of(prefix_blocks_ptr, tail_blocks_ptr, of_prompt, place):
    """An entry of one of the two tables. Not of a pointer to either of them, which Triton 3.6 does
    not compile for AMD."""
    of_prefix = tl.load(prefix_blocks_ptr + place, mask=of_prompt != 0, other=0)
    return of_prefix + tl.load(tail_blocks_ptr + place, mask=of_prompt == 0, other=0)


@triton.jit
def neighbours(group_ptr, tail_lengths_ptr, first, num_sequences, SEQUENCES: tl.constexpr):
    """The prompt of a sequence, how many sequences from it on its tile holds, their shortest tail.

    A run of sequences of one prompt is cut into tiles of SEQUENCES; who does not lead one gets 0.
    """
    group = tl.load(group_ptr + first)
    leader = 0
    for start in range(0, first, 256):
        others = start + tl.arange(0, 256)
        found = tl.load(group_ptr + others, mask=others < first, other=0)
        different = (others < first) & (found != group)
        leader = tl.maximum(leader, tl.max(tl.where(different, others + 1, 0), axis=0))
    following = first + tl.arange(0, power_of_two(SEQUENCES))
    found = tl.load(group_ptr + following, mask=following < num_sequences, other=-1)
    stop = tl.min(tl.where(found == group, first + SEQUENCES, following), axis=0)
    tails = tl.load(tail_lengths_ptr + following, mask=following < stop, other=1 << 30)
    leads = (first - leader) % SEQUENCES == 0
    return group, tl.where(leads, stop - first, 0), tl.min(tails, axis=0)


@triton.constexpr_function
def power_of_two(number):
    return triton.next_power_of_2(number)


@triton.jit
def split_size(length):
    """Tokens of a split of a run, a multiple of a block's."""
    return SPLIT * tl.cdiv(length, SPLIT * MOST_SPLITS)


@triton.jit
def part(length, split):
    """The tokens of a split of a run: begin, end; none past its length."""
    size = split_size(length)
    begin = split * size
    return begin, tl.minimum(begin + size, length)

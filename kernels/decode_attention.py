"""Attention of one new token per sequence over the KV cache (split-KV, as in Flash-Decoding).

The cache is blocks of 64 tokens: some belong to a prompt, some to a sequence's tail. Keys are read
in *splits*, so that few sequences still fill the GPU; each split leaves a partial softmax, and a
last kernel combines them. All query heads of a key head share each tile of keys. In the prompts,
so do the sequences of a group: a tile of sequences reads each of its prompts once. The grid depends
on shapes only, and every length is read on the device: nothing waits for the host, and a CUDA graph
can replay it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import is_cuda, num_processors, on_tensor_device, schedule
from .numerics import LOG2E, LOWEST, dot, dot_precision, narrow
from .tiles import NO_WINDOW, head_block, load_rows, softmax_step

# Tokens of a block of the cache.
BLOCK = tl.constexpr(64)

# Rows (sequences x heads) of a query tile: what a tensor core takes, and what registers hold of
# elements of 2 and of 4 bytes.
_MIN_ROWS = 16
_MAX_ROWS = {2: 64, 4: 32}
_MAX_SPLITS = 32


@on_tensor_device
def forward(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    prefix_blocks: Tensor,
    prefix_lengths: Tensor,
    group: Tensor,
    tail_blocks: Tensor,
    tail_lengths: Tensor,
    scale: float,
    window: int,
) -> Tensor:
    """Attend from the newest token of each sequence to its prompt and its tail.

    Args:
        q: [B, H, D].
        keys: [N, K, D, 64].
        values: [N, K, 64, D]; the new token's key and value are in.
        prefix_blocks: blocks of each prompt [G, ?], int32.
        prefix_lengths: tokens of each prompt [G], int32.
        group: prompt of each sequence [B], int32; fastest when equal ones are neighbours.
        tail_blocks: blocks of each tail [B, ?], int32.
        tail_lengths: tokens in each tail [B], int32.
        scale: factor of the scores, > 0.
        window: the new token at position p sees positions > p - window; 0 for all.

    Returns:
        [B, H, D], in the dtype of q.
    """
    batch, heads, head_dim = q.shape
    out = torch.empty_like(q)
    if not batch:
        return out
    key_heads = keys.shape[1]
    share = triton.cdiv(batch, max(1, prefix_lengths.numel()))
    rows, sequences = _query_tile(heads // key_heads, share, q.element_size())
    tiles = triton.cdiv(batch, sequences)
    prefix_splits = _splits(prefix_blocks.shape[1], tiles * key_heads, q.device)
    tail_splits = _splits(tail_blocks.shape[1], batch * key_heads, q.device)
    splits = prefix_splits + tail_splits
    partial = q.new_empty((batch, heads, splits, head_dim), dtype=torch.float32)
    lse = q.new_empty((batch, heads, splits), dtype=torch.float32)
    constants = {
        "H": heads,
        "K": key_heads,
        "D": head_dim,
        "BLOCK_D": head_block(head_dim),
        "BLOCK_N": 32 if head_dim > 128 or q.element_size() == 4 else 64,
        "PRECISION": dot_precision(q.dtype),
    }
    limits = scale, window or NO_WINDOW
    if prefix_splits:
        decode_prefix_kernel[(tiles, key_heads, prefix_splits)](
            q,
            keys,
            values,
            prefix_blocks,
            prefix_lengths,
            group,
            tail_lengths,
            partial,
            lse,
            batch,
            prefix_blocks.shape[1],
            splits,
            *limits,
            ROWS=rows,
            SEQUENCES=sequences,
            **schedule(8 if rows > 32 and is_cuda() else 4),
            **constants,
        )
    if tail_splits:
        decode_tail_kernel[(batch, key_heads, tail_splits)](
            q,
            keys,
            values,
            tail_blocks,
            tail_lengths,
            partial,
            lse,
            tail_blocks.shape[1],
            splits,
            *limits,
            ROWS=max(_MIN_ROWS, triton.next_power_of_2(heads // key_heads)),
            **schedule(4),
            **constants,
        )
    combine_splits_kernel[(batch * heads,)](
        partial,
        lse,
        out,
        splits,
        SPLITS=triton.next_power_of_2(splits),
        D=head_dim,
        BLOCK_D=head_block(head_dim),
        **schedule(4),
    )
    return out


def _query_tile(heads: int, share: int, element_size: int) -> tuple[int, int]:
    """Rows of a query tile, and how many sequences fit into it.

    Args:
        heads: query heads of a key head.
        share: sequences of a prompt, on average.
    """
    wanted = min(heads * share, _MAX_ROWS[element_size])
    rows = triton.next_power_of_2(max(_MIN_ROWS, wanted, heads))
    return rows, rows // heads


def _splits(blocks: int, programs: int, device: torch.device) -> int:
    """Into how many parts at most `blocks` blocks are read when `programs` read them whole.

    A power of two, which keeps the number of compiled variants small; 0 when there are no blocks.
    """
    if not blocks:
        return 0
    wanted = min(4 * num_processors(device) // programs, triton.cdiv(blocks, 2), _MAX_SPLITS)
    return 1 << (max(1, wanted).bit_length() - 1)


@triton.jit(do_not_specialize=["num_sequences", "num_columns", "num_splits", "scale", "window"])
def decode_prefix_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    prefix_blocks_ptr,
    prefix_lengths_ptr,
    group_ptr,
    tail_lengths_ptr,
    partial_ptr,
    lse_ptr,
    num_sequences,
    num_columns,
    num_splits,
    scale,
    window,
    ROWS: tl.constexpr,
    SEQUENCES: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * SEQUENCES
    key_head = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2).to(tl.int64)
    member = tl.arange(0, ROWS) // (H // K)
    heads = key_head * (H // K) + tl.arange(0, ROWS) % (H // K)
    valid = (member < SEQUENCES) & (first + member < num_sequences)
    rows = (first + member) * H + heads
    q = load_queries(q_ptr, rows, valid, D, BLOCK_D)
    groups = tl.load(group_ptr + first + member, mask=valid, other=-1)
    tails = tl.load(tail_lengths_ptr + first + member, mask=valid, other=0)

    scale = tl.cast(scale, tl.float32) * LOG2E
    out = tl.zeros((ROWS, BLOCK_D), tl.float32)
    top = tl.full((ROWS,), LOWEST, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    for leader in range(0, tl.minimum(num_sequences - first, SEQUENCES).to(tl.int32)):
        group = tl.load(group_ptr + first + leader)
        in_group = groups == group
        length = tl.load(prefix_lengths_ptr + group)
        blocks_ptr = prefix_blocks_ptr + group.to(tl.int64) * num_columns
        # The first sequence of a group in this tile reads the prompt, for all of them.
        read_before = tl.max((in_group & (member < leader)).to(tl.int32), axis=0) > 0
        # A query sees positions from `oldest` on.
        oldest = tl.where(in_group, tl.maximum(length + tails - window, 0), length)
        begin, end = part(tl.min(oldest, axis=0), length, split, tl.num_programs(2), BLOCK_N)
        end = tl.where(read_before, begin, end)
        for index in range(begin, end, BLOCK_N):
            k, v = load_keys(k_ptr, v_ptr, blocks_ptr, index, end, key_head, K, D, BLOCK_D, BLOCK_N)
            keys = index + tl.arange(0, BLOCK_N)[None, :]
            seen = in_group[:, None] & (keys >= oldest[:, None]) & (keys < end)
            scores = tl.where(seen, dot(q, k, None, PRECISION), float("-inf"))
            out, top, total = softmax_step(scores, scale, v, out, top, total, PRECISION)
    store_partial(
        partial_ptr,
        lse_ptr,
        rows * num_splits + split,
        valid,
        out,
        top,
        total,
        D,
        BLOCK_D,
    )


@triton.jit(do_not_specialize=["num_columns", "num_splits", "scale", "window"])
def decode_tail_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    tail_blocks_ptr,
    tail_lengths_ptr,
    partial_ptr,
    lse_ptr,
    num_columns,
    num_splits,
    scale,
    window,
    ROWS: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    sequence = tl.program_id(0).to(tl.int64)
    key_head = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2).to(tl.int64)
    member = tl.arange(0, ROWS)
    valid = member < H // K
    rows = sequence * H + key_head * (H // K) + member
    q = load_queries(q_ptr, rows, valid, D, BLOCK_D)

    scale = tl.cast(scale, tl.float32) * LOG2E
    out = tl.zeros((ROWS, BLOCK_D), tl.float32)
    top = tl.full((ROWS,), LOWEST, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    blocks_ptr = tail_blocks_ptr + sequence * num_columns
    length = tl.load(tail_lengths_ptr + sequence)
    oldest = tl.maximum(length - window, 0)
    begin, end = part(oldest, length, split, tl.num_programs(2), BLOCK_N)
    for index in range(begin, end, BLOCK_N):
        k, v = load_keys(k_ptr, v_ptr, blocks_ptr, index, end, key_head, K, D, BLOCK_D, BLOCK_N)
        keys = index + tl.arange(0, BLOCK_N)[None, :]
        seen = (keys >= oldest) & (keys < end)
        scores = tl.where(seen, dot(q, k, None, PRECISION), float("-inf"))
        out, top, total = softmax_step(scores, scale, v, out, top, total, PRECISION)
    # The splits of the tail come after those of the prefix.
    place = rows * num_splits + num_splits - tl.num_programs(2) + split
    store_partial(partial_ptr, lse_ptr, place, valid, out, top, total, D, BLOCK_D)


@triton.jit(do_not_specialize=["num_splits"])
def combine_splits_kernel(
    partial_ptr,
    lse_ptr,
    out_ptr,
    num_splits,
    SPLITS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    splits = tl.arange(0, SPLITS)
    columns = tl.arange(0, BLOCK_D)
    used = splits < num_splits
    lse = tl.load(lse_ptr + row * num_splits + splits, mask=used, other=float("-inf"))
    # Splits without a key have an lse of -inf, and LOWEST keeps their weight at exp2(-inf).
    weights = tl.exp2(lse - tl.maximum(tl.max(lse, axis=0), LOWEST))
    offsets = (row * num_splits + splits)[:, None] * D + columns[None, :]
    mask = used[:, None] & (columns < D)[None, :]
    partial = tl.load(partial_ptr + offsets, mask=mask, other=0.0)
    out = tl.sum(partial * weights[:, None], axis=0) / tl.sum(weights, axis=0)
    tl.store(out_ptr + row * D + columns, narrow(out, out_ptr.dtype.element_ty), mask=columns < D)


@triton.jit
def load_queries(q_ptr, rows, valid, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of q, zeros where not valid."""
    columns = tl.arange(0, BLOCK_D)[None, :]
    mask = valid[:, None] & (columns < D)
    return tl.load(q_ptr + rows[:, None] * D + columns, mask=mask, other=0.0)


@triton.jit
def load_keys(
    k_ptr,
    v_ptr,
    blocks_ptr,
    index,
    end,
    key_head,
    K: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Keys [BLOCK_D, BLOCK_N] and values [BLOCK_N, BLOCK_D] of a run's tokens from `index` on.

    The index is a multiple of BLOCK_N, so they lie in one block. Past `end` there are zeros for
    values, which no weight makes finite again, but any number for keys.
    """
    column = index // BLOCK
    place = tl.multiple_of(index - column * BLOCK, BLOCK_N)
    block = tl.load(blocks_ptr + column).to(tl.int64)
    head = (block * K + key_head) * (D * BLOCK)
    k = load_rows(k_ptr + head + place, D, BLOCK, BLOCK_D, BLOCK_N, BLOCK_N, BLOCK_D != D)
    v = load_rows(v_ptr + head + place * D, end - index, D, BLOCK_N, D, BLOCK_D, True)
    return k, v


@triton.jit
def part(first, end, split, num_splits, BLOCK_N: tl.constexpr):
    """The split-th of num_splits parts of first..end, in tiles that start at multiples of BLOCK_N;
    empty past the end."""
    tile = tl.minimum(first, end) // BLOCK_N
    tiles = tl.cdiv(tl.cdiv(end, BLOCK_N) - tile, num_splits)
    begin = (tile + split.to(tl.int32) * tiles) * BLOCK_N
    return begin, tl.minimum(begin + tiles * BLOCK_N, end)


@triton.jit
def store_partial(
    partial_ptr,
    lse_ptr,
    places,
    valid,
    out,
    top,
    total,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Stores the softmax of one split and its log2-sum-exp: 0 and -inf when it had no key."""
    columns = tl.arange(0, BLOCK_D)[None, :]
    out = out / tl.where(total > 0, total, 1.0)[:, None]
    mask = valid[:, None] & (columns < D)
    tl.store(partial_ptr + places[:, None] * D + columns, out, mask=mask)
    tl.store(lse_ptr + places, top + tl.log2(total), mask=valid)

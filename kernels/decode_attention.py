"""Attention of one new token per sequence over the KV cache (split-KV, as in Flash-Decoding).

The cache is a prompt per group and a tail per sequence. Keys are read in *splits*, so that few
sequences still fill the GPU; each split leaves a partial softmax, and a last kernel combines them.
All query heads of a key head share each tile of keys. In the prompts, so do the sequences of a
group: a tile of sequences reads each of its prompts once. The grid depends on shapes only, and
every length is read on the device: nothing waits for the host, and a CUDA graph can replay it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import is_cuda, num_processors, on_tensor_device, schedule
from .numerics import LOG2E, LOWEST, dot, dot_precision, narrow
from .tiles import NO_WINDOW, head_block, load_rows, softmax_step

# Rows (sequences x heads) of a query tile: what a tensor core takes, and what registers hold of
# elements of 2 and of 4 bytes.
_MIN_ROWS = 16
_MAX_ROWS = {2: 64, 4: 32}
_MAX_SPLITS = 32


@on_tensor_device
def forward(
    q: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    prefix_starts: Tensor,
    group: Tensor,
    tail_k: Tensor,
    tail_v: Tensor,
    tail_rows: Tensor,
    tail_lengths: Tensor,
    scale: float,
    window: int,
) -> Tensor:
    """Attend from the newest token of each sequence to its prompt and its tail.

    Args:
        q: [B, H, D].
        prefix_k, prefix_v: [Tp, K, D], the prompts one after another.
        prefix_starts: first row of each prompt, and Tp at the end [G + 1], int32.
        group: prompt of each sequence [B], int32; fastest when equal ones are neighbours.
        tail_k, tail_v: [R, M, K, D]; the new token's key and value are in.
        tail_rows: row of the tails for each sequence [B], int32.
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
    key_heads = tail_k.shape[2]
    share = triton.cdiv(batch, max(1, prefix_starts.numel() - 1))
    rows, sequences = _query_tile(heads // key_heads, share, q.element_size())
    tiles = triton.cdiv(batch, sequences)
    prefix_splits = _splits(prefix_k.shape[0], tiles * key_heads, q.device)
    tail_splits = _splits(tail_k.shape[1], batch * key_heads, q.device)
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
            prefix_k,
            prefix_v,
            prefix_starts,
            group,
            tail_lengths,
            partial,
            lse,
            batch,
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
            tail_k,
            tail_v,
            tail_rows,
            tail_lengths,
            tail_k.shape[1],
            partial,
            lse,
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


def _splits(keys: int, programs: int, device: torch.device) -> int:
    """Into how many parts at most `keys` keys are read when there are `programs` without splits.

    A power of two, which keeps the number of compiled variants small; 0 when there are no keys.
    """
    if not keys:
        return 0
    wanted = min(4 * num_processors(device) // programs, triton.cdiv(keys, 128), _MAX_SPLITS)
    return 1 << (max(1, wanted).bit_length() - 1)


@triton.jit(do_not_specialize=["num_sequences", "num_splits", "scale", "window"])
def decode_prefix_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    prefix_starts_ptr,
    group_ptr,
    tail_lengths_ptr,
    partial_ptr,
    lse_ptr,
    num_sequences,
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
        start = tl.load(prefix_starts_ptr + group).to(tl.int64)
        length = tl.load(prefix_starts_ptr + group + 1) - start
        # The first sequence of a group in this tile reads the prompt, for all of them.
        read_before = tl.max((in_group & (member < leader)).to(tl.int32), axis=0) > 0
        # A query sees positions from `oldest` on.
        oldest = tl.where(in_group, tl.maximum(length + tails - window, 0), length)
        begin, end = part(
            tl.minimum(tl.min(oldest, axis=0), length),
            length,
            split,
            tl.num_programs(2),
            BLOCK_N,
        )
        end = tl.where(read_before, begin, end)
        for index in range(begin, end, BLOCK_N):
            offset = ((start + index) * K + key_head) * D
            k = load_rows(k_ptr + offset, end - index, K * D, BLOCK_N, D, BLOCK_D, True)
            v = load_rows(v_ptr + offset, end - index, K * D, BLOCK_N, D, BLOCK_D, True)
            keys = index + tl.arange(0, BLOCK_N)[None, :]
            seen = in_group[:, None] & (keys >= oldest[:, None]) & (keys < end)
            scores = tl.where(seen, dot(q, tl.trans(k), None, PRECISION), float("-inf"))
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


@triton.jit(do_not_specialize=["tail_capacity", "num_splits", "scale", "window"])
def decode_tail_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    tail_rows_ptr,
    tail_lengths_ptr,
    tail_capacity,
    partial_ptr,
    lse_ptr,
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
    start = tl.load(tail_rows_ptr + sequence).to(tl.int64) * tail_capacity
    length = tl.load(tail_lengths_ptr + sequence)
    begin, end = part(tl.maximum(length - window, 0), length, split, tl.num_programs(2), BLOCK_N)
    for index in range(begin, end, BLOCK_N):
        offset = ((start + index) * K + key_head) * D
        k = load_rows(k_ptr + offset, end - index, K * D, BLOCK_N, D, BLOCK_D, True)
        v = load_rows(v_ptr + offset, end - index, K * D, BLOCK_N, D, BLOCK_D, True)
        seen = index + tl.arange(0, BLOCK_N)[None, :] < end
        scores = tl.where(seen, dot(q, tl.trans(k), None, PRECISION), float("-inf"))
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
def part(first, end, split, num_splits, BLOCK: tl.constexpr):
    """The split-th of num_splits parts of first..end, in whole blocks; empty past the end."""
    blocks = tl.cdiv(tl.cdiv(end - first, BLOCK), num_splits)
    begin = tl.minimum(first + split * blocks * BLOCK, end)
    return begin, tl.minimum(begin + blocks * BLOCK, end)


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

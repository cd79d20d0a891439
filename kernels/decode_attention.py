"""Attention of one new token per sequence over the KV cache (split-KV, as in Flash-Decoding).

The cache is blocks of 64 tokens: some belong to a prompt, some to a sequence's tail. A run of
tokens is read in *splits*, each by a program of its own that leaves a partial softmax, and a second
kernel combines them. How a run is divided depends on its length alone: a long tail is many
programs, and a sequence gets the same numbers in any company. All query heads of a key head share
each tile of keys; in a prompt, so do the neighbouring sequences that continue it. The grid depends
on shapes only, and every length is read on the device: nothing waits for the host, and a CUDA graph
can replay it.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.backends.compiler import GPUTarget

from .configs import config
from .decode_runs import BLOCK, MOST_SPLITS, SPLIT, block_of, of_neighbours, of_one, split_size
from .launch import launch, on_tensor_device, target
from .numerics import LOG2E, LOWEST, dot, dot_precision, narrow
from .tiles import NO_WINDOW, head_block, load_rows, softmax_step

# Rows (sequences x heads) of a query tile that a tensor core takes.
_MIN_ROWS = 16

TUNABLE = {
    "decode_splits_kernel": {
        "ROWS": (16, 32, 64),
        "BLOCK_N": (32, 64),
        "num_warps": (2, 4, 8),
        "num_stages": (1, 2, 3, 4),
    },
    "combine_splits_kernel": {"num_warps": (1, 2, 4)},
}


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
        group: prompt of each sequence [B], int32; a prompt is read once for neighbours.
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
    key_heads, prefix_columns = keys.shape[1], prefix_blocks.shape[1]
    prefix_splits, tail_splits = _splits(prefix_columns), _splits(tail_blocks.shape[1])
    splits = prefix_splits + tail_splits
    share = -(-batch // prefix_lengths.numel()) if prefix_splits else 1
    partial = torch.empty((batch, heads, splits, head_dim), dtype=torch.float32, device=q.device)
    lse = torch.empty((batch, heads, splits), dtype=torch.float32, device=q.device)
    launch(
        decode_splits_kernel,
        (batch * splits * key_heads,),
        q,
        keys,
        values,
        prefix_blocks,
        prefix_lengths,
        group,
        tail_blocks,
        tail_lengths,
        partial,
        lse,
        batch,
        prefix_columns,
        tail_blocks.shape[1],
        prefix_splits,
        tail_splits,
        scale,
        window or NO_WINDOW,
        SHARED=prefix_splits > 0,
        **_constants(target(), q.dtype, heads, key_heads, head_dim, share),
    )
    lengths = prefix_lengths, group, tail_lengths
    _combine(partial, lse, *lengths, out, prefix_splits, tail_splits)
    return out


def _combine(
    partial: Tensor,
    lse: Tensor,
    prefix_lengths: Tensor,
    group: Tensor,
    tail_lengths: Tensor,
    out: Tensor,
    prefix_splits: int,
    tail_splits: int,
) -> None:
    batch, heads, head_dim = out.shape
    launch(
        combine_splits_kernel,
        (batch * heads,),
        partial,
        lse,
        prefix_lengths,
        group,
        tail_lengths,
        out,
        prefix_splits,
        tail_splits,
        SPLITS=_power_of_two(prefix_splits + tail_splits),
        H=heads,
        D=head_dim,
        BLOCK_D=head_block(head_dim),
        **config("combine_splits_kernel", out.dtype, head_dim),
    )


def _splits(columns: int) -> int:
    """Splits that a run of so many blocks needs at most."""
    return min(-(-columns * BLOCK.value // SPLIT.value), MOST_SPLITS.value)


@functools.cache
def _constants(
    _gpu: GPUTarget, dtype: torch.dtype, heads: int, key_heads: int, head_dim: int, share: int
) -> dict[str, object]:
    """Constants of `decode_splits_kernel`.

    Args:
        share: sequences of a prompt, on average: the rows of a tile should hold them.
    """
    chosen = config("decode_splits_kernel", dtype, head_dim)
    of_key = heads // key_heads
    wanted = max(_MIN_ROWS, min(of_key * share, chosen["ROWS"]), of_key)
    return {
        "ROWS": _power_of_two(wanted),
        "TAIL_ROWS": max(_MIN_ROWS, _power_of_two(of_key)),
        "H": heads,
        "K": key_heads,
        "D": head_dim,
        "BLOCK_D": head_block(head_dim),
        "BLOCK_N": chosen["BLOCK_N"],
        "PRECISION": dot_precision(dtype),
        "num_warps": chosen["num_warps"],
        "num_stages": chosen["num_stages"],
    }


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


@triton.jit(
    do_not_specialize=[
        "num_sequences", "prefix_columns", "tail_columns", "prefix_splits", "tail_splits",
        "scale", "window",
    ]
)  # fmt: skip
def decode_splits_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    prefix_blocks_ptr,
    prefix_lengths_ptr,
    group_ptr,
    tail_blocks_ptr,
    tail_lengths_ptr,
    partial_ptr,
    lse_ptr,
    num_sequences,
    prefix_columns,
    tail_columns,
    prefix_splits,
    tail_splits,
    scale,
    window,
    SHARED: tl.constexpr,
    ROWS: tl.constexpr,
    TAIL_ROWS: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One split of a run of tokens, for one key head: of the tail of a sequence, or of the prompt
    of neighbours. Programs of the key heads of a token are neighbours, as their keys are."""
    program = tl.program_id(0).to(tl.int64)
    key_head, place = program % K, (program // K).to(tl.int32)
    splits = prefix_splits + tail_splits
    scale = tl.cast(scale, tl.float32) * LOG2E
    # The prompts come first: their programs take longest.
    prompts = num_sequences * prefix_splits
    if ROWS == TAIL_ROWS:
        # One piece of code, and of shared memory, for both.
        if SHARED and place < prompts:
            run = of_neighbours(
                prefix_lengths_ptr, group_ptr, tail_lengths_ptr, place, key_head, num_sequences,
                prefix_columns, prefix_splits, splits, window, ROWS, H, K,
            )  # fmt: skip
        else:
            run = of_one(
                tail_lengths_ptr, place - prompts, key_head, tail_columns, tail_splits,
                splits, window, ROWS, H, K,
            )  # fmt: skip
        attend(
            q_ptr, k_ptr, v_ptr, prefix_blocks_ptr, tail_blocks_ptr, partial_ptr, lse_ptr, run,
            key_head, scale,
            ROWS, K, D, BLOCK_D, BLOCK_N, PRECISION,
        )  # fmt: skip
    elif place < prompts:
        attend(
            q_ptr, k_ptr, v_ptr, prefix_blocks_ptr, tail_blocks_ptr, partial_ptr, lse_ptr,
            of_neighbours(
                prefix_lengths_ptr, group_ptr, tail_lengths_ptr, place, key_head, num_sequences,
                prefix_columns, prefix_splits, splits, window, ROWS, H, K,
            ),
            key_head, scale, ROWS, K, D, BLOCK_D, BLOCK_N, PRECISION,
        )  # fmt: skip
    else:
        attend(
            q_ptr, k_ptr, v_ptr, prefix_blocks_ptr, tail_blocks_ptr, partial_ptr, lse_ptr,
            of_one(
                tail_lengths_ptr, place - prompts, key_head, tail_columns, tail_splits,
                splits, window, TAIL_ROWS, H, K,
            ),
            key_head, scale, TAIL_ROWS, K, D, BLOCK_D, BLOCK_N, PRECISION,
        )  # fmt: skip


@triton.jit
def attend(
    q_ptr,
    k_ptr,
    v_ptr,
    prefix_blocks_ptr,
    tail_blocks_ptr,
    partial_ptr,
    lse_ptr,
    run,
    key_head,
    scale,
    ROWS: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Stores the softmax of rows of q over a split of a run, and its log2-sum-exp: 0 and -inf where
    a row sees no token of it. Nothing is stored of an empty split."""
    of_prompt, table, begin, end, seen, rows, valid, oldest, places = run
    if begin < end:
        out, top, total = read(
            q_ptr, k_ptr, v_ptr, prefix_blocks_ptr + table, tail_blocks_ptr + table, of_prompt,
            tl.maximum(begin, seen // BLOCK_N * BLOCK_N), end, rows, valid, oldest, key_head, scale,
            ROWS, K, D, BLOCK_D, BLOCK_N, PRECISION,
        )  # fmt: skip
        columns = tl.arange(0, BLOCK_D)[None, :]
        out = out / tl.where(total > 0, total, 1.0)[:, None]
        mask = valid[:, None] & (columns < D)
        tl.store(partial_ptr + places[:, None] * D + columns, out, mask=mask)
        tl.store(lse_ptr + places, top + tl.log2(total), mask=valid)


@triton.jit
def read(
    q_ptr,
    k_ptr,
    v_ptr,
    prefix_blocks_ptr,
    tail_blocks_ptr,
    of_prompt,
    begin,
    end,
    rows,
    valid,
    oldest,
    key_head,
    scale,
    ROWS: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The streaming softmax of rows over tokens: sum of p v [ROWS, BLOCK_D], maximum, sum of p."""
    columns = tl.arange(0, BLOCK_D)[None, :]
    q = tl.load(q_ptr + rows[:, None] * D + columns, mask=valid[:, None] & (columns < D), other=0.0)
    out = tl.zeros((ROWS, BLOCK_D), tl.float32)
    top = tl.full((ROWS,), LOWEST, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    last = end - 1
    place = tl.minimum(begin, last) // BLOCK
    block = block_of(prefix_blocks_ptr, tail_blocks_ptr, of_prompt, place)
    for index in range(begin, end, BLOCK_N):
        # Where the next tile lies is asked for while this one is on its way.
        place = tl.minimum(index + BLOCK_N, last) // BLOCK
        following = block_of(prefix_blocks_ptr, tail_blocks_ptr, of_prompt, place)
        head = (block.to(tl.int64) * K + key_head) * (D * BLOCK)
        place = tl.multiple_of(index - index // BLOCK * BLOCK, BLOCK_N)
        k = load_rows(k_ptr + head + place, D, BLOCK, BLOCK_D, BLOCK_N, BLOCK_N, BLOCK_D != D)
        # Zeros past the end, since no weight makes any number there finite; keys may be anything.
        v = load_rows(v_ptr + head + place * D, end - index, D, BLOCK_N, D, BLOCK_D, True)
        tokens = index + tl.arange(0, BLOCK_N)[None, :]
        seen = (tokens >= oldest[:, None]) & (tokens < end)
        scores = tl.where(seen, dot(q, k, None, PRECISION), float("-inf"))
        out, top, total = softmax_step(scores, scale, v, out, top, total, PRECISION)
        block = following
    return out, top, total


@triton.jit(do_not_specialize=["prefix_splits", "tail_splits"])
def combine_splits_kernel(
    partial_ptr,
    lse_ptr,
    prefix_lengths_ptr,
    group_ptr,
    tail_lengths_ptr,
    out_ptr,
    prefix_splits,
    tail_splits,
    SPLITS: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    sequence = row // H
    prompt = 0
    if prefix_splits > 0:
        prompt = tl.load(prefix_lengths_ptr + tl.load(group_ptr + sequence))
    tail = tl.load(tail_lengths_ptr + sequence)
    splits = tl.arange(0, SPLITS)
    # What lies past a run's length was not written.
    in_prompt = (splits < prefix_splits) & (splits * split_size(prompt) < prompt)
    after = splits - prefix_splits
    in_tail = (after >= 0) & (after < tail_splits) & (after * split_size(tail) < tail)
    used = in_prompt | in_tail

    columns = tl.arange(0, BLOCK_D)
    places = row * (prefix_splits + tail_splits) + splits
    lse = tl.load(lse_ptr + places, mask=used, other=float("-inf"))
    mask = used[:, None] & (columns < D)[None, :]
    partial = tl.load(partial_ptr + places[:, None] * D + columns[None, :], mask=mask, other=0.0)
    # Splits without a key have an lse of -inf, and LOWEST keeps their weight at exp2(-inf).
    weights = tl.exp2(lse - tl.maximum(tl.max(lse, axis=0), LOWEST))
    out = tl.sum(partial * weights[:, None], axis=0) / tl.sum(weights, axis=0)
    tl.store(out_ptr + row * D + columns, narrow(out, out_ptr.dtype.element_ty), mask=columns < D)

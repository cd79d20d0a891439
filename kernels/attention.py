"""Causal grouped-query attention on the packed, prefix-shared layout (FlashAttention-2, Dao 2023).

A program owns one tile of queries (forward, dq) or of keys (dk, dv) of one segment, and walks over
the spans of the other side (see `spans.py`): first over the blocks that are visible whole, then
over those that need a mask. The gradient of a key is summed over query heads and segments in one
program, in a fixed order: the backward pass needs no atomics and is deterministic.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import on_tensor_device, schedule
from .numerics import LN2, LOG2E, LOWEST, dot, dot_precision, narrow
from .spans import (
    first_span,
    key_span,
    load_positions,
    nth_block,
    query_span,
    visible,
)
from .tiles import NO_WINDOW, head_block, load_rows, softmax_step, store_rows
from .tilings import Tiling, dkdv_tiling, dq_tiling, forward_tiling


@on_tensor_device
def forward(
    q: Tensor, k: Tensor, v: Tensor, layout: Any, scale: float, window: int
) -> tuple[Tensor, Tensor]:
    """Attend from every query row of the layout.

    Args:
        q: [N, H, D], one row for each of `layout.query_rows`.
        k, v: [T, K, D]; query head h reads key head h // (H // K).
        layout: a `PackedLayout`.
        scale: factor of the scores, > 0.
        window: a query at position p sees positions > p - window; 0 for all.

    Returns:
        out [N, H, D], and the log-sum-exp of each query's scores [N, H], fp32, natural log.
    """
    queries, heads = q.shape[:2]
    out = torch.empty_like(q)
    lse = torch.empty((queries, heads), dtype=torch.float32, device=q.device)
    tiling = forward_tiling(q, layout)
    tiles = layout.query_tiles(tiling.queries)
    if queries:
        attention_forward_kernel[(tiles.shape[0], heads)](
            q,
            k,
            v,
            out,
            lse,
            tiles,
            *_queries_of(layout),
            scale,
            window or NO_WINDOW,
            **_constants(q, k, tiling),
        )
    return out, lse


@on_tensor_device
def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    layout: Any,
    scale: float,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q [N, H, D], k and v [T, K, D]; a key that nobody sees gets exactly 0."""
    queries, heads = q.shape[:2]
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    # rowsum(dout * out), which the kernel of dq leaves for the kernel of dk and dv.
    delta = torch.empty_like(lse)
    window = window or NO_WINDOW
    tiling = dq_tiling(q, layout)
    tiles = layout.query_tiles(tiling.queries)
    if queries:
        attention_dq_kernel[(tiles.shape[0], heads)](
            q,
            k,
            v,
            out,
            lse,
            dout,
            delta,
            dq,
            tiles,
            *_queries_of(layout),
            scale,
            window,
            **_constants(q, k, tiling),
        )
    tiling = dkdv_tiling(q)
    tiles = layout.key_tiles(tiling.keys)
    if k.numel():
        attention_dkdv_kernel[(tiles.shape[0], k.shape[1])](
            q,
            k,
            v,
            lse,
            dout,
            delta,
            dk,
            dv,
            tiles,
            *_queries_of(layout),
            layout.children_starts,
            layout.children,
            scale,
            window,
            **_constants(q, k, tiling),
        )
    return dq, dk, dv


def _queries_of(layout: Any) -> tuple[Tensor, ...]:
    return (
        layout.starts,
        layout.prefix,
        layout.positions,
        layout.query_rows,
        layout.query_starts,
    )


def _constants(q: Tensor, k: Tensor, tiling: Tiling) -> dict[str, Any]:
    """Compile-time arguments: of the model and the machine, never of the batch."""
    return {
        "H": q.shape[1],
        "K": k.shape[1],
        "D": q.shape[2],
        "BLOCK_D": head_block(q.shape[2]),
        "BLOCK_M": tiling.queries,
        "BLOCK_N": tiling.keys,
        "PRECISION": dot_precision(q.dtype),
        **schedule(tiling.warps, tiling.stages),
    }


@triton.jit(do_not_specialize=["scale", "window"])
def attention_forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    tiles_ptr,
    starts_ptr,
    prefix_ptr,
    positions_ptr,
    query_rows_ptr,
    query_starts_ptr,
    scale,
    window,
    H: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # The last tiles of a segment see the most keys: they go first.
    tile = tl.num_programs(0) - 1 - tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    segment = tl.load(tiles_ptr + 2 * tile)
    first = tl.load(tiles_ptr + 2 * tile + 1).to(tl.int64)
    count = tl.load(query_starts_ptr + segment + 1) - first
    positions = load_positions(query_rows_ptr + first, positions_ptr, count, BLOCK_M)
    oldest, newest = (
        tl.load(positions_ptr + tl.load(query_rows_ptr + first)),
        tl.max(positions),
    )

    q = load_rows(q_ptr + (first * H + head) * D, count, H * D, BLOCK_M, D, BLOCK_D, True)
    key_head = head // (H // K) * D
    scale = tl.cast(scale, tl.float32) * LOG2E
    out = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    top = tl.full((BLOCK_M,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for own in range(first_span(segment, prefix_ptr), 2):
        row, position, end, blocks, leading, whole = key_span(
            own, segment, oldest, newest, window, starts_ptr, prefix_ptr, BLOCK_N
        )
        for MASKED in tl.static_range(2):
            for index in range(0, blocks - whole if MASKED else whole):
                step = nth_block(index, leading, whole, MASKED) * BLOCK_N
                offset, left = (row + step) * (K * D) + key_head, end - position - step
                k = load_rows(k_ptr + offset, left, K * D, BLOCK_N, D, BLOCK_D, MASKED)
                v = load_rows(v_ptr + offset, left, K * D, BLOCK_N, D, BLOCK_D, MASKED)
                scores = dot(q, tl.trans(k), None, PRECISION)
                if MASKED:
                    key_positions = position + step + tl.arange(0, BLOCK_N)
                    seen = visible(positions[:, None], key_positions[None, :], window)
                    scores = tl.where(seen & (key_positions < end)[None, :], scores, float("-inf"))
                out, top, total = softmax_step(scores, scale, v, out, top, total, PRECISION)

    rows = tl.arange(0, BLOCK_M)
    lse = (top + tl.log2(total)) * LN2
    tl.store(lse_ptr + first * H + head + rows * H, lse, mask=rows < count)
    out = out / total[:, None]
    store_rows(out_ptr + (first * H + head) * D, out, count, H * D, BLOCK_M, D, BLOCK_D)


@triton.jit(do_not_specialize=["scale", "window"])
def attention_dq_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    dout_ptr,
    delta_ptr,
    dq_ptr,
    tiles_ptr,
    starts_ptr,
    prefix_ptr,
    positions_ptr,
    query_rows_ptr,
    query_starts_ptr,
    scale,
    window,
    H: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tile = tl.num_programs(0) - 1 - tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    segment = tl.load(tiles_ptr + 2 * tile)
    first = tl.load(tiles_ptr + 2 * tile + 1).to(tl.int64)
    count = tl.load(query_starts_ptr + segment + 1) - first
    positions = load_positions(query_rows_ptr + first, positions_ptr, count, BLOCK_M)
    oldest, newest = (
        tl.load(positions_ptr + tl.load(query_rows_ptr + first)),
        tl.max(positions),
    )

    rows = tl.arange(0, BLOCK_M)
    row_offsets = first * H + head + rows * H
    tile_offset = (first * H + head) * D
    q = load_rows(q_ptr + tile_offset, count, H * D, BLOCK_M, D, BLOCK_D, True)
    dout = load_rows(dout_ptr + tile_offset, count, H * D, BLOCK_M, D, BLOCK_D, True)
    out = load_rows(out_ptr + tile_offset, count, H * D, BLOCK_M, D, BLOCK_D, True)
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), axis=1)
    tl.store(delta_ptr + row_offsets, delta, mask=rows < count)
    lse = tl.load(lse_ptr + row_offsets, mask=rows < count, other=0.0) * LOG2E

    key_head = head // (H // K) * D
    scale = tl.cast(scale, tl.float32)
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for own in range(first_span(segment, prefix_ptr), 2):
        row, position, end, blocks, leading, whole = key_span(
            own, segment, oldest, newest, window, starts_ptr, prefix_ptr, BLOCK_N
        )
        for MASKED in tl.static_range(2):
            for index in range(0, blocks - whole if MASKED else whole):
                step = nth_block(index, leading, whole, MASKED) * BLOCK_N
                offset, left = (row + step) * (K * D) + key_head, end - position - step
                k = load_rows(k_ptr + offset, left, K * D, BLOCK_N, D, BLOCK_D, MASKED)
                v = load_rows(v_ptr + offset, left, K * D, BLOCK_N, D, BLOCK_D, MASKED)
                scores = dot(q, tl.trans(k), None, PRECISION) * (scale * LOG2E)
                p = tl.exp2(scores - lse[:, None])
                if MASKED:
                    key_positions = position + step + tl.arange(0, BLOCK_N)
                    seen = visible(positions[:, None], key_positions[None, :], window)
                    p = tl.where(seen & (key_positions < end)[None, :], p, 0.0)
                ds = p * (dot(dout, tl.trans(v), None, PRECISION) - delta[:, None])
                dq = dot(narrow(ds, k.dtype), k, dq, PRECISION)
    store_rows(dq_ptr + tile_offset, dq * scale, count, H * D, BLOCK_M, D, BLOCK_D)


@triton.jit(do_not_specialize=["scale", "window"])
def attention_dkdv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    lse_ptr,
    dout_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    tiles_ptr,
    starts_ptr,
    prefix_ptr,
    positions_ptr,
    query_rows_ptr,
    query_starts_ptr,
    children_starts_ptr,
    children_ptr,
    scale,
    window,
    H: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tile = tl.program_id(0).to(tl.int64)
    key_head = tl.program_id(1).to(tl.int64)
    segment = tl.load(tiles_ptr + 2 * tile)
    row = tl.load(tiles_ptr + 2 * tile + 1).to(tl.int64)
    count = tl.minimum(tl.load(starts_ptr + segment + 1) - row, BLOCK_N).to(tl.int32)
    oldest = tl.load(positions_ptr + row)
    newest = oldest + count - 1

    tile_offset = (row * K + key_head) * D
    k = load_rows(k_ptr + tile_offset, count, K * D, BLOCK_N, D, BLOCK_D, True)
    v = load_rows(v_ptr + tile_offset, count, K * D, BLOCK_N, D, BLOCK_D, True)
    key_positions = oldest + tl.arange(0, BLOCK_N)
    rows = tl.arange(0, BLOCK_M)
    scale = tl.cast(scale, tl.float32)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    own = tl.load(children_starts_ptr + segment) - 1
    for edge in range(own, tl.load(children_starts_ptr + segment + 1)):
        # The segment itself, then the segments that continue it.
        source = tl.load(children_ptr + edge, mask=edge > own, other=0)
        source = tl.where(edge > own, source, segment)
        query, end, blocks, leading, whole = query_span(
            source,
            oldest,
            newest,
            window,
            starts_ptr,
            prefix_ptr,
            query_rows_ptr,
            query_starts_ptr,
            BLOCK_M,
        )
        for member in range(0, H // K):
            head = key_head * (H // K) + member
            for MASKED in tl.static_range(2):
                for index in range(0, blocks - whole if MASKED else whole):
                    first = query + nth_block(index, leading, whole, MASKED) * BLOCK_M
                    offset, left = first * H + head, end - first
                    q = load_rows(q_ptr + offset * D, left, H * D, BLOCK_M, D, BLOCK_D, MASKED)
                    dout = load_rows(
                        dout_ptr + offset * D, left, H * D, BLOCK_M, D, BLOCK_D, MASKED
                    )
                    in_span = rows < left
                    lse = tl.load(lse_ptr + offset + rows * H, mask=in_span, other=0.0) * LOG2E
                    delta = tl.load(delta_ptr + offset + rows * H, mask=in_span, other=0.0)
                    scores = dot(k, tl.trans(q), None, PRECISION) * (scale * LOG2E)
                    p = tl.exp2(scores - lse[None, :])
                    if MASKED:
                        positions = load_positions(
                            query_rows_ptr + first, positions_ptr, left, BLOCK_M
                        )
                        p = tl.where(
                            visible(positions[None, :], key_positions[:, None], window),
                            p,
                            0.0,
                        )
                    dv = dot(narrow(p, dout.dtype), dout, dv, PRECISION)
                    ds = p * (dot(v, tl.trans(dout), None, PRECISION) - delta[None, :])
                    dk = dot(narrow(ds, q.dtype), q, dk, PRECISION)
    store_rows(dk_ptr + tile_offset, dk * scale, count, K * D, BLOCK_N, D, BLOCK_D)
    store_rows(dv_ptr + tile_offset, dv, count, K * D, BLOCK_N, D, BLOCK_D)

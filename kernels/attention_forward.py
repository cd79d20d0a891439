"""The forward kernel of attention: a program owns one tile of queries of one head."""

from __future__ import annotations

import triton
import triton.language as tl

from .heads import fetch_heads, load_heads, over_channels, over_rows, store_heads, zero_heads
from .numerics import LN2, LOG2E, LOWEST
from .spans import block_of, keys_of, load_bounds, load_spans, query_tile, within


@triton.jit(do_not_specialize=["scale", "queries"])
def attention_forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    k_bulk,
    v_bulk,
    k_bulk_extra,
    v_bulk_extra,
    tiles_ptr,
    bounds_ptr,
    queries,
    scale,
    q_row,
    q_head,
    k_row,
    k_head,
    v_row,
    v_head,
    H: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EXTRA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
    BULK: tl.constexpr,
):
    record, first, count, head = query_tile(tiles_ptr, H)
    spans = load_spans(record)
    whole, masked = tl.load(record + 10), tl.load(record + 11)
    first_masked = tl.cdiv(spans[1] - spans[0], BLOCK_N) - spans[3]
    q_ptr += first * q_row + head * q_head
    q, q_extra = load_heads(q_ptr, q_row, count, BLOCK_M, D, BLOCK_D, EXTRA, True)
    key_head = head // (H // K)
    column = (key_head * D).to(tl.int32)
    scale = tl.cast(scale, tl.float32) * LOG2E
    out, out_extra = zero_heads(BLOCK_M, BLOCK_D, EXTRA)
    top = tl.full((BLOCK_M,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for MASKED in tl.static_range(2):
        if MASKED:
            low, high = load_bounds(bounds_ptr, queries, first, count, BLOCK_M)
            bounds_ptr += 2 * tl.cast(queries, tl.int64)
            root_low, root_high = load_bounds(bounds_ptr, queries, first, count, BLOCK_M)
        for index in range(0, masked if MASKED else whole):
            row, left = block_of(index, first_masked, spans, BLOCK_N, MASKED)
            if BULK:
                k, k_extra = fetch_heads(k_bulk, k_bulk_extra, row, column, BLOCK_D, EXTRA)
                v, v_extra = fetch_heads(v_bulk, v_bulk_extra, row, column, BLOCK_D, EXTRA)
            else:
                k_at = k_ptr + row.to(tl.int64) * k_row + key_head * k_head
                v_at = v_ptr + row.to(tl.int64) * v_row + key_head * v_head
                k, k_extra = load_heads(k_at, k_row, left, BLOCK_N, D, BLOCK_D, EXTRA, MASKED)
                v, v_extra = load_heads(v_at, v_row, left, BLOCK_N, D, BLOCK_D, EXTRA, MASKED)
            scores = over_channels(q, q_extra, k, k_extra, EXTRA, PRECISION)
            if MASKED:
                keys = keys_of(row, left, BLOCK_N)[None, :]
                seen = within(keys, low[:, None], high[:, None])
                seen |= within(keys, root_low[:, None], root_high[:, None])
                scores = tl.where(seen, scores, float("-inf"))
            new_top = tl.maximum(top, tl.max(scores, axis=1) * scale)
            p = tl.exp2(scores * scale - new_top[:, None])
            rescale = tl.exp2(top - new_top)
            total = total * rescale + tl.sum(p, axis=1)
            out = out * rescale[:, None]
            if EXTRA:
                out_extra = out_extra * rescale[:, None]
            out, out_extra = over_rows(p, v, v_extra, out, out_extra, EXTRA, PRECISION)
            top = new_top

    rows = tl.arange(0, BLOCK_M)
    total = tl.where(rows < count, total, 1.0)
    lse = (top + tl.log2(total)) * LN2
    lse_ptr += head * tl.cast(queries, tl.int64) + first
    tl.store(lse_ptr + rows, lse, mask=rows < count)
    out_ptr += (first * H + head) * D
    inverse = 1.0 / total[:, None]
    store_heads(
        out_ptr, out * inverse, out_extra * inverse, H * D, count, BLOCK_M, D, BLOCK_D, EXTRA
    )

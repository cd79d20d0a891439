"""The backward kernels of attention, in a fixed order of sums and without atomics.

One kernel owns a tile of queries and sums their gradient over keys; it leaves rowsum(dout * out),
which both need. The other owns a tile of keys and sums their gradients over query heads and
queries. Where that is too much for one program, several sum parts of it in fp32, and a third
kernel adds the parts. Together they multiply seven times for a block, where a single kernel would
need five, but neither adds to memory that another one writes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .heads import (
    fetch_heads,
    load_heads,
    over_channels,
    over_rows,
    store_heads,
    store_part,
    zero_heads,
)
from .numerics import LOG2E
from .spans import (
    PIECE,
    RUN,
    block_of,
    keys_of,
    load_bounds,
    load_piece,
    load_run,
    load_spans,
    nth_block,
    query_tile,
    within,
)


@triton.jit(do_not_specialize=["queries", "sums_row", "scale"])
def attention_dq_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    dout_ptr,
    sums_ptr,
    dq_ptr,
    k_bulk,
    v_bulk,
    k_bulk_extra,
    v_bulk_extra,
    tiles_ptr,
    bounds_ptr,
    queries,
    sums_row,
    scale,
    q_row,
    q_head,
    k_row,
    k_head,
    v_row,
    v_head,
    dout_row,
    dout_head,
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
    dout_ptr += first * dout_row + head * dout_head
    dout, dout_extra = load_heads(dout_ptr, dout_row, count, BLOCK_M, D, BLOCK_D, EXTRA, True)
    tile = (first * H + head) * D
    out, out_extra = load_heads(out_ptr + tile, H * D, count, BLOCK_M, D, BLOCK_D, EXTRA, True)
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), axis=1)
    if EXTRA:
        delta += tl.sum(dout_extra.to(tl.float32) * out_extra.to(tl.float32), axis=1)
    rows = tl.arange(0, BLOCK_M)
    lse_ptr += head * tl.cast(queries, tl.int64) + first
    lse = tl.load(lse_ptr + rows, mask=rows < count, other=0.0) * LOG2E
    sums_ptr += head * tl.cast(sums_row, tl.int64) + first
    tl.store(sums_ptr + rows, lse, mask=rows < count)
    sums_ptr += H * tl.cast(sums_row, tl.int64)
    tl.store(sums_ptr + rows, delta, mask=rows < count)

    key_head = head // (H // K)
    column = (key_head * D).to(tl.int32)
    scale = tl.cast(scale, tl.float32)
    dq, dq_extra = zero_heads(BLOCK_M, BLOCK_D, EXTRA)
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
            p = tl.exp2(scores * (scale * LOG2E) - lse[:, None])
            if MASKED:
                keys = keys_of(row, left, BLOCK_N)[None, :]
                seen = within(keys, low[:, None], high[:, None])
                seen |= within(keys, root_low[:, None], root_high[:, None])
                p = tl.where(seen, p, 0.0)
            dp = over_channels(dout, dout_extra, v, v_extra, EXTRA, PRECISION)
            ds = p * (dp - delta[:, None])
            dq, dq_extra = over_rows(ds, k, k_extra, dq, dq_extra, EXTRA, PRECISION)
    dq, dq_extra = dq * scale, dq_extra * scale
    store_heads(dq_ptr + tile, dq, dq_extra, H * D, count, BLOCK_M, D, BLOCK_D, EXTRA)


@triton.jit
def load_sums(sums_ptr, sums_row, head, first, count, H: tl.constexpr, BLOCK: tl.constexpr):
    """What the other kernel left of queries: their log-sum-exp, base 2, and rowsum(dout * out)."""
    rows = tl.arange(0, BLOCK)
    sums_row = tl.cast(sums_row, tl.int64)
    sums_ptr += head * sums_row + first + rows
    lse = tl.load(sums_ptr, mask=rows < count, other=0.0)
    delta = tl.load(sums_ptr + H * sums_row, mask=rows < count, other=0.0)
    return lse, delta


@triton.jit(do_not_specialize=["queries", "sums_row", "parts", "scale"])
def attention_dkdv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    sums_ptr,
    dk_ptr,
    dv_ptr,
    parts_ptr,
    q_bulk,
    dout_bulk,
    q_bulk_extra,
    dout_bulk_extra,
    sums_bulk,
    pieces_ptr,
    runs_ptr,
    bounds_ptr,
    queries,
    sums_row,
    parts,
    scale,
    q_row,
    q_head,
    k_row,
    k_head,
    v_row,
    v_head,
    dout_row,
    dout_head,
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
    program = tl.program_id(0)
    key_head = (program % K).to(tl.int64)
    record = pieces_ptr + (program // K).to(tl.int64) * PIECE
    row, count, first_run, last_run, first_head, heads, part, bounds = load_piece(record)
    k_ptr += row * k_row + key_head * k_head
    v_ptr += row * v_row + key_head * v_head
    k, k_extra = load_heads(k_ptr, k_row, count, BLOCK_N, D, BLOCK_D, EXTRA, True)
    v, v_extra = load_heads(v_ptr, v_row, count, BLOCK_N, D, BLOCK_D, EXTRA, True)
    bounds_ptr += bounds * tl.cast(queries, tl.int64)
    keys = row.to(tl.int32) + tl.arange(0, BLOCK_N)[:, None]
    scale = tl.cast(scale, tl.float32)
    dk, dk_extra = zero_heads(BLOCK_N, BLOCK_D, EXTRA)
    dv, dv_extra = zero_heads(BLOCK_N, BLOCK_D, EXTRA)
    for run in range(first_run, last_run):
        run_first, end, leading, whole, blocks = load_run(runs_ptr + run * RUN)
        for MASKED in tl.static_range(2):
            of_head = blocks - whole if MASKED else whole
            for index in range(0, heads * of_head):
                # All heads in one loop, so that its pipeline fills once.
                member = index // of_head
                block = nth_block(index - member * of_head, leading, whole, MASKED)
                query = run_first + block * BLOCK_M
                left = end - query
                head = key_head * (H // K) + first_head + member
                first = query.to(tl.int64)
                if BULK:
                    column = (head * D).to(tl.int32)
                    q, q_extra = fetch_heads(q_bulk, q_bulk_extra, query, column, BLOCK_D, EXTRA)
                    dout, dout_extra = fetch_heads(
                        dout_bulk, dout_bulk_extra, query, column, BLOCK_D, EXTRA
                    )
                    lse = sums_bulk.load([head.to(tl.int32), query]).reshape(BLOCK_M)
                    delta = sums_bulk.load([head.to(tl.int32) + H, query]).reshape(BLOCK_M)
                else:
                    q_at = q_ptr + first * q_row + head * q_head
                    q, q_extra = load_heads(q_at, q_row, left, BLOCK_M, D, BLOCK_D, EXTRA, MASKED)
                    dout_at = dout_ptr + first * dout_row + head * dout_head
                    dout, dout_extra = load_heads(
                        dout_at, dout_row, left, BLOCK_M, D, BLOCK_D, EXTRA, MASKED
                    )
                    lse, delta = load_sums(sums_ptr, sums_row, head, first, left, H, BLOCK_M)
                scores = over_channels(k, k_extra, q, q_extra, EXTRA, PRECISION)
                p = tl.exp2(scores * (scale * LOG2E) - lse[None, :])
                if MASKED:
                    low, high = load_bounds(bounds_ptr, queries, first, left, BLOCK_M)
                    p = tl.where(within(keys, low[None, :], high[None, :]), p, 0.0)
                dv, dv_extra = over_rows(p, dout, dout_extra, dv, dv_extra, EXTRA, PRECISION)
                dp = over_channels(v, v_extra, dout, dout_extra, EXTRA, PRECISION)
                ds = p * (dp - delta[None, :])
                dk, dk_extra = over_rows(ds, q, q_extra, dk, dk_extra, EXTRA, PRECISION)
    dk, dk_extra = dk * scale, dk_extra * scale
    if part < 0:
        tile = (row * K + key_head) * D
        store_heads(dk_ptr + tile, dk, dk_extra, K * D, count, BLOCK_N, D, BLOCK_D, EXTRA)
        store_heads(dv_ptr + tile, dv, dv_extra, K * D, count, BLOCK_N, D, BLOCK_D, EXTRA)
    else:
        parts_ptr += (part.to(tl.int64) * K + key_head) * (BLOCK_N * D)
        store_heads(parts_ptr, dk, dk_extra, D, count, BLOCK_N, D, BLOCK_D, EXTRA)
        parts_ptr += tl.cast(parts, tl.int64) * (K * BLOCK_N * D)
        store_heads(parts_ptr, dv, dv_extra, D, count, BLOCK_N, D, BLOCK_D, EXTRA)


@triton.jit(do_not_specialize=["parts"])
def attention_add_parts_kernel(
    dk_ptr,
    dv_ptr,
    parts_ptr,
    divided_ptr,
    parts,
    K: tl.constexpr,
    D: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Adds the parts of a few rows of a divided tile, of dk or of dv, first to last."""
    program = tl.program_id(0)
    strips: tl.constexpr = TILE_ROWS // ROWS
    strip, of_dv = program % strips, program // strips % 2
    key_head = (program // (2 * strips) % K).to(tl.int64)
    record = divided_ptr + (program // (2 * strips * K)).to(tl.int64) * 4
    row, count = tl.load(record).to(tl.int64), tl.load(record + 1)
    first, end = tl.load(record + 2), tl.load(record + 3)
    rows = strip * ROWS + tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, COLUMNS)[None, :]
    mask = (rows < count) & (columns < D)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    parts_ptr += of_dv.to(tl.int64) * parts * (K * TILE_ROWS * D)
    for part in range(first, end):
        tile = (tl.cast(part, tl.int64) * K + key_head) * (TILE_ROWS * D)
        total += tl.load(parts_ptr + tile + rows * D + columns, mask=mask, other=0.0)
    if of_dv:
        dk_ptr = dv_ptr
    store_part(
        dk_ptr + ((row + strip * ROWS) * K + key_head) * D,
        total,
        K * D,
        count - strip * ROWS,
        0,
        ROWS,
        D,
        COLUMNS,
    )

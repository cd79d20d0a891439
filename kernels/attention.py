"""Causal grouped-query attention on the packed, prefix-shared layout (FlashAttention-2, Dao 2023).

The kernels walk over blocks of keys (forward, gradient of queries) or of queries (gradients of keys
and values), first over those that are visible whole, then over those that need a mask. Who works on
what is decided once for a batch, on the host: see schedules.py. The backward pass sums in a fixed
order, without atomics, and is deterministic.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .attention_backward import (
    attention_add_parts_kernel,
    attention_dkdv_kernel,
    attention_dq_kernel,
)
from .attention_forward import attention_forward_kernel
from .configs import config
from .heads import head_parts
from .launch import is_cuda, launch, on_tensor_device, target
from .numerics import dot_precision
from .schedules import key_schedule, query_bounds, query_schedule

# Rows of any stride are read where they are, as long as a row's channels lie side by side.
READS_STRIDES = True

# Queries of a segment, on average, up to which tiles are made for few queries.
FEW = 16
# Rows from which bulk copies are worth what their descriptors cost the host.
BULK_ROWS = 2048

_TILES = {
    "BLOCK_M": (64, 128),
    "BLOCK_N": (32, 64, 128),
    "num_warps": (4, 8),
    "num_stages": (1, 2, 3),
}
_FEW_TILES = {"BLOCK_M": (16, 32), "BLOCK_N": (32, 64), "num_warps": (4,), "num_stages": (1, 2, 3)}
TUNABLE = {
    f"attention_{part}_{form}": _FEW_TILES if form == "few" else _TILES
    for part in ("forward", "dq", "dkdv")
    for form in ("plain", "bulk", "few")
}


def form_of(dtype: torch.dtype, head_dim: int, layout: Any) -> str:
    """Which form of the kernels serves: "few" queries, "bulk" copies of tiles, or "plain" loads."""
    if layout.num_queries <= FEW * layout.num_segments:
        return "few"
    if is_cuda(minimum_arch=90) and layout.total_tokens >= BULK_ROWS:
        return "bulk" if dtype.itemsize == 2 and sum(head_parts(head_dim)) == head_dim else "plain"
    return "plain"


def prepare(
    layout: Any,
    dtype: torch.dtype,
    heads: int,
    key_heads: int,
    head_dim: int,
    window: int,
    backward: bool,
) -> tuple[str, list[Tensor], list[Tensor]]:
    """Makes the tables of a layout that the kernels read, or finds them made.

    Returns:
        The form of the kernels, and the tables of the forward and of the backward pass.
    """
    wanted = "attention", dtype, heads, key_heads, head_dim, window, backward
    plan, *found = layout.kept.get(wanted, (None,))
    if plan is not None and plan is _plan(found[0], dtype, heads, key_heads, head_dim, target()):
        return found[0], found[1], found[2]
    form = form_of(dtype, head_dim, layout)
    plan = _plan(form, dtype, heads, key_heads, head_dim, target())
    (bounds,) = layout.schedule(
        f"attention bounds {window}", lambda host: query_bounds(host, window)[:1]
    )
    ahead, back = [_query_tiles(layout, plan.forward, window), bounds], []
    if backward:
        blocks, group = _blocks(plan.dkdv), heads // key_heads
        back = [_query_tiles(layout, plan.dq, window), bounds]
        back += layout.schedule(
            f"attention keys {blocks} {window} {group} {key_heads}",
            lambda host: key_schedule(host, *blocks, window, group, key_heads),
        )
    layout.kept[wanted] = plan, form, ahead, back
    return form, ahead, back


class Plan(NamedTuple):
    """Compile-time arguments of each kernel: of the model and the machine, never of the batch."""

    forward: dict[str, Any]
    dq: dict[str, Any]
    dkdv: dict[str, Any]


@functools.cache
def _plan(
    form: str, dtype: torch.dtype, heads: int, key_heads: int, head_dim: int, _target: Any
) -> Plan:
    block_d, extra = head_parts(head_dim)
    plan = []
    for part in Plan._fields:
        tuned = config(f"attention_{part}_{form}", dtype, head_dim)
        constants = {
            "H": heads,
            "K": key_heads,
            "D": head_dim,
            "BLOCK_D": block_d,
            "EXTRA": extra,
            "BLOCK_M": tuned["BLOCK_M"],
            "BLOCK_N": tuned["BLOCK_N"],
            "PRECISION": dot_precision(dtype),
            "BULK": form == "bulk",
            "num_warps": tuned["num_warps"],
            "num_stages": tuned["num_stages"],
        }
        plan.append(constants)
    return Plan(*plan)


def _query_tiles(layout: Any, constants: dict[str, Any], window: int) -> Tensor:
    blocks = _blocks(constants)
    (tiles,) = layout.schedule(
        f"attention queries {blocks} {window}", lambda host: query_schedule(host, *blocks, window)
    )
    return tiles


def _blocks(constants: dict[str, Any]) -> tuple[int, int]:
    return constants["BLOCK_M"], constants["BLOCK_N"]


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
        out [N, H, D], and the log-sum-exp of each query's scores [H, N], fp32, natural log.
    """
    sizes = q.shape[1], k.shape[1], q.shape[2]
    form, tables, _ = prepare(layout, q.dtype, *sizes, window, backward=False)
    return forward_tables(q, k, v, tables, scale, form)


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
    sizes = q.shape[1], k.shape[1], q.shape[2]
    form, _, tables = prepare(layout, q.dtype, *sizes, window, backward=True)
    return backward_tables(dout, q, k, v, out, lse, tables, scale, form)


@on_tensor_device
def forward_tables(
    q: Tensor, k: Tensor, v: Tensor, tables: list[Tensor], scale: float, form: str
) -> tuple[Tensor, Tensor]:
    """`forward` with the tables that `prepare` returned."""
    queries, heads, head_dim = q.shape
    out = torch.empty((queries, heads, head_dim), dtype=q.dtype, device=q.device)
    lse = torch.empty((heads, queries), dtype=torch.float32, device=q.device)
    tiles, bounds = tables
    if queries:
        constants = _plan(form, q.dtype, heads, k.shape[1], head_dim, target()).forward
        if constants["BULK"]:
            k, v = _bulk_ready(k), _bulk_ready(v)
        launch(
            attention_forward_kernel,
            (tiles.shape[0] * heads,),
            *(q, k, v, out, lse),
            *_descriptors(constants, constants["BLOCK_N"], k, v),
            *(tiles, bounds, queries, scale),
            *_strides(q, k, v),
            **constants,
        )
    return out, lse


@on_tensor_device
def backward_tables(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    tables: list[Tensor],
    scale: float,
    form: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """`backward` with the tables that `prepare` returned."""
    queries, heads, head_dim = q.shape
    total, key_heads = k.shape[:2]
    dq = torch.empty((queries, heads, head_dim), dtype=q.dtype, device=q.device)
    dk = torch.empty((total, key_heads, head_dim), dtype=k.dtype, device=k.device)
    dv = torch.empty_like(dk)
    tiles, bounds, pieces, runs, divided, parts = tables
    # For each head: the log-sum-exp, base 2, and rowsum(dout * out). Rows of whole 16 bytes.
    sums_row = -(-queries // 4) * 4
    sums = torch.empty((2 * heads, sums_row), dtype=torch.float32, device=q.device)
    plan = _plan(form, q.dtype, heads, key_heads, head_dim, target())
    if plan.dkdv["BULK"]:
        q, k, v, dout = (_bulk_ready(t) for t in (q, k, v, dout))
    if queries:
        constants = plan.dq
        launch(
            attention_dq_kernel,
            (tiles.shape[0] * heads,),
            *(q, k, v, out, lse, dout, sums, dq),
            *_descriptors(constants, constants["BLOCK_N"], k, v),
            *(tiles, bounds, queries, sums_row, scale),
            *_strides(q, k, v, dout),
            **constants,
        )
    if total:
        constants = plan.dkdv
        rows = constants["BLOCK_N"]
        elements = 2 * parts.shape[0] * key_heads * rows * head_dim
        partial = torch.empty(max(elements, 1), dtype=torch.float32, device=q.device)
        block_m = constants["BLOCK_M"]
        bulk = None
        if constants["BULK"]:
            shape, strides = [2 * heads, queries], [sums_row, 1]
            bulk = TensorDescriptor(sums, shape, strides, [1, block_m])
        launch(
            attention_dkdv_kernel,
            (pieces.shape[0] * key_heads,),
            *(q, k, v, dout, sums, dk, dv, partial),
            *_descriptors(constants, block_m, q, dout),
            *(bulk, pieces, runs, bounds, queries, sums_row, parts.shape[0], scale),
            *_strides(q, k, v, dout),
            **constants,
        )
        _add_parts(dk, dv, partial, divided, parts, rows)
    return dq, dk, dv


def _add_parts(
    dk: Tensor, dv: Tensor, partial: Tensor, divided: Tensor, parts: Tensor, tile_rows: int
) -> None:
    if not divided.shape[0]:
        return
    key_heads, head_dim = dk.shape[1:]
    rows = min(16, tile_rows)
    launch(
        attention_add_parts_kernel,
        (divided.shape[0] * key_heads * 2 * (tile_rows // rows),),
        *(dk, dv, partial, divided, parts.shape[0]),
        K=key_heads,
        D=head_dim,
        TILE_ROWS=tile_rows,
        COLUMNS=triton.next_power_of_2(head_dim),
        ROWS=rows,
        num_warps=4,
        num_stages=2,
    )


def _strides(*tensors: Tensor) -> tuple[int, ...]:
    strides: tuple[int, ...] = ()
    for tensor in tensors:
        strides += tensor.stride()[:2]
    return strides


def _bulk_ready(x: Tensor) -> Tensor:
    """x as bulk copies take it: heads side by side, rows 16 bytes apart or a multiple of it."""
    row, head = x.stride()[:2]
    one_row = head == x.shape[2] or x.shape[1] == 1
    if one_row and row * x.element_size() % 16 == 0 and row >= x.shape[1] * x.shape[2]:
        return x if x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.contiguous_format)
    return x.contiguous()


def _descriptors(constants: dict[str, Any], rows: int, *tensors: Tensor) -> list[Any]:
    """Descriptors of tiles of `rows` rows: the first parts of the heads, then the second parts."""
    if not constants["BULK"]:
        return [None] * (2 * len(tensors))
    return [
        TensorDescriptor(
            x, [x.shape[0], x.shape[1] * x.shape[2]], [x.stride(0), 1], [rows, columns]
        )
        if columns
        else None
        for columns in (constants["BLOCK_D"], constants["EXTRA"])
        for x in tensors
    ]

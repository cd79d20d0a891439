"""RMSNorm (Zhang and Sennrich, 2019) with an optional residual sum, one pass over memory each way.

A program holds whole rows in registers: several when rows are short (the heads of a q/k norm).
The backward pass has a fixed number of programs that walk over the rows and keep the gradient of
the weight in registers; their partial sums are added in a fixed order, so it is deterministic.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import num_processors, num_warps, on_tensor_device, schedule
from .numerics import narrow

# Elements of a tile when rows are short, and the longest row that registers can hold.
_TILE = 2048
_MAX_COLUMNS = 32768


@on_tensor_device
def forward(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalize the rows of x + residual.

    Args:
        x: [N, C]; residual: [N, C] or None.
        weight: [C].

    Returns:
        y [N, C]; h = x + residual [N, C], empty without a residual; 1 / rms of each row [N], fp32.
    """
    rows, columns = x.shape
    y = torch.empty_like(x)
    h = torch.empty_like(x if residual is not None else x[:0])
    rstd = torch.empty(rows, dtype=torch.float32, device=x.device)
    if x.numel():
        block, tile_rows = _tile(columns)
        rms_norm_forward_kernel[(triton.cdiv(rows, tile_rows),)](
            x,
            residual,
            weight,
            y,
            h,
            rstd,
            rows,
            columns,
            eps,
            ROWS=tile_rows,
            BLOCK=block,
            **schedule(num_warps(tile_rows * block)),
        )
    return y, h, rstd


@on_tensor_device
def backward(
    dy: Tensor,
    dh: Tensor | None,
    h: Tensor,
    weight: Tensor,
    rstd: Tensor,
    weight_grad: bool,
) -> tuple[Tensor, Tensor]:
    """The gradients of x (and of the residual: they are the same) and of the weight.

    Args:
        dy, h: [N, C]; dh: [N, C], the gradient that reaches h from elsewhere, or None.
        weight: [C]; rstd: [N].

    Returns:
        dx [N, C]; dweight [C] in fp32, empty unless `weight_grad`.
    """
    rows, columns = h.shape
    block, tile_rows = _tile(columns)
    # Four programs per processor keep it busy while one of them waits for memory.
    programs = min(triton.cdiv(rows, tile_rows), 4 * num_processors(h.device))
    dx = torch.empty_like(h)
    partial = h.new_empty((programs, columns), dtype=torch.float32) if weight_grad else None
    if h.numel():
        rms_norm_backward_kernel[(programs,)](
            dy,
            dh,
            h,
            weight,
            rstd,
            dx,
            partial,
            rows,
            columns,
            ROWS=tile_rows,
            BLOCK=block,
            **schedule(num_warps(tile_rows * block, per_thread=8)),
        )
    return dx, rstd[:0] if partial is None else partial.sum(0)


def _tile(columns: int) -> tuple[int, int]:
    """Width and number of rows of a tile."""
    if columns > _MAX_COLUMNS:
        raise ValueError(f"rms_norm: rows of at most {_MAX_COLUMNS} elements, found {columns}")
    block = triton.next_power_of_2(columns)
    return block, max(1, _TILE // block)


@triton.jit(do_not_specialize=["num_rows"])
def rms_norm_forward_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    y_ptr,
    h_ptr,
    rstd_ptr,
    num_rows,
    num_columns,
    eps,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)[None, :]
    offsets = rows[:, None] * num_columns + columns
    mask = (rows < num_rows)[:, None] & (columns < num_columns)

    h = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        h += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        # The norm reads what the next layer will read: the rounded sum.
        h_stored = narrow(h, h_ptr.dtype.element_ty)
        tl.store(h_ptr + offsets, h_stored, mask=mask)
        h = h_stored.to(tl.float32)

    # torch.compile passes Python floats as fp64, which would spread to the whole tile.
    rstd = tl.rsqrt(tl.sum(h * h, axis=1) / num_columns + tl.cast(eps, tl.float32))
    tl.store(rstd_ptr + rows, rstd, mask=rows < num_rows)
    weight = tl.load(weight_ptr + columns, mask=columns < num_columns, other=0.0).to(tl.float32)
    y = h * rstd[:, None] * weight
    tl.store(y_ptr + offsets, narrow(y, y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def rms_norm_backward_kernel(
    dy_ptr,
    dh_ptr,
    h_ptr,
    weight_ptr,
    rstd_ptr,
    dx_ptr,
    partial_ptr,
    num_rows,
    num_columns,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)[None, :]
    in_row = columns < num_columns
    weight = tl.load(weight_ptr + columns, mask=in_row, other=0.0).to(tl.float32)
    dweight = tl.zeros((ROWS, BLOCK), tl.float32)

    for tile in tl.range(program, tl.cdiv(num_rows, ROWS), tl.num_programs(0)):
        rows = tile * ROWS + tl.arange(0, ROWS)
        offsets = rows[:, None] * num_columns + columns
        mask = (rows < num_rows)[:, None] & in_row
        dy = tl.load(dy_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        h = tl.load(h_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + rows, mask=rows < num_rows, other=0.0)[:, None]

        normed = h * rstd
        dnormed = dy * weight
        projection = tl.sum(dnormed * normed, axis=1)[:, None] / num_columns
        dx = (dnormed - normed * projection) * rstd
        if dh_ptr is not None:
            dx += tl.load(dh_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + offsets, narrow(dx, dx_ptr.dtype.element_ty), mask=mask)
        dweight += dy * normed

    if partial_ptr is not None:
        total = tl.sum(dweight, axis=0)[None, :]
        tl.store(partial_ptr + program * num_columns + columns, total, mask=in_row)

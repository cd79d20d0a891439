"""RMSNorm (Zhang and Sennrich, 2019) with an optional residual sum, one pass over memory each way.

A program holds whole rows in registers: several when rows are short. The backward pass has a fixed
number of programs that walk over the rows, the next rows on their way while one is computed, and
keep the gradient of the weight in registers; for rows too wide for that, in memory that no other
program touches. A second kernel adds up what they found, in a fixed order, so the sum is the same
in every run.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.backends.compiler import GPUTarget

from .configs import config
from .launch import launch, num_processors, on_tensor_device, target
from .numerics import narrow

# Rows may be slices of a wider buffer, or one row expanded; the weight may be of any dtype.
READS_STRIDES = True
CASTS_WEIGHTS = True

TUNABLE = {
    "rms_norm_forward_kernel": {"TILE": (1024, 2048, 4096), "num_warps": (2, 4, 8, 16, 32)},
    "rms_norm_backward_kernel": {
        "TILE": (1024, 2048),
        "STAGES": (2, 3, 4),
        "PROGRAMS": (1, 2, 3, 4),
        "num_warps": (4, 8, 16),
    },
    "rms_norm_backward_wide_kernel": {
        "ROWS": (1, 2, 4),
        "BLOCK": (512, 1024, 2048),
        "STAGES": (1, 2),
        "PROGRAMS": (1, 2, 3, 4),
        "num_warps": (4, 8, 16),
    },
    "sum_rows_kernel": {
        "ROWS": (64, 128, 256),
        "BLOCK": (8, 16, 32),
        "STAGES": (1, 2, 3),
        "num_warps": (4, 8),
    },
}

# The longest row that registers can hold, and the longest beside what a backward pass keeps.
_MAX_COLUMNS = 32768
_MAX_COLUMNS_BACKWARD = 8192


@on_tensor_device
def forward(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalize the rows of x + residual.

    Args:
        x: [N, C]; residual: [N, C] or None. Rows of any stride.
        weight: [C].

    Returns:
        y [N, C]; h = x + residual [N, C], empty without a residual; 1 / rms of each row [N], fp32.
    """
    rows, columns = x.shape
    y = x.new_empty((rows, columns))
    h = x.new_empty((0, columns) if residual is None else (rows, columns))
    rstd = x.new_empty(rows, dtype=torch.float32)
    if rows and columns:
        constants = _plan("rms_norm_forward_kernel", x.dtype, columns, target())[0]
        launch(
            rms_norm_forward_kernel,
            (-(-rows // constants["ROWS"]),),
            x,
            residual,
            weight,
            y,
            None if residual is None else h,
            rstd,
            x.stride(0),
            0 if residual is None else residual.stride(0),
            rows,
            columns,
            eps,
            **constants,
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
        dy, h: [N, C]; dh: [N, C], the gradient that reaches h from elsewhere, or None. Rows of any
            stride.
        weight: [C]; rstd: [N].

    Returns:
        dx [N, C]; dweight [C] in fp32, empty unless `weight_grad`.
    """
    rows, columns = h.shape
    dx = h.new_empty((rows, columns))
    if not (rows and columns):
        return dx, rstd.new_zeros(columns if weight_grad else 0)
    wide = columns > _MAX_COLUMNS_BACKWARD
    kernel = rms_norm_backward_wide_kernel if wide else rms_norm_backward_kernel
    constants, most = _plan(kernel.__name__, h.dtype, columns, target())
    programs = min(-(-rows // constants["ROWS"]), most * num_processors(h.device))
    partial = rstd.new_empty((programs, columns)) if weight_grad else None
    launch(
        kernel,
        (programs,),
        dy,
        dh,
        h,
        weight,
        rstd,
        dx,
        partial,
        dy.stride(0),
        0 if dh is None else dh.stride(0),
        h.stride(0),
        rows,
        columns,
        **constants,
    )
    return dx, rstd.new_empty(0) if partial is None else sum_rows(partial)


def sum_rows(partial: Tensor) -> Tensor:
    """The sum over the rows of [P, C], fp32, contiguous: always in the same order."""
    rows, columns = partial.shape
    total = partial.new_empty(columns)
    constants = config("sum_rows_kernel", partial.dtype, columns)
    grid = (-(-columns // constants["BLOCK"]),)
    launch(sum_rows_kernel, grid, partial, total, rows, columns, **constants)
    return total


@functools.cache
def _plan(
    kernel: str, dtype: torch.dtype, columns: int, _gpu: GPUTarget
) -> tuple[dict[str, Any], int]:
    """Constants of a launch, and programs per processor where their number is fixed."""
    if columns > _MAX_COLUMNS:
        raise ValueError(f"rms_norm: rows of at most {_MAX_COLUMNS} elements, found {columns}")
    constants = dict(config(kernel, dtype, columns))
    most = constants.pop("PROGRAMS", 0)
    if "TILE" in constants:
        block = triton.next_power_of_2(columns)
        constants |= {"ROWS": max(1, constants.pop("TILE") // block), "BLOCK": block}
    return constants, most


@triton.jit(do_not_specialize=["num_rows"])
def rms_norm_forward_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    y_ptr,
    h_ptr,
    rstd_ptr,
    x_stride,
    residual_stride,
    num_rows,
    num_columns,
    eps,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)[None, :]
    in_row = columns < num_columns
    # The grid has no program beyond the last row, so a single row is always there.
    mask = in_row if ROWS == 1 else (rows < num_rows)[:, None] & in_row
    at = rows[:, None]

    h = tl.load(x_ptr + at * x_stride + columns, mask=mask, other=0.0)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + at * residual_stride + columns, mask=mask, other=0.0)
    # All rows read the weight: rows may leave the cache, it stays.
    weight = tl.load(weight_ptr + columns, mask=in_row, other=0.0, eviction_policy="evict_last")
    h = h.to(tl.float32)
    if residual_ptr is not None:
        # The norm reads what the next layer will read: the rounded sum.
        h_stored = narrow(h + residual.to(tl.float32), h_ptr.dtype.element_ty)
        tl.store(h_ptr + at * num_columns + columns, h_stored, mask=mask)
        h = h_stored.to(tl.float32)

    # torch.compile passes Python floats as fp64, which would spread to the whole tile.
    rstd = tl.rsqrt(tl.sum(h * h, axis=1) / num_columns + tl.cast(eps, tl.float32))
    tl.store(rstd_ptr + rows, rstd, mask=rows < num_rows)
    y = h * rstd[:, None] * weight.to(tl.float32)
    tl.store(y_ptr + at * num_columns + columns, narrow(y, y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def rms_norm_backward_kernel(
    dy_ptr,
    dh_ptr,
    h_ptr,
    weight_ptr,
    rstd_ptr,
    dx_ptr,
    partial_ptr,
    dy_stride,
    dh_stride,
    h_stride,
    num_rows,
    num_columns,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)[None, :]
    in_row = columns < num_columns
    weight = tl.load(weight_ptr + columns, mask=in_row, other=0.0)
    dweight = tl.zeros((ROWS, BLOCK), tl.float32)

    for tile in tl.range(program, tl.cdiv(num_rows, ROWS), tl.num_programs(0), num_stages=STAGES):
        rows = tile * ROWS + tl.arange(0, ROWS)
        at = rows[:, None]
        mask = in_row if ROWS == 1 else (rows < num_rows)[:, None] & in_row
        dy = tl.load(dy_ptr + at * dy_stride + columns, mask=mask, other=0.0).to(tl.float32)
        h = tl.load(h_ptr + at * h_stride + columns, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + rows, mask=rows < num_rows, other=0.0)[:, None]

        normed = h * rstd
        dnormed = dy * weight.to(tl.float32)
        projection = tl.sum(dnormed * normed, axis=1)[:, None] / num_columns
        dx = (dnormed - normed * projection) * rstd
        if dh_ptr is not None:
            dh = tl.load(dh_ptr + at * dh_stride + columns, mask=mask, other=0.0)
            dx += dh.to(tl.float32)
        tl.store(
            dx_ptr + at * num_columns + columns, narrow(dx, dx_ptr.dtype.element_ty), mask=mask
        )
        if partial_ptr is not None:
            dweight += dy * normed

    if partial_ptr is not None:
        total = tl.sum(dweight, axis=0)[None, :]
        tl.store(partial_ptr + program * num_columns + columns, total, mask=in_row)


@triton.jit(do_not_specialize=["num_rows"])
def rms_norm_backward_wide_kernel(
    dy_ptr,
    dh_ptr,
    h_ptr,
    weight_ptr,
    rstd_ptr,
    dx_ptr,
    partial_ptr,
    dy_stride,
    dh_stride,
    h_stride,
    num_rows,
    num_columns,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Reads a row twice, in blocks of columns: the second time it comes from the cache."""
    program = tl.program_id(0).to(tl.int64)
    if partial_ptr is not None:
        partial_ptr += program * num_columns
    for tile in tl.range(program, tl.cdiv(num_rows, ROWS), tl.num_programs(0)):
        rows = tile * ROWS + tl.arange(0, ROWS)
        at = rows[:, None]
        there = at < num_rows
        rstd = tl.load(rstd_ptr + rows, mask=rows < num_rows, other=0.0)[:, None]

        sums = tl.zeros((ROWS, BLOCK), tl.float32)
        for first in tl.range(0, num_columns, BLOCK, num_stages=STAGES):
            columns = first + tl.arange(0, BLOCK)[None, :]
            mask = there & (columns < num_columns)
            dy = tl.load(dy_ptr + at * dy_stride + columns, mask=mask, other=0.0).to(tl.float32)
            h = tl.load(h_ptr + at * h_stride + columns, mask=mask, other=0.0).to(tl.float32)
            weight = tl.load(weight_ptr + columns, mask=columns < num_columns, other=0.0)
            sums += dy * weight.to(tl.float32) * h
        projection = tl.sum(sums, axis=1)[:, None] * rstd / num_columns
        # Which thread adds to which partial sum is the compiler's choice each time.
        tl.debug_barrier()

        for first in tl.range(0, num_columns, BLOCK, num_stages=STAGES):
            columns = first + tl.arange(0, BLOCK)[None, :]
            in_row = columns < num_columns
            mask = there & in_row
            dy = tl.load(dy_ptr + at * dy_stride + columns, mask=mask, other=0.0).to(tl.float32)
            h = tl.load(h_ptr + at * h_stride + columns, mask=mask, other=0.0).to(tl.float32)
            weight = tl.load(weight_ptr + columns, mask=in_row, other=0.0)
            normed = h * rstd
            dx = (dy * weight.to(tl.float32) - normed * projection) * rstd
            if dh_ptr is not None:
                dh = tl.load(dh_ptr + at * dh_stride + columns, mask=mask, other=0.0)
                dx += dh.to(tl.float32)
            dx = narrow(dx, dx_ptr.dtype.element_ty)
            tl.store(dx_ptr + at * num_columns + columns, dx, mask=mask)
            if partial_ptr is not None:
                total = tl.sum(dy * normed, axis=0)[None, :]
                if tile > program:
                    total += tl.load(partial_ptr + columns, mask=in_row, other=0.0)
                tl.store(partial_ptr + columns, total, mask=in_row)


@triton.jit(do_not_specialize=["num_rows"])
def sum_rows_kernel(
    partial_ptr,
    total_ptr,
    num_rows,
    num_columns,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    columns = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[None, :]
    in_row = columns < num_columns
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in tl.range(0, num_rows, ROWS, num_stages=STAGES):
        rows = first + tl.arange(0, ROWS)[:, None]
        offsets = rows.to(tl.int64) * num_columns + columns
        total += tl.load(partial_ptr + offsets, mask=(rows < num_rows) & in_row, other=0.0)
    tl.store(total_ptr + columns, tl.sum(total, axis=0)[None, :], mask=in_row)

"""SwiGLU (Shazeer, 2020): silu(gate) * up, elementwise.

A tile is a few rows by a block of columns, so no thread divides to find its elements, each moves
16-byte vectors, and no tile grows with the width of the layer. Gate and up may be the halves of one
buffer, as one projection or two that share their output write them; so are their gradients then.
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
from .launch import launch, on_tensor_device, target
from .numerics import narrow

READS_STRIDES = True

TUNABLE = {
    "swiglu_forward_kernel": {"TILE": (512, 1024, 2048, 4096), "num_warps": (2, 4, 8)},
    "swiglu_backward_kernel": {"TILE": (512, 1024, 2048, 4096), "num_warps": (2, 4, 8)},
}


def forward(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up [N, F], for rows of one shape and dtype and of any strides."""
    out = gate.new_empty(gate.shape)
    forward_into_(gate, up, out)
    return out


def forward_fused(gate_up: Tensor) -> Tensor:
    """silu(gate) * up [N, F] of the two halves of rows [N, 2F]."""
    rows, columns = gate_up.shape
    out = gate_up.new_empty((rows, columns // 2))
    _forward(gate_up, gate_up, out, columns // 2)
    return out


def backward(dout: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up: the halves of one buffer, if those are."""
    rows, columns = gate.shape
    if _are_halves(gate, up):
        both = gate.new_empty((rows, 2 * columns))
        dgate, dup = both[:, :columns], both[:, columns:]
    else:
        dgate, dup = gate.new_empty((rows, columns)), gate.new_empty((rows, columns))
    backward_into_(dout, gate, up, dgate, dup)
    return dgate, dup


def backward_fused(dout: Tensor, gate_up: Tensor) -> Tensor:
    """The gradient of rows [N, 2F], of which one half is gate and one up."""
    dgate_up = gate_up.new_empty(gate_up.shape)
    _backward(dout, gate_up, gate_up, dgate_up, dgate_up, dout.shape[1])
    return dgate_up


def forward_into_(gate: Tensor, up: Tensor, out: Tensor) -> None:
    """Write silu(gate) * up to rows of any stride: over gate or up, say."""
    _forward(gate, up, out, 0)


def backward_into_(dout: Tensor, gate: Tensor, up: Tensor, dgate: Tensor, dup: Tensor) -> None:
    """Write the gradients to rows of any stride: to halves of one buffer, or over gate and up."""
    _backward(dout, gate, up, dgate, dup, 0)


# Rows of `up` and `dup` begin at column `up_at` of these tensors: a number costs the host less than
# the slice of a tensor.
@on_tensor_device
def _forward(gate: Tensor, up: Tensor, out: Tensor, up_at: int) -> None:
    rows, columns = out.shape
    if rows and columns:
        constants = _tile("swiglu_forward_kernel", out.dtype, columns, target())
        launch(
            swiglu_forward_kernel,
            _grid(rows, columns, constants),
            gate,
            up,
            out,
            gate.stride(0),
            up.stride(0),
            out.stride(0),
            up_at,
            rows,
            columns,
            **constants,
        )


@on_tensor_device
def _backward(
    dout: Tensor, gate: Tensor, up: Tensor, dgate: Tensor, dup: Tensor, up_at: int
) -> None:
    rows, columns = dout.shape
    if rows and columns:
        constants = _tile("swiglu_backward_kernel", gate.dtype, columns, target())
        launch(
            swiglu_backward_kernel,
            _grid(rows, columns, constants),
            dout,
            gate,
            up,
            dgate,
            dup,
            dout.stride(0),
            gate.stride(0),
            up.stride(0),
            dgate.stride(0),
            dup.stride(0),
            up_at,
            rows,
            columns,
            **constants,
        )


def _are_halves(gate: Tensor, up: Tensor) -> bool:
    columns = gate.shape[1]
    return (
        gate.stride(0) == up.stride(0) == 2 * columns
        and up.storage_offset() == gate.storage_offset() + columns
        and up.untyped_storage().data_ptr() == gate.untyped_storage().data_ptr()
    )


def _grid(rows: int, columns: int, constants: dict[str, Any]) -> tuple[int]:
    tall, wide = constants["ROWS"], constants["BLOCK"]
    # Not triton.cdiv, which takes longer than the rest of a launch.
    return (-(-rows // tall) * -(-columns // wide),)


@functools.cache
def _tile(kernel: str, dtype: torch.dtype, columns: int, _gpu: GPUTarget) -> dict[str, Any]:
    constants = dict(config(kernel, dtype, columns))
    tile = constants.pop("TILE")
    block = min(tile, triton.next_power_of_2(columns))
    return {"ROWS": tile // block, "BLOCK": block, **constants}


@triton.jit(do_not_specialize=["num_rows"])
def swiglu_forward_kernel(
    gate_ptr,
    up_ptr,
    out_ptr,
    gate_stride,
    up_stride,
    out_stride,
    up_at,
    num_rows,
    num_columns,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows, columns, mask = tile_of(num_rows, num_columns, ROWS, BLOCK)
    gate = tl.load(gate_ptr + rows * gate_stride + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + up_at + rows * up_stride + columns, mask=mask, other=0.0).to(tl.float32)
    out = narrow(gate * tl.sigmoid(gate) * up, out_ptr.dtype.element_ty)
    tl.store(out_ptr + rows * out_stride + columns, out, mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def swiglu_backward_kernel(
    dout_ptr,
    gate_ptr,
    up_ptr,
    dgate_ptr,
    dup_ptr,
    dout_stride,
    gate_stride,
    up_stride,
    dgate_stride,
    dup_stride,
    up_at,
    num_rows,
    num_columns,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows, columns, mask = tile_of(num_rows, num_columns, ROWS, BLOCK)
    dout = tl.load(dout_ptr + rows * dout_stride + columns, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + rows * gate_stride + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + up_at + rows * up_stride + columns, mask=mask, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    dgate = narrow(dout * up * (sigmoid + silu * (1.0 - sigmoid)), dgate_ptr.dtype.element_ty)
    dup = narrow(dout * silu, dup_ptr.dtype.element_ty)
    tl.store(dgate_ptr + rows * dgate_stride + columns, dgate, mask=mask)
    tl.store(dup_ptr + up_at + rows * dup_stride + columns, dup, mask=mask)


@triton.jit
def tile_of(num_rows, num_columns, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Rows [ROWS, 1] and columns [1, BLOCK] of this program's tile, and which of them are there."""
    across = tl.cdiv(num_columns, BLOCK)
    # Divided in 32 bits, which takes a fraction of the time; widened after that.
    program = tl.program_id(0)
    rows = ((program // across).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    columns = program % across * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask = columns < num_columns
    if ROWS > 1:
        mask = mask & (rows < num_rows)
    return rows, columns, mask

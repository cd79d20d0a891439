"""SwiGLU (Shazeer, 2020): silu(gate) * up, elementwise.

A flat grid over the elements, whatever the shape: each thread moves 16-byte vectors, and no tile
grows with the width of the layer.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import num_warps, on_tensor_device, schedule
from .numerics import narrow

_BLOCK = 2048


@on_tensor_device
def forward(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, for contiguous tensors of one shape and dtype."""
    out = torch.empty_like(gate)
    count = gate.numel()
    if count:
        swiglu_forward_kernel[(triton.cdiv(count, _BLOCK),)](
            gate, up, out, count, BLOCK=_BLOCK, **schedule(num_warps(_BLOCK))
        )
    return out


@on_tensor_device
def backward(dout: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up."""
    dgate, dup = torch.empty_like(gate), torch.empty_like(up)
    count = gate.numel()
    if count:
        swiglu_backward_kernel[(triton.cdiv(count, _BLOCK),)](
            dout, gate, up, dgate, dup, count, BLOCK=_BLOCK, **schedule(num_warps(_BLOCK))
        )
    return dgate, dup


@triton.jit
def swiglu_forward_kernel(gate_ptr, up_ptr, out_ptr, count, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < count
    gate = tl.load(gate_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    out = gate * tl.sigmoid(gate) * up
    tl.store(out_ptr + offsets, narrow(out, out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def swiglu_backward_kernel(
    dout_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, count, BLOCK: tl.constexpr
):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < count
    dout = tl.load(dout_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    dgate = dout * up * (sigmoid + silu * (1.0 - sigmoid))
    tl.store(dgate_ptr + offsets, narrow(dgate, dgate_ptr.dtype.element_ty), mask=mask)
    tl.store(dup_ptr + offsets, narrow(dout * silu, dup_ptr.dtype.element_ty), mask=mask)

"""SwiGLU (Shazeer, 2020): the gated activation between the two halves of the feed-forward."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import backend
from .inputs import as_rows, needs_grad


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up.

    Args:
        gate, up: [..., F], fp32, bf16 or fp16; computed in fp32.

    Returns:
        [..., F] in the dtype of the inputs.

    Raises:
        ValueError: shapes or dtypes that differ.
    """
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(
            f"swiglu: up must be {gate.dtype} {tuple(gate.shape)} like gate, "
            f"found {up.dtype} {tuple(up.shape)}"
        )
    raw = backend.kernels("swiglu", gate, up)
    if raw is None:
        return swiglu_reference(gate, up)
    if needs_grad(gate, up):
        return _SwiGLU.apply(gate, up, raw)
    return raw.forward(as_rows(gate, raw), as_rows(up, raw)).view(gate.shape)


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """The definition of `swiglu` in PyTorch."""
    wide = torch.promote_types(gate.dtype, torch.float32)
    return (F.silu(gate.to(wide)) * up.to(wide)).to(gate.dtype)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, raw: Any) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.raw = raw
        return raw.forward(as_rows(gate, raw), as_rows(up, raw)).view(gate.shape)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        dgate, dup = ctx.raw.backward(*(as_rows(t, ctx.raw) for t in (dout, gate, up)))
        return dgate.view(gate.shape), dup.view(gate.shape), None

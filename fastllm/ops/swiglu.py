"""SwiGLU (Shazeer, 2020): the gated activation between the two halves of the feed-forward."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import backend
from .inputs import as_rows, needs_grad


def swiglu(gate: Tensor, up: Tensor | None = None) -> Tensor:
    """silu(gate) * up.

    Args:
        gate, up: [..., F], fp32, bf16 or fp16; computed in fp32. Without `up`, gate is [..., 2F]:
            gate in the first half of each row, up in the second.

    Returns:
        [..., F] in the dtype of the inputs.

    Raises:
        ValueError: shapes or dtypes that differ, or a row without two halves.
    """
    _check(gate, up)
    raw = backend.kernels("swiglu", gate, up)
    if raw is None:
        return swiglu_reference(gate, up)
    if up is None:
        return _fused(gate, raw)
    if needs_grad(gate, up):
        return _SwiGLU.apply(gate, up, raw)
    return raw.forward(as_rows(gate, raw), as_rows(up, raw)).view(gate.shape)


def swiglu_reference(gate: Tensor, up: Tensor | None = None) -> Tensor:
    """The definition of `swiglu` in PyTorch."""
    if up is None:
        gate, up = gate.chunk(2, dim=-1)
    wide = torch.promote_types(gate.dtype, torch.float32)
    return (F.silu(gate.to(wide)) * up.to(wide)).to(gate.dtype)


def forward_fused(raw: Any, gate_up: Tensor) -> Tensor:
    """silu(gate) * up [N, F] of rows [N, 2F], on the kernels `raw`."""
    if hasattr(raw, "forward_fused"):
        return raw.forward_fused(gate_up)
    return raw.forward(*gate_up.chunk(2, dim=1))


def backward_fused(raw: Any, dout: Tensor, gate_up: Tensor) -> Tensor:
    """The gradient of rows [N, 2F], on the kernels `raw`."""
    if hasattr(raw, "backward_fused"):
        return raw.backward_fused(dout, gate_up)
    dgate_up = gate_up.new_empty(gate_up.shape)
    raw.backward_into_(dout, *gate_up.chunk(2, dim=1), *dgate_up.chunk(2, dim=1))
    return dgate_up


def _check(gate: Tensor, up: Tensor | None) -> None:
    if up is None:
        if gate.dim() == 0 or gate.shape[-1] % 2:
            raise ValueError(f"swiglu: without up, gate must be [..., 2F], found {[*gate.shape]}")
    elif gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(
            f"swiglu: up must be {gate.dtype} {tuple(gate.shape)} like gate, "
            f"found {up.dtype} {tuple(up.shape)}"
        )


def _fused(gate_up: Tensor, raw: Any) -> Tensor:
    rows = as_rows(gate_up, raw)
    out = _FusedSwiGLU.apply(rows, raw) if needs_grad(rows) else forward_fused(raw, rows)
    return out if gate_up.dim() == 2 else out.view(*gate_up.shape[:-1], out.shape[1])


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


class _FusedSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, raw: Any) -> Tensor:
        ctx.save_for_backward(gate_up)
        ctx.raw = raw
        return forward_fused(raw, gate_up)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None]:
        (gate_up,) = ctx.saved_tensors
        return backward_fused(ctx.raw, as_rows(dout, ctx.raw), gate_up), None

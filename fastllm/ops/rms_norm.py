"""Root-mean-square normalisation (Zhang & Sennrich, 2019), with the residual add fused in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import backend
from .inputs import as_rows, needs_grad


def rms_norm(
    x: Tensor, weight: Tensor, eps: float = 1e-6, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """y = h / sqrt(mean(h^2) + eps) * weight with h = x, or h = x + residual.

    Args:
        x: [..., C], fp32, bf16 or fp16 (fp64 on the PyTorch backend).
        weight: [C]; cast to the dtype of x.
        eps: added to the mean square.
        residual: [..., C], like x.

    Returns:
        y [..., C], or (y, x + residual) when a residual is given. Means are taken in fp32.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    if weight.shape != x.shape[-1:]:
        raise ValueError(
            f"rms_norm: weight must have shape {tuple(x.shape[-1:])}, found {tuple(weight.shape)}"
        )
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(
            f"rms_norm: residual must be {x.dtype} {tuple(x.shape)} like x, "
            f"found {residual.dtype} {tuple(residual.shape)}"
        )
    raw = backend.kernels("rms_norm", x, weight, residual)
    if raw is None:
        return rms_norm_reference(x, weight, eps, residual)
    if needs_grad(x, weight, residual):
        y, h = _RMSNorm.apply(x, weight, eps, residual, raw)
    else:
        y, h, _ = _forward(x, weight.to(x.dtype), eps, residual, raw)
        y, h = y.view(x.shape), None if residual is None else h.view(x.shape)
    return y if residual is None else (y, h)


def rms_norm_reference(
    x: Tensor, weight: Tensor, eps: float = 1e-6, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """The definition of `rms_norm` in PyTorch."""
    h = x if residual is None else x + residual
    wide = h.to(torch.promote_types(h.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    y = (normed * weight).to(x.dtype)
    return y if residual is None else (y, h)


def _forward(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, raw: Any
) -> tuple[Tensor, Tensor, Tensor]:
    added = None if residual is None else as_rows(residual, raw)
    return raw.forward(as_rows(x, raw), weight.contiguous(), eps, added)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, raw: Any
    ) -> tuple[Tensor, Tensor | None]:
        narrow = weight.to(x.dtype)
        y, h, rstd = _forward(x, narrow, eps, residual, raw)
        h = x if residual is None else h.view(x.shape)
        ctx.save_for_backward(h, narrow, rstd)
        ctx.raw, ctx.fused, ctx.weight_dtype = raw, residual is not None, weight.dtype
        ctx.set_materialize_grads(False)
        return y.view(x.shape), h if ctx.fused else None

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dh: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return dh, None, None, dh if ctx.fused else None, None
        h, weight, rstd = ctx.saved_tensors
        raw, needs_weight = ctx.raw, ctx.needs_input_grad[1]
        others = None if dh is None else as_rows(dh, raw)
        dx, dweight = raw.backward(
            as_rows(dy, raw), others, as_rows(h, raw), weight.contiguous(), rstd, needs_weight
        )
        dx = dx.view(h.shape)
        dweight = dweight.to(ctx.weight_dtype) if needs_weight else None
        return dx, dweight, None, dx if ctx.fused else None, None

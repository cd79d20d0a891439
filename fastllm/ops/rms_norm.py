"""Root-mean-square normalisation (Zhang & Sennrich, 2019), with the residual add fused in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import backend
from .inputs import as_rows, needs_grad
from .working import working


def rms_norm(
    x: Tensor, weight: Tensor, eps: float = 1e-6, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """y = h / sqrt(mean(h^2) + eps) * weight with h = x, or h = x + residual.

    Args:
        x: [..., C], fp32, bf16 or fp16 (fp64 on the PyTorch backend).
        weight: [C], of any floating dtype.
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
        return _RMSNorm.apply(x, weight, eps, residual, raw)
    y, h, _ = _forward(x, as_weight(weight, x.dtype, raw), eps, residual, raw)
    return _shaped(y, x) if residual is None else (_shaped(y, x), _shaped(h, x))


def rms_norm_reference(
    x: Tensor, weight: Tensor, eps: float = 1e-6, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """The definition of `rms_norm` in PyTorch."""
    h = x if residual is None else x + residual
    wide = h.to(torch.promote_types(h.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    y = (normed * weight).to(x.dtype)
    return y if residual is None else (y, h)


def as_weight(weight: Tensor, dtype: torch.dtype, raw: Any) -> Tensor:
    """The weight as the kernels `raw` read it beside rows of this dtype."""
    if getattr(raw, "CASTS_WEIGHTS", False):
        return weight.contiguous()
    return working(weight, dtype).contiguous()


def _shaped(rows: Tensor, like: Tensor) -> Tensor:
    return rows if like.dim() == 2 else rows.view(like.shape)


def _forward(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, raw: Any
) -> tuple[Tensor, Tensor, Tensor]:
    added = None if residual is None else as_rows(residual, raw)
    return raw.forward(as_rows(x, raw), weight, eps, added)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, raw: Any
    ) -> Tensor | tuple[Tensor, Tensor]:
        narrow = as_weight(weight, x.dtype, raw)
        y, h, rstd = _forward(x, narrow, eps, residual, raw)
        h = x if residual is None else _shaped(h, x)
        ctx.save_for_backward(h, narrow, rstd)
        ctx.raw, ctx.fused, ctx.weight_dtype = raw, residual is not None, weight.dtype
        ctx.set_materialize_grads(False)
        return (_shaped(y, x), h) if ctx.fused else _shaped(y, x)

    @staticmethod
    def backward(
        ctx: Any, dy: Tensor | None, dh: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        if dy is None:
            return dh, None, None, dh if ctx.fused else None, None
        h, weight, rstd = ctx.saved_tensors
        raw, needs_weight = ctx.raw, ctx.needs_input_grad[1]
        others = None if dh is None else as_rows(dh, raw)
        dx, dweight = raw.backward(
            as_rows(dy, raw), others, as_rows(h, raw), weight, rstd, needs_weight
        )
        dx = _shaped(dx, h)
        dweight = dweight.to(ctx.weight_dtype) if needs_weight else None
        return dx, dweight, None, dx if ctx.fused else None, None

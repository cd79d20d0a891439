"""Rotary position embedding (Su et al., 2021) on packed positions, half-split pairing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import backend
from .inputs import as_heads, needs_grad


def rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys by their positions.

    Channel i is paired with channel i + D/2, as in Hugging Face's models.

    Args:
        q: [T, H, D]. k: [T, K, D]. fp32, bf16 or fp16; the rotation is computed in fp32.
        cos, sin: tables [P, D/2], fp32.
        positions: row of the tables for each token [T], integer; 0..T-1 when None. Values
            must lie in 0..P-1.

    Returns:
        The rotated q and k.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    _check(q, k, cos, sin, positions)
    if positions is None:
        positions = torch.arange(q.shape[0], dtype=torch.int32, device=q.device)
    raw = backend.kernels("rope", q, k, cos, sin)
    if raw is None:
        return rope_reference(q, k, cos, sin, positions)
    tables = (
        cos.float().contiguous(),
        sin.float().contiguous(),
        positions.to(torch.int32).contiguous(),
    )
    if needs_grad(q, k):
        return _Rope.apply(q, k, *tables, raw)
    return raw.forward(as_heads(q, raw), as_heads(k, raw), *tables, False)


def rope_reference(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The definition of `rope` in PyTorch."""
    rows = slice(0, q.shape[0]) if positions is None else positions.long()
    cosines, sines = cos[rows].unsqueeze(1), sin[rows].unsqueeze(1)

    def rotate(x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        a, b = wide.chunk(2, dim=-1)
        return torch.cat((a * cosines - b * sines, b * cosines + a * sines), dim=-1).to(x.dtype)

    return rotate(q), rotate(k)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, raw: Any
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin, positions)
        ctx.raw = raw
        return raw.forward(as_heads(q, raw), as_heads(k, raw), cos, sin, positions, False)

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
        # A rotation's transpose is the rotation by the opposite angle.
        raw = ctx.raw
        dq, dk = raw.forward(as_heads(dq, raw), as_heads(dk, raw), *ctx.saved_tensors, True)
        return dq, dk, None, None, None, None


def _check(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None) -> None:
    tokens, _, head_dim = q.shape
    if k.shape[0] != tokens or k.shape[2] != head_dim or k.dtype != q.dtype:
        raise ValueError(
            f"rope: k must be {q.dtype} [{tokens}, K, {head_dim}] to go with q, "
            f"found {k.dtype} {tuple(k.shape)}"
        )
    if head_dim % 2:
        raise ValueError(f"rope: the head size must be even, found {head_dim}")
    if cos.shape != sin.shape or cos.dim() != 2 or cos.shape[1] != head_dim // 2:
        raise ValueError(
            f"rope: cos and sin must be [P, {head_dim // 2}], "
            f"found {tuple(cos.shape)} and {tuple(sin.shape)}"
        )
    if positions is None:
        if tokens > cos.shape[0]:
            raise ValueError(f"rope: {tokens} tokens, but tables for {cos.shape[0]} positions")
    elif positions.shape != (tokens,) or positions.is_floating_point():
        raise ValueError(
            f"rope: positions must be integers [{tokens}], "
            f"found {positions.dtype} {tuple(positions.shape)}"
        )

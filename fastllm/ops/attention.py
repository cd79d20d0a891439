"""Causal grouped-query attention on the packed, prefix-shared layout.

Scaled dot-product attention (Vaswani et al., 2017) with the grouped heads of Ainslie et al.
(2023); the kernels follow FlashAttention-2 (Dao, 2023): blocks, online softmax, and a backward
pass that recomputes the probabilities from the saved log-sum-exp.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..layout import NO_PREFIX, PackedLayout
from . import backend, varlen
from .inputs import as_heads, needs_grad


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: PackedLayout,
    scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    """Each query attends to its segment's prefix whole and to its own segment causally.

    Args:
        q: [N, H, D], one row for each of `layout.query_rows` (N = T without `layout.select`).
        k, v: [T, K, D]; query head h reads key head h // (H / K).
        layout: the segments of the packed row.
        scale: factor of the scores; 1 / sqrt(D) when None.
        window: a query at position p sees keys at positions > p - window; None for all.

    Returns:
        [N, H, D] in the dtype of q; softmax and sums in fp32.

    Raises:
        ValueError: shapes, dtypes or a window that do not fit.
        RuntimeError: FASTLLM_ATTENTION asks for what cannot serve (see varlen.py).
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    _check(q, k, v, layout, scale, window)
    if varlen.requested():
        return varlen.attend(q, k, v, layout, scale, window)
    raw = backend.kernels("attention", q, k, v)
    if raw is None:
        return attention_reference(q, k, v, layout, scale, window)
    if needs_grad(q, k, v):
        return _Attention.apply(q, k, v, layout, scale, window or 0, raw)
    return raw.forward(*(as_heads(t, raw) for t in (q, k, v)), layout, scale, window or 0)[0]


def prepare_layout(
    layout: PackedLayout,
    dtype: torch.dtype,
    heads: int,
    key_heads: int,
    head_dim: int,
    window: int | None = None,
    backward: bool = True,
    device: torch.device | str | None = None,
) -> None:
    """Make all tables that `attention` will read, before there are tensors to attend with.

    Args:
        dtype, heads, key_heads, head_dim: of q [N, H, D] and k, v [T, K, D].
        window: as in `attention`.
        backward: whether there will be a backward pass.
        device: where the tensors will be; the layout may still be elsewhere (see
            `PackedLayout.tables`). That of the layout when None.
    """
    device = layout.device if device is None else torch.device(device)
    tables = [layout.starts, layout.prefix, layout.positions, layout.ticket]
    raw = backend.kernels_for("attention", device.type, dtype)
    if raw is not None and hasattr(raw, "prepare"):
        raw.prepare(layout, dtype, heads, key_heads, head_dim, window or 0, backward)
        return
    tables += [layout.query_rows, layout.query_starts]
    if raw is None:
        _ = layout.offsets, layout.query_offsets
    elif backward:
        tables += [layout.children_starts, layout.children]


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: PackedLayout,
    scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    """The definition of `attention` in PyTorch: one dense attention for each segment."""
    outputs = [q[:0]]
    queries, positions = layout.query_offsets, layout.positions
    for segment, prefix in enumerate(layout.prefix_of):
        own = slice(queries[segment], queries[segment + 1])
        if own.start == own.stop:
            continue
        seen = _rows(layout, segment)
        if prefix != NO_PREFIX:
            seen = torch.cat((_rows(layout, prefix), seen))
        asked = positions[layout.query_rows[own].long()]
        distance = asked[:, None] - positions[seen][None, :]
        visible = distance >= 0 if window is None else (distance >= 0) & (distance < window)
        attended = F.scaled_dot_product_attention(
            q[own].transpose(0, 1).unsqueeze(0),
            k[seen].transpose(0, 1).unsqueeze(0),
            v[seen].transpose(0, 1).unsqueeze(0),
            attn_mask=visible,
            scale=scale,
            enable_gqa=True,
        )
        outputs.append(attended.squeeze(0).transpose(0, 1))
    return torch.cat(outputs)


def _rows(layout: PackedLayout, segment: int) -> Tensor:
    return torch.arange(layout.offsets[segment], layout.offsets[segment + 1], device=layout.device)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layout: PackedLayout,
        scale: float,
        window: int,
        raw: Any,
    ) -> Tensor:
        q, k, v = (as_heads(t, raw) for t in (q, k, v))
        out, lse = raw.forward(q, k, v, layout, scale, window)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.layout, ctx.scale, ctx.window, ctx.raw = layout, scale, window, raw
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        dq, dk, dv = ctx.raw.backward(
            as_heads(dout, ctx.raw), *ctx.saved_tensors, ctx.layout, ctx.scale, ctx.window
        )
        return dq, dk, dv, None, None, None, None


def _check(
    q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, scale: float, window: int | None
) -> None:
    if not q.dim() == k.dim() == v.dim() == 3:
        raise ValueError(
            "attention: expected q [N, H, D], k and v [T, K, D], "
            f"found {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        )
    heads, head_dim = q.shape[1:]
    if q.shape[0] != layout.num_queries:
        raise ValueError(
            f"attention: q has {q.shape[0]} rows, the layout has {layout.num_queries} queries"
        )
    if k.shape != v.shape or k.shape[0] != layout.total_tokens or k.shape[2] != head_dim:
        raise ValueError(
            f"attention: k and v must be [{layout.total_tokens}, K, {head_dim}], "
            f"found {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"attention: q, k, v must share a dtype: {q.dtype}, {k.dtype}, {v.dtype}")
    if heads % k.shape[1]:
        raise ValueError(
            f"attention: {heads} query heads do not divide over {k.shape[1]} key heads"
        )
    if layout.device != q.device and layout.device.type != q.device.type:
        raise ValueError(f"attention: the layout is on {layout.device}, q is on {q.device}")
    if scale <= 0:
        raise ValueError(f"attention: scale must be positive, found {scale}")
    if window is not None and window < 1:
        raise ValueError(f"attention: window must be at least 1 or None, found {window}")

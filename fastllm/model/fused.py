"""A transformer block in two autograd nodes, one for each half.

The arithmetic is that of the op-by-op path in transformer.py, on the same kernels. What one node
knows, and separate nodes do not:

- the normalised rows and the product of SwiGLU cost one pass over memory to compute again, so they
  are not kept for the backward pass: half of the memory of a block's activations;
- the gradients of an input that is used twice are added up inside the matrix product that computes
  the second;
- buffers that nobody needs any more are written again.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..layout import PackedLayout
from ..ops import backend, matmul

OPS = ("rms_norm", "rope", "attention", "swiglu")


def raw_kernels(x: Tensor) -> SimpleNamespace | None:
    """The kernels of every op of a block, or None where PyTorch serves."""
    found = {op: backend.kernels(op, x) for op in OPS}
    return None if None in found.values() else SimpleNamespace(**found)


def attention_half(
    raw: SimpleNamespace,
    update: Tensor | None,
    residual: Tensor,
    norm: Any,
    weights: Sequence[Tensor],
    heads: tuple[int, int, int],
    rotary: tuple[Tensor, Tensor],
    layout: PackedLayout,
    selected: PackedLayout,
    rows: Tensor | None,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    """(update, residual) -> (attention of the normalised sum, the sum).

    Args:
        update, residual: [T, C]; no update in the first block.
        norm: the RMSNorm in front.
        weights: of the query, key, value and output projections, without biases.
        heads: H, K, D.
        rotary: cos and sin [P, D/2], fp32.
        layout: of all T tokens.
        selected: the same with queries for `rows` only.
        rows: packed rows whose output is wanted [N], int64; None for all.
        window: sliding window, or None.

    Returns:
        [N, C], [N, C].
    """
    packed = layout, selected, rows
    return _AttentionHalf.apply(
        update, residual, norm.weight, *weights, raw, norm.eps, heads, rotary, packed, window
    )


def mlp_half(
    raw: SimpleNamespace, update: Tensor, residual: Tensor, norm: Any, weights: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """(update, residual) [N, C] -> (MLP of the normalised sum, the sum).

    The weights are those of gate, up and down, without biases.
    """
    return _MLPHalf.apply(update, residual, norm.weight, *weights, raw, norm.eps)


class _AttentionHalf(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, update, residual, norm, wq, wk, wv, wo, raw, eps, heads, rotary, packed, window
    ):
        layout, selected, rows = packed
        x, h, rstd = _add_norm(raw, update, residual, norm, eps)
        asking = x if rows is None else x[rows]
        query_heads, key_heads, size = heads
        q = _times(asking, wq).view(-1, query_heads, size)
        k = _times(x, wk).view(-1, key_heads, size)
        v = _times(x, wv).view(-1, key_heads, size)
        q, k = _rotate(raw, q, k, rotary, layout.positions, rows, inverse=False)
        scale = size**-0.5
        out, lse = raw.attention.forward(q, k, v, selected, scale, window or 0)
        ctx.save_for_backward(h, rstd, q, k, v, out, lse, norm, wq, wk, wv, wo)
        ctx.raw, ctx.eps, ctx.first = raw, eps, update is None
        ctx.rotary, ctx.layout, ctx.selected, ctx.rows = rotary, layout, selected, rows
        ctx.scale, ctx.window = scale, window or 0
        return _times(out.flatten(1), wo), h if rows is None else h[rows]

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dh):
        h, rstd, q, k, v, out, lse, norm, wq, wk, wv, wo = ctx.saved_tensors
        raw, rows = ctx.raw, ctx.rows
        dy, dh = dy.contiguous(), dh.contiguous()
        needs_norm, *needs = ctx.needs_input_grad[2:7]
        dout = _back(dy, wo).view_as(out)
        dwo = _weight_gradient(dy, out.flatten(1), wo, needs[3])
        dq, dk, dv = raw.attention.backward(
            dout, q, k, v, out, lse, ctx.selected, ctx.scale, ctx.window
        )
        dq, dk = _rotate(raw, dq, dk, ctx.rotary, ctx.layout.positions, rows, inverse=True)
        dq, dk, dv = dq.flatten(1), dk.flatten(1), dv.flatten(1)
        x = raw.rms_norm.forward(h, norm.to(h.dtype), ctx.eps, None)[0]
        dwq = _weight_gradient(dq, x if rows is None else x[rows], wq, needs[0])
        dwk = _weight_gradient(dk, x, wk, needs[1])
        dwv = _weight_gradient(dv, x, wv, needs[2])
        dx = _back(dk, wk, into=x)
        _back(dv, wv, into=dx, add=True)
        if rows is None:
            _back(dq, wq, into=dx, add=True)
        else:
            dx.index_add_(0, rows, _back(dq, wq))
            dh = torch.zeros_like(h).index_copy_(0, rows, dh)
        dresidual, dnorm = raw.rms_norm.backward(dx, dh, h, norm.to(h.dtype), rstd, needs_norm)
        dupdate = None if ctx.first else dresidual
        dnorm = dnorm.to(norm.dtype) if needs_norm else None
        return dupdate, dresidual, dnorm, dwq, dwk, dwv, dwo, *[None] * 6


class _MLPHalf(torch.autograd.Function):
    @staticmethod
    def forward(ctx, update, residual, norm, w_gate, w_up, w_down, raw, eps):
        x, h, rstd = _add_norm(raw, update, residual, norm, eps)
        gate, up = _times(x, w_gate), _times(x, w_up)
        ctx.save_for_backward(h, rstd, gate, up, norm, w_gate, w_up, w_down)
        ctx.raw, ctx.eps = raw, eps
        return _times(raw.swiglu.forward(gate, up), w_down), h

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dh):
        h, rstd, gate, up, norm, w_gate, w_up, w_down = ctx.saved_tensors
        raw = ctx.raw
        dy, dh = dy.contiguous(), dh.contiguous()
        needs_norm, *needs = ctx.needs_input_grad[2:6]
        inner = raw.swiglu.forward(gate, up)
        dw_down = _weight_gradient(dy, inner, w_down, needs[2])
        dinner = _back(dy, w_down, into=inner)
        dgate, dup = raw.swiglu.backward(dinner, gate, up)
        x = raw.rms_norm.forward(h, norm.to(h.dtype), ctx.eps, None)[0]
        dw_gate = _weight_gradient(dgate, x, w_gate, needs[0])
        dw_up = _weight_gradient(dup, x, w_up, needs[1])
        dx = _back(dgate, w_gate, into=x)
        _back(dup, w_up, into=dx, add=True)
        dresidual, dnorm = raw.rms_norm.backward(dx, dh, h, norm.to(h.dtype), rstd, needs_norm)
        dnorm = dnorm.to(norm.dtype) if needs_norm else None
        return dresidual, dresidual, dnorm, dw_gate, dw_up, dw_down, None, None


def _add_norm(
    raw: SimpleNamespace, update: Tensor | None, residual: Tensor, norm: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    norm, residual = norm.to(residual.dtype), residual.contiguous()
    if update is None:
        x, _, rstd = raw.rms_norm.forward(residual, norm, eps, None)
        return x, residual, rstd
    return raw.rms_norm.forward(update.contiguous(), norm, eps, residual)


def _rotate(
    raw: SimpleNamespace,
    q: Tensor,
    k: Tensor,
    rotary: tuple[Tensor, Tensor],
    positions: Tensor,
    rows: Tensor | None,
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    if rows is None:
        return raw.rope.forward(q, k, *rotary, positions, inverse)
    # Queries and keys have different rows here: each is rotated with no partner.
    asked = positions[rows]
    rotated_q, _ = raw.rope.forward(q, q[:, :0].contiguous(), *rotary, asked, inverse)
    _, rotated_k = raw.rope.forward(k[:, :0].contiguous(), k, *rotary, positions, inverse)
    return rotated_q, rotated_k


def _times(x: Tensor, weight: Tensor) -> Tensor:
    return matmul(x, weight.to(x.dtype).t())


def _back(dy: Tensor, weight: Tensor, into: Tensor | None = None, add: bool = False) -> Tensor:
    """The gradient of x, written over (or added to) a buffer of its shape if there is one."""
    return matmul(dy, weight.to(dy.dtype), out=into, add=add)


def _weight_gradient(dy: Tensor, x: Tensor, weight: Tensor, needed: bool) -> Tensor | None:
    return matmul(dy.t(), x, dtype=weight.dtype) if needed else None

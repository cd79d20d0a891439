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

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..layout import PackedLayout
from ..ops import backend, matmul
from ..ops.rms_norm import as_weight
from ..ops.working import working
from .fused_heads import HeadTurn

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
    attention: Any,
    rotary: tuple[Tensor, Tensor],
    layout: PackedLayout,
    selected: PackedLayout,
    rows: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(update, residual) -> (attention of the normalised sum, the sum).

    Args:
        update, residual: [T, C]; no update in the first block.
        norm: the RMSNorm in front.
        attention: the module with the projections; no bias of the output's.
        rotary: cos and sin [P, D/2], fp32.
        layout: of all T tokens.
        selected: the same with queries for `rows` only.
        rows: packed rows whose output is wanted [N], int64; None for all.

    Returns:
        [N, C], [N, C].
    """
    query, key, value, output = attention.projections()
    weights = [projection.weight for projection in (query, key, value, output)]
    biases = [projection.bias for projection in (query, key, value)]
    norms = attention.norms()
    head_norms = [norms.get(name) for name in ("q_norm", "k_norm")]
    given = raw, norm.eps, norms.get("eps", 0.0), attention.heads, rotary, attention.window
    packed = layout, selected, rows
    return _AttentionHalf.apply(
        update, residual, norm.weight, *weights, *biases, *head_norms, given, packed
    )


def mlp_half(
    raw: SimpleNamespace, update: Tensor, residual: Tensor, norm: Any, mlp: Any
) -> tuple[Tensor, Tensor]:
    """(update, residual) [N, C] -> (MLP of the normalised sum, the sum); no biases."""
    weights = [projection.weight for projection in mlp.projections()]
    return _MLPHalf.apply(update, residual, norm.weight, *weights, raw, norm.eps)


class _AttentionHalf(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, update, residual, norm, wq, wk, wv, wo, bq, bk, bv, q_norm, k_norm, given, packed
    ):
        raw, eps, head_eps, heads, rotary, window = given
        layout, selected, rows = packed
        x, h, rstd = _add_norm(raw, update, residual, norm, eps)
        query_heads, key_heads, size = heads
        q = _times(x if rows is None else x[rows], wq, bq).view(-1, query_heads, size)
        k = _times(x, wk, bk).view(-1, key_heads, size)
        v = _times(x, wv, bv).view(-1, key_heads, size)
        asked = layout.positions if rows is None else layout.positions[rows]
        of_keys = None if rows is None else layout.positions
        norms = None if q_norm is None else (q_norm, k_norm)
        turn = HeadTurn(raw, rotary, asked, of_keys, norms, head_eps)
        turned = turn.there(q, k)
        scale = size**-0.5
        out, lse = raw.attention.forward(*turned, v, selected, scale, window or 0)
        q, k = turned if norms is None else (q, k)
        ctx.save_for_backward(h, rstd, q, k, v, out, lse, norm, wq, wk, wv, wo, q_norm, k_norm)
        ctx.raw, ctx.eps, ctx.first = raw, eps, update is None
        ctx.turn, ctx.selected, ctx.rows = replace(turn, norms=None), selected, rows
        ctx.scale, ctx.window = scale, window or 0
        ctx.bias_dtypes = [None if bias is None else bias.dtype for bias in (bq, bk, bv)]
        return _times(out.flatten(1), wo), h if rows is None else h[rows]

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dh):
        h, rstd, q, k, v, out, lse, norm, wq, wk, wv, wo, q_norm, k_norm = ctx.saved_tensors
        raw, rows = ctx.raw, ctx.rows
        turn = ctx.turn if q_norm is None else replace(ctx.turn, norms=(q_norm, k_norm))
        dy, dh = dy.contiguous(), dh.contiguous()
        needs_norm, *needs = ctx.needs_input_grad[2:12]
        dout = _back(dy, wo).view_as(out)
        dwo = _weight_gradient(dy, out.flatten(1), wo, needs[3])
        turned = (q, k) if q_norm is None else turn.there(q, k)
        dq, dk, dv = raw.attention.backward(
            dout, *turned, v, out, lse, ctx.selected, ctx.scale, ctx.window
        )
        dq, dk, dq_norm, dk_norm = turn.back(dq, dk, q, k, (needs[7], needs[8]))
        dq, dk, dv = dq.flatten(1), dk.flatten(1), dv.flatten(1)
        weight = as_weight(norm, h.dtype, raw.rms_norm)
        x = raw.rms_norm.forward(h, weight, ctx.eps, None)[0]
        dwq = _weight_gradient(dq, x if rows is None else x[rows], wq, needs[0])
        dwk = _weight_gradient(dk, x, wk, needs[1])
        dwv = _weight_gradient(dv, x, wv, needs[2])
        biases = [
            dy.sum(0, dtype=dtype) if needed else None
            for dy, dtype, needed in zip((dq, dk, dv), ctx.bias_dtypes, needs[4:7], strict=True)
        ]
        dx = _back(dk, wk, into=x)
        _back(dv, wv, into=dx, add=True)
        if rows is None:
            _back(dq, wq, into=dx, add=True)
        else:
            dx.index_add_(0, rows, _back(dq, wq))
            dh = torch.zeros_like(h).index_copy_(0, rows, dh)
        dresidual, dnorm = raw.rms_norm.backward(dx, dh, h, weight, rstd, needs_norm)
        dupdate = None if ctx.first else dresidual
        dnorm = dnorm.to(norm.dtype) if needs_norm else None
        weights = dwq, dwk, dwv, dwo, *biases, dq_norm, dk_norm
        return dupdate, dresidual, dnorm, *weights, None, None


class _MLPHalf(torch.autograd.Function):
    @staticmethod
    def forward(ctx, update, residual, norm, w_gate, w_up, w_down, raw, eps):
        x, h, rstd = _add_norm(raw, update, residual, norm, eps)
        gate, up = _room_for_two(x, w_gate.shape[0])
        _times(x, w_gate, out=gate)
        _times(x, w_up, out=up)
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
        weight = as_weight(norm, h.dtype, raw.rms_norm)
        x = raw.rms_norm.forward(h, weight, ctx.eps, None)[0]
        dw_gate = _weight_gradient(dgate, x, w_gate, needs[0])
        dw_up = _weight_gradient(dup, x, w_up, needs[1])
        dx = _back(dgate, w_gate, into=x)
        _back(dup, w_up, into=dx, add=True)
        dresidual, dnorm = raw.rms_norm.backward(dx, dh, h, weight, rstd, needs_norm)
        dnorm = dnorm.to(norm.dtype) if needs_norm else None
        return dresidual, dresidual, dnorm, dw_gate, dw_up, dw_down, None, None


def _room_for_two(x: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Two [N, width] that are read together: on a GPU the halves of the rows of one buffer.

    On a CPU rows that lie apart slow the products down: an RM step by 4 %.
    """
    if x.is_cuda:
        both = x.new_empty(x.shape[0], 2 * width)
        return both[:, :width], both[:, width:]
    return x.new_empty(x.shape[0], width), x.new_empty(x.shape[0], width)


def _add_norm(
    raw: SimpleNamespace, update: Tensor | None, residual: Tensor, norm: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    weight, residual = as_weight(norm, residual.dtype, raw.rms_norm), residual.contiguous()
    if update is None:
        x, _, rstd = raw.rms_norm.forward(residual, weight, eps, None)
        return x, residual, rstd
    return raw.rms_norm.forward(update.contiguous(), weight, eps, residual)


def _times(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    narrow = working(weight, x.dtype).t()
    if bias is None:
        return matmul(x, narrow, out=out)
    bias = working(bias, x.dtype)
    if x.is_cuda:  # the product itself adds the bias to its sums, before they are rounded
        return torch.addmm(bias, x, narrow)
    return matmul(x, narrow).add_(bias)


def _back(dy: Tensor, weight: Tensor, into: Tensor | None = None, add: bool = False) -> Tensor:
    """The gradient of x, written over (or added to) a buffer of its shape if there is one."""
    return matmul(dy, working(weight, dy.dtype), out=into, add=add)


def _weight_gradient(dy: Tensor, x: Tensor, weight: Tensor, needed: bool) -> Tensor | None:
    return matmul(dy.t(), x, dtype=weight.dtype) if needed else None

"""A frozen projection with a low-rank adapter beside it.

The base product has the cost, so the adapter must not read and write its result again. On a GPU the
large product adds to what the small one has written, which it reads while it multiplies. Kept for
the gradient are x, which others keep as well, and the few numbers of its product with A.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .inputs import needs_grad
from .matmul import linear, matmul
from .working import working


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scaling: float,
    dropout: float = 0.0,
) -> Tensor:
    """x weight^T + bias + scaling * dropout(x) a^T b^T.

    Args:
        x: [..., C]. weight: [O, C]. bias: [O]. a: [r, C]. b: [O, r]. The weights may be wider than
            x: they are read in its dtype, as in `linear`, and get gradients in their own.
        dropout: how likely a channel of x does not reach the adapter; the others are scaled up.

    Returns:
        [..., O] in the dtype of x.

    Raises:
        ValueError: shapes of the adapter that do not fit, or a dropout outside [0, 1).
    """
    if a.shape != (b.shape[-1], x.shape[-1]) or b.shape != (weight.shape[0], a.shape[0]):
        raise ValueError(
            f"lora_linear: expected a [r, {x.shape[-1]}] and b [{weight.shape[0]}, r], "
            f"found {tuple(a.shape)} and {tuple(b.shape)}"
        )
    if not 0 <= dropout < 1:
        raise ValueError(f"lora_linear: expected a dropout of at least 0 below 1, found {dropout}")
    rows = x.reshape(-1, x.shape[-1])
    if needs_grad(x, weight, bias, a, b):
        out = _LoRALinear.apply(rows, weight, bias, a, b, scaling, dropout)
    else:
        out = _forward(rows, weight, bias, a, b, scaling, dropout)[0]
    return out.view(*x.shape[:-1], weight.shape[0])


def lora_linear_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scaling: float,
    dropout: float = 0.0,
) -> Tensor:
    """The definition of `lora_linear` in PyTorch."""
    weight, a, b = (t.to(x.dtype) for t in (weight, a, b))
    base = F.linear(x, weight, None if bias is None else bias.to(x.dtype))
    dropped = torch.native_dropout(x, dropout, True)[0] if dropout else x
    return base + scaling * F.linear(F.linear(dropped, a), b)


class _LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scaling: float,
        dropout: float,
    ) -> Tensor:
        out, inner, mask = _forward(x, weight, bias, a, b, scaling, dropout)
        ctx.save_for_backward(x, weight, a, b, inner, mask)
        ctx.scaling, ctx.dropout = scaling, dropout
        ctx.bias_dtype = None if bias is None else bias.dtype
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, inner, mask = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, needs_a, needs_b = ctx.needs_input_grad[:5]
        dinner = _scaled_product(dout, working(b, x.dtype), ctx.scaling)
        dx = da = None
        if needs_a:
            da = matmul(dinner.t(), _dropped(x, mask, ctx.dropout), dtype=a.dtype)
        if needs_x:
            dx = _dropped(matmul(dinner, working(a, x.dtype)), mask, ctx.dropout)
            matmul(dout, working(weight, x.dtype), out=dx, add=True)
        return (
            dx,
            matmul(dout.t(), x, dtype=weight.dtype) if needs_weight else None,
            dout.sum(0, dtype=ctx.bias_dtype) if needs_bias else None,
            da,
            matmul(dout.t(), inner, dtype=b.dtype) if needs_b else None,
            None,
            None,
        )


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scaling: float,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The result, scaling * dropout(x) a^T, and what dropout kept."""
    dropped, mask = torch.native_dropout(x, dropout, True) if dropout else (x, None)
    inner = _scaled_product(dropped, working(a, x.dtype).t(), scaling)
    columns = working(b, x.dtype).t()
    if not x.is_cuda:
        # Without the adapter's part, every bit is that of the layer alone.
        out = linear(x, weight, bias)
        return matmul(inner, columns, out=out, add=True), inner, mask
    if bias is None:
        out = matmul(inner, columns)
    else:
        out = torch.addmm(working(bias, x.dtype), inner, columns)
    return matmul(x, working(weight, x.dtype).t(), out=out, add=True), inner, mask


def _scaled_product(a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """scaling * a b of few columns, rounded once, in the dtype of a."""
    wide = torch.promote_types(a.dtype, torch.float32)
    return matmul(a, b, dtype=wide).mul_(scaling).to(a.dtype)


def _dropped(x: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    return x if mask is None else torch.ops.aten.native_dropout_backward(x, mask, 1 / (1 - dropout))

"""A reward model's head and its pairwise loss, from the hidden states of the scored tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import backend, cpp
from .pairwise_loss import pairwise_loss, pairwise_loss_reference

Result = tuple[Tensor, Tensor, Tensor]


def reward_loss(
    hidden: Tensor,
    weight: Tensor,
    chosen: Tensor,
    rejected: Tensor,
    margin: Tensor | None = None,
    centering: float = 0.0,
) -> Result:
    """`pairwise_loss` of scores = hidden weight^T, and what is logged of a reward model.

    Args:
        hidden: last hidden states of the scored sequences [N, C], fp32, bf16 or fp16.
        weight: the head [1, C]; it is read in its own dtype.
        chosen, rejected: row of `hidden` of each side of each pair [P], integers in 0..N-1. A row
            may belong to several pairs, or to none.
        margin: how much better the chosen side should score [P].
        centering: weight of the term that keeps scores around zero.

    Returns:
        The loss, a scalar; and without gradient the scores [N], and five metrics: over the pairs,
        how many have a chosen side that scores higher, and the sum of the differences; over the
        scores the smallest; over the pairs the sum of their mean scores; over the scores the
        largest. fp32 (fp64 for fp64 hidden states).

    Raises:
        ValueError: shapes that do not fit, or no pairs.
    """
    _check(hidden, weight, chosen, rejected, margin)
    raw = backend.kernels("pairwise_loss", hidden, weight, chosen, rejected, margin)
    if raw is None:
        return reward_loss_reference(hidden, weight, chosen, rejected, margin, centering)
    if raw is cpp.pairwise_loss:
        return _composed(pairwise_loss, hidden, weight, chosen, rejected, margin, centering)
    raw = backend.kernels("reward_loss", hidden)
    return _RewardLoss.apply(hidden, weight, chosen, rejected, margin, centering, raw)


def reward_loss_reference(
    hidden: Tensor,
    weight: Tensor,
    chosen: Tensor,
    rejected: Tensor,
    margin: Tensor | None = None,
    centering: float = 0.0,
) -> Result:
    """The definition of `reward_loss` in PyTorch."""
    return _composed(pairwise_loss_reference, hidden, weight, chosen, rejected, margin, centering)


def reward_scores(hidden: Tensor, weight: Tensor) -> Tensor:
    """hidden [N, C] times the head [1, C], in fp32 (fp64 for fp64 hidden states): [N]."""
    # The head is tiny and its scores are compared with each other: fp32 costs nothing.
    wide = torch.promote_types(hidden.dtype, torch.float32)
    return torch.mv(hidden.to(wide), weight[0].to(wide))


def _composed(
    loss_of: Any,
    hidden: Tensor,
    weight: Tensor,
    chosen: Tensor,
    rejected: Tensor,
    margin: Tensor | None,
    centering: float,
) -> Result:
    scores = reward_scores(hidden, weight)
    better, worse = scores[chosen], scores[rejected]
    loss = loss_of(better, worse, margin, centering)
    every, gap = scores.detach(), (better - worse).detach()
    metrics = (
        (gap > 0).sum().to(gap.dtype),
        gap.sum(),
        every.min(),
        (better + worse).detach().sum() / 2,
        every.max(),
    )
    return loss, every, torch.stack(metrics)


class _RewardLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        chosen: Tensor,
        rejected: Tensor,
        margin: Tensor | None,
        centering: float,
        raw: Any,
    ) -> Result:
        rows = hidden if hidden.stride(1) == 1 else hidden.contiguous()
        head = weight.view(-1) if weight.is_contiguous() else weight.reshape(-1)
        margin = None if margin is None else margin.contiguous()
        loss, scores, metrics, dscores = raw.forward(
            rows, head, chosen.long().contiguous(), rejected.long().contiguous(), margin, centering
        )
        ctx.save_for_backward(dscores, rows, weight)
        ctx.raw = raw
        ctx.mark_non_differentiable(scores, metrics)
        ctx.set_materialize_grads(False)
        return loss, scores, metrics

    @staticmethod
    def backward(ctx: Any, dloss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if dloss is None:
            return (None,) * 7
        dscores, rows, weight = ctx.saved_tensors
        needs_weight = ctx.needs_input_grad[1]
        dhidden, dweight = ctx.raw.backward(dloss, dscores, rows, weight.reshape(-1), needs_weight)
        return (
            dhidden if ctx.needs_input_grad[0] else None,
            dweight.view_as(weight).to(weight.dtype) if needs_weight else None,
            *[None] * 5,
        )


def _check(
    hidden: Tensor, weight: Tensor, chosen: Tensor, rejected: Tensor, margin: Tensor | None
) -> None:
    if hidden.dim() != 2 or weight.shape != (1, hidden.shape[1]):
        raise ValueError(
            "reward_loss: expected hidden [N, C] and weight [1, C], "
            f"found {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    for name, one in (("chosen", chosen), ("rejected", rejected), ("margin", margin)):
        if one is not None and (one.dim() != 1 or one.shape != chosen.shape):
            raise ValueError(
                f"reward_loss: {name} must be [P] like chosen {tuple(chosen.shape)}, "
                f"found {tuple(one.shape)}"
            )
    if chosen.is_floating_point() or rejected.is_floating_point():
        raise ValueError(
            f"reward_loss: chosen and rejected must be rows, found {chosen.dtype}, {rejected.dtype}"
        )
    if chosen.numel() == 0:
        raise ValueError("reward_loss: expected at least one pair, found none")

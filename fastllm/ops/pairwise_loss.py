"""Pairwise reward loss (Bradley & Terry, 1952; margin as in Llama 2, centring as in TRL)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import backend


def pairwise_loss(
    chosen: Tensor, rejected: Tensor, margin: Tensor | None = None, centering: float = 0.0
) -> Tensor:
    """mean(-logsigmoid(chosen - rejected - margin)) + centering * mean((chosen + rejected)^2).

    Args:
        chosen, rejected: scores of the two sides [P], fp32, bf16 or fp16.
        margin: how much better the chosen side should score [P].
        centering: weight of the term that keeps scores around zero (Eisenstein et al., 2023).

    Returns:
        Scalar, fp32 (fp64 for fp64 scores).

    Raises:
        ValueError: shapes that differ, or no pairs.
    """
    for name, scores in (("chosen", chosen), ("rejected", rejected), ("margin", margin)):
        if scores is not None and (scores.dim() != 1 or scores.shape != chosen.shape):
            raise ValueError(
                f"pairwise_loss: {name} must be [P] like chosen {tuple(chosen.shape)}, "
                f"found {tuple(scores.shape)}"
            )
    if chosen.numel() == 0:
        raise ValueError("pairwise_loss: expected at least one pair, found none")
    raw = backend.kernels("pairwise_loss", chosen, rejected, margin)
    if raw is None:
        return pairwise_loss_reference(chosen, rejected, margin, centering)
    return _PairwiseLoss.apply(chosen, rejected, margin, centering, raw)


def pairwise_loss_reference(
    chosen: Tensor, rejected: Tensor, margin: Tensor | None = None, centering: float = 0.0
) -> Tensor:
    """The definition of `pairwise_loss` in PyTorch."""
    wide = torch.promote_types(chosen.dtype, torch.float32)
    chosen, rejected = chosen.to(wide), rejected.to(wide)
    difference = chosen - rejected if margin is None else chosen - rejected - margin.to(wide)
    return -F.logsigmoid(difference).mean() + centering * (chosen + rejected).square().mean()


class _PairwiseLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        chosen: Tensor,
        rejected: Tensor,
        margin: Tensor | None,
        centering: float,
        raw: Any,
    ) -> Tensor:
        # The margin is data, not a score: it takes the dtype of the scores and no gradient.
        margin = None if margin is None else margin.to(chosen.dtype).contiguous()
        loss, dchosen, drejected = raw.forward(
            chosen.contiguous(), rejected.contiguous(), margin, centering
        )
        ctx.save_for_backward(dchosen, drejected)
        ctx.dtypes = chosen.dtype, rejected.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        dchosen, drejected = ctx.saved_tensors
        chosen_dtype, rejected_dtype = ctx.dtypes
        return (
            (dloss * dchosen).to(chosen_dtype),
            (dloss * drejected).to(rejected_dtype),
            *[None] * 3,
        )

"""Bradley-Terry loss of score pairs, with a margin and a centring term; loss and gradients at once.

A batch has few pairs, so the cost is the launch: one program does everything, in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import config
from .launch import launch, on_tensor_device

TUNABLE = {
    "pairwise_loss_kernel": {
        "BLOCK": (128, 256, 512, 1024, 4096),
        "num_warps": (1, 4, 8, 32),
        "num_stages": (1,),
    }
}


@on_tensor_device
def forward(
    chosen: Tensor, rejected: Tensor, margin: Tensor | None, centering: float
) -> tuple[Tensor, Tensor, Tensor]:
    """mean(softplus(-(chosen - rejected - margin))) + centering * mean((chosen + rejected)^2).

    Args:
        chosen, rejected: [P]; margin: [P] or None.

    Returns:
        The loss [], and its gradients with respect to chosen and rejected [P], all fp32.
    """
    loss = torch.empty((), dtype=torch.float32, device=chosen.device)
    dchosen = torch.empty_like(chosen, dtype=torch.float32)
    drejected = torch.empty_like(dchosen)
    launch(
        pairwise_loss_kernel,
        (1,),
        chosen,
        rejected,
        margin,
        loss,
        dchosen,
        drejected,
        chosen.numel(),
        centering,
        **config("pairwise_loss_kernel", chosen.dtype, chosen.numel()),
    )
    return loss, dchosen, drejected


@triton.jit(do_not_specialize=["num_pairs", "centering"])
def pairwise_loss_kernel(
    chosen_ptr,
    rejected_ptr,
    margin_ptr,
    loss_ptr,
    dchosen_ptr,
    drejected_ptr,
    num_pairs,
    centering,
    BLOCK: tl.constexpr,
):
    centering = tl.cast(centering, tl.float32)
    losses = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, num_pairs, BLOCK):
        offsets = first + tl.arange(0, BLOCK).to(tl.int64)
        mask = offsets < num_pairs
        chosen = tl.load(chosen_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        rejected = tl.load(rejected_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        difference = chosen - rejected
        if margin_ptr is not None:
            difference -= tl.load(margin_ptr + offsets, mask=mask, other=0.0).to(tl.float32)

        loss, dchosen, drejected = pair_loss(chosen, rejected, difference, centering)
        losses += tl.where(mask, loss, 0.0)
        tl.store(dchosen_ptr + offsets, dchosen / num_pairs, mask=mask)
        tl.store(drejected_ptr + offsets, drejected / num_pairs, mask=mask)
    tl.store(loss_ptr, tl.sum(losses, axis=0) / num_pairs)


@triton.jit
def pair_loss(chosen, rejected, difference, centering):
    """The loss of each pair, and its gradients with respect to both scores."""
    # softplus(-d) = max(-d, 0) + log(1 + exp(-|d|)) never overflows.
    small = tl.exp(-tl.abs(difference))
    total = chosen + rejected
    loss = tl.maximum(-difference, 0.0) + log1p(small) + centering * total * total
    # The loss falls by sigmoid(-d) for each unit of d.
    slope = tl.where(difference >= 0, small, 1.0) / (1.0 + small)
    pull = 2.0 * centering * total
    return loss, pull - slope, pull + slope


@triton.jit
def log1p(x):
    """log(1 + x) for 0 <= x <= 1, exact where 1 + x rounds to 1 (Kahan)."""
    rounded = 1.0 + x
    error = x - (rounded - 1.0)
    return tl.log(rounded) + error / rounded

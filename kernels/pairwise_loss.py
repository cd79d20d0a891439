"""Bradley-Terry loss of score pairs, with a margin and a centring term; loss and gradients at once.

A batch has few pairs, so the cost is the launch: one program does everything, in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import num_warps, on_tensor_device, schedule

_BLOCK = 1024


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
    pairs = chosen.numel()
    block = min(_BLOCK, max(32, triton.next_power_of_2(pairs)))
    pairwise_loss_kernel[(1,)](
        chosen,
        rejected,
        margin,
        loss,
        dchosen,
        drejected,
        pairs,
        centering,
        BLOCK=block,
        **schedule(num_warps(block, per_thread=4)),
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

        # softplus(-d) = max(-d, 0) + log(1 + exp(-|d|)) never overflows.
        small = tl.exp(-tl.abs(difference))
        total = chosen + rejected
        loss = tl.maximum(-difference, 0.0) + log1p(small) + centering * total * total
        losses += tl.where(mask, loss, 0.0)

        # The loss falls by sigmoid(-d) for each unit of d.
        slope = tl.where(difference >= 0, small, 1.0) / (1.0 + small)
        pull = 2.0 * centering * total
        tl.store(dchosen_ptr + offsets, (pull - slope) / num_pairs, mask=mask)
        tl.store(drejected_ptr + offsets, (pull + slope) / num_pairs, mask=mask)
    tl.store(loss_ptr, tl.sum(losses, axis=0) / num_pairs)


@triton.jit
def log1p(x):
    """log(1 + x) for 0 <= x <= 1, exact where 1 + x rounds to 1 (Kahan)."""
    rounded = 1.0 + x
    error = x - (rounded - 1.0)
    return tl.log(rounded) + error / rounded

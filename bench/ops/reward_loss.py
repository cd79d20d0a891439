"""reward_loss: a batch of scored tokens is small, and a trainer runs ten operations on it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases import Case, Peer, Suite
from fastllm.ops import reward_loss, reward_loss_reference


def case(pairs: int, channels: int) -> Case:
    """P pairs: 2 P rows of C channels."""
    return Case(
        f"{pairs}x{channels}",
        lambda: {
            "hidden": torch.randn(2 * pairs, channels),
            "weight": torch.randn(1, channels) * channels**-0.5,
            "chosen": torch.arange(pairs) * 2,
            "rejected": torch.arange(pairs) * 2 + 1,
        },
        ("hidden", "weight"),
        elements=2 * pairs * channels,
        both=3.0,
    )


def ours(**given: Tensor) -> Tensor:
    """The op, as a loss."""
    return reward_loss(**given)[0]


def reference(**given: Tensor) -> Tensor:
    """Its definition, as a loss."""
    return reward_loss_reference(**given)[0]


def trainer(hidden: Tensor, weight: Tensor, chosen: Tensor, rejected: Tensor) -> Tensor:
    """As trainers write it, with what they log."""
    rewards = (hidden.float() @ weight.float().t()).squeeze(-1)
    better, worse = rewards[chosen], rewards[rejected]
    loss = -F.logsigmoid(better - worse).mean()
    with torch.no_grad():
        (better > worse).float().mean()
        (better - worse).mean()
        rewards.min(), rewards.mean(), rewards.max()
    return loss


SUITE = Suite(
    ours,
    reference,
    (case(8, 1024), case(32, 4096), case(256, 4096)),
    {"trainer": Peer(trainer)},
    fp32=("weight",),
)

"""pairwise_loss: at training sizes the cost is the calls, at a million pairs the traffic."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases import Case, Peer, Suite
from fastllm.ops import pairwise_loss, pairwise_loss_reference


def case(pairs: int) -> Case:
    """P pairs."""
    return Case(
        str(pairs),
        lambda: {"chosen": torch.randn(pairs), "rejected": torch.randn(pairs)},
        ("chosen", "rejected"),
        elements=2 * pairs,
        both=3.0,
    )


def torch_function(chosen: Tensor, rejected: Tensor) -> Tensor:
    """As trainers usually write it, without the centring term."""
    return -F.logsigmoid((chosen - rejected).float()).mean()


SUITE = Suite(
    pairwise_loss,
    pairwise_loss_reference,
    (case(8), case(1 << 20)),
    {"F.logsigmoid": Peer(torch_function)},
)

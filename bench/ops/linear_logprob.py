"""linear_logprob: three products of N x C x V (the logits that are computed again not counted).

Two forms: the loss of SFT, a sum over all tokens, and one log-probability per token, as GRPO
needs. PyTorch's chunked head, F.linear_cross_entropy, has the first only.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases import Case, Peer, Suite
from fastllm.ops import linear_cross_entropy, linear_logprob, linear_logprob_reference


def case(rows: int, channels: int, vocabulary: int, summed: bool, memory: bool = False) -> Case:
    """N hidden states of C channels against V tokens."""
    return Case(
        f"{rows}x{channels}x{vocabulary} {'sum' if summed else 'per token'}",
        lambda: {
            "hidden": torch.randn(rows, channels),
            "weight": torch.randn(vocabulary, channels) * channels**-0.5,
            "targets": torch.randint(vocabulary, (rows,)),
            "summed": summed,
        },
        ("hidden", "weight"),
        flops=2 * rows * channels * vocabulary,
        both=3.0,
        memory=memory,
    )


def ours(hidden: Tensor, weight: Tensor, targets: Tensor, summed: bool) -> Tensor:
    """The op, as a loss; a sum knows the weight of every token beforehand."""
    if summed:
        return linear_cross_entropy(hidden, weight, targets)[0]
    logp = linear_logprob(hidden, weight, targets)
    assert isinstance(logp, Tensor)
    return -logp


def reference(hidden: Tensor, weight: Tensor, targets: Tensor, summed: bool) -> Tensor:
    """Its definition, as a loss."""
    logp = linear_logprob_reference(hidden, weight, targets)
    assert isinstance(logp, Tensor)
    return -logp.sum() if summed else -logp


def all_logits(hidden: Tensor, weight: Tensor, targets: Tensor, summed: bool) -> Tensor:
    """As models of transformers do it: all logits at once, and the loss in fp32."""
    logits = F.linear(hidden, weight).float()
    return F.cross_entropy(logits, targets, reduction="sum" if summed else "none")


def chunked(hidden: Tensor, weight: Tensor, targets: Tensor, summed: bool) -> Tensor:
    """PyTorch's head that keeps no logits."""
    options = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if options is None or not summed:
        raise NotImplementedError
    return F.linear_cross_entropy(hidden, weight, targets, reduction="sum", options=options())


SUITE = Suite(
    ours,
    reference,
    (
        case(2048, 128, 259, summed=True),
        case(1024, 768, 32000, summed=True, memory=True),
        case(1024, 768, 32000, summed=False),
    ),
    {"all logits": Peer(all_logits), "F.linear_cross_entropy": Peer(chunked)},
    compiled="all logits",
)

"""linear_logprob: three products of N x C x V (the logits that are computed again not counted)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import Case, Suite
from fastllm.ops import linear_logprob, linear_logprob_reference


def case(rows: int, channels: int, vocabulary: int) -> Case:
    """N hidden states of C channels against V tokens."""
    return Case(
        f"{rows}x{channels}x{vocabulary}",
        lambda: {
            "hidden": torch.randn(rows, channels),
            "weight": torch.randn(vocabulary, channels) * channels**-0.5,
            "targets": torch.randint(vocabulary, (rows,)),
        },
        ("hidden", "weight"),
        flops=2 * rows * channels * vocabulary,
        both=3.0,
    )


def torch_function(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """As trainers usually write it: all logits at once."""
    return -F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="none")


SUITE = Suite(
    linear_logprob,
    linear_logprob_reference,
    (case(2048, 128, 259), case(1024, 768, 32000)),
    {"F.cross_entropy": torch_function},
)

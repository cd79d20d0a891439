"""lora_linear: the base product and, beside it, a few passes over its operands."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases import Case, Peer, Suite
from fastllm.ops import lora_linear, lora_linear_reference

SCALING = 2.0


def case(rows: int, channels: int, outputs: int, rank: int) -> Case:
    """N rows of C channels, projected to O; a frozen base with an adapter of rank r."""
    return Case(
        f"{rows}x{channels}x{outputs} rank {rank}",
        lambda: {
            "x": torch.randn(rows, channels),
            "weight": torch.randn(outputs, channels) * channels**-0.5,
            "a": torch.randn(rank, channels) * channels**-0.5,
            "b": torch.randn(outputs, rank),
        },
        ("x", "a", "b"),
        flops=2 * rows * (channels * outputs + rank * (channels + outputs)),
        both=2.0,
    )


def ours(x: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The op."""
    return lora_linear(x, weight, None, a, b, SCALING)


def reference(x: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Its definition, as PEFT computes it."""
    return lora_linear_reference(x, weight, None, a, b, SCALING)


def base(x: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The projection without its adapter: how much the adapter costs."""
    # Something must depend on the adapter for its gradient to exist.
    return F.linear(x, weight) + 0 * (a.sum() + b.sum())


SUITE = Suite(
    ours,
    reference,
    (case(512, 768, 768, 16), case(1024, 1024, 4096, 16)),
    {"base alone": Peer(base, same=False)},
)

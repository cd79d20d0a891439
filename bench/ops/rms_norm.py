"""rms_norm with the residual add fused in: moves x, residual, y, h, and as much again back."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases import Case, Peer, Suite
from fastllm.ops import rms_norm, rms_norm_reference


def case(rows: int, channels: int) -> Case:
    """N rows of C channels."""
    return Case(
        f"{rows}x{channels}",
        lambda: {
            "x": torch.randn(rows, channels),
            "weight": torch.randn(channels),
            "residual": torch.randn(rows, channels),
        },
        ("x", "weight", "residual"),
        elements=4 * rows * channels,
    )


def torch_function(x: Tensor, weight: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """PyTorch's own op."""
    h = x + residual
    return F.rms_norm(h, h.shape[-1:], weight, eps=1e-6), h


SUITE = Suite(
    rms_norm,
    rms_norm_reference,
    (case(4096, 128), case(2048, 768), case(4096, 2048)),
    {"F.rms_norm": Peer(torch_function)},
)

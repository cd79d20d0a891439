"""swiglu: 3 tensors forward, 5 backward."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases import Case, Peer, Suite
from fastllm.ops import swiglu, swiglu_reference


def case(rows: int, width: int) -> Case:
    """N rows of F channels."""
    return Case(
        f"{rows}x{width}",
        lambda: {"gate": torch.randn(rows, width), "up": torch.randn(rows, width)},
        ("gate", "up"),
        elements=3 * rows * width,
        both=8 / 3,
    )


def torch_function(gate: Tensor, up: Tensor) -> Tensor:
    """As models are usually written, without the detour through fp32."""
    return F.silu(gate) * up


SUITE = Suite(
    swiglu,
    swiglu_reference,
    (case(4096, 344), case(2048, 2048), case(4096, 5632)),
    {"F.silu": Peer(torch_function)},
)

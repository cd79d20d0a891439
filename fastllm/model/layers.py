"""The two layers that everything is made of."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .. import ops

# Rows that the second-level cache holds: a product with packed panels reads them once for each.
_FEW_NUMBERS = 1 << 18


class Linear(nn.Linear):
    """A linear layer that computes in the dtype of its input; its weights may be wider."""

    packed: Callable[[Tensor], Tensor] | None = None
    """A product with a copy of the weight that serves for now; see generation/native_step.py."""

    def forward(self, x: Tensor) -> Tensor:
        if self.packed is not None and x.numel() <= _FEW_NUMBERS:
            return self.packed(x)
        return ops.linear(x, self.weight, self.bias)


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps)  # type: ignore[return-value]

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised x + residual, and x + residual."""
        return ops.rms_norm(x, self.weight, self.eps, residual)  # type: ignore[return-value]

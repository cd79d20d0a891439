"""The two layers that everything is made of."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import ops


class Linear(nn.Linear):
    """A linear layer that computes in the dtype of its input; its weights may be wider."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return ops.linear(x, self.weight.to(x.dtype), bias)


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

"""Weighted means of metrics between two log lines, summed on the device without waiting."""

from __future__ import annotations

import torch
from torch import Tensor

from . import distributed

# A metric of one pass: (sum, weight). Tensors stay on their device until a line is logged.
Metric = tuple[Tensor | float, Tensor | float]


class Averages:
    """Accumulates metrics as (sum, weight) pairs."""

    def __init__(self) -> None:
        self._sums: dict[str, Metric] = {}

    def add(self, metrics: dict[str, Metric]) -> None:
        for name, (total, weight) in metrics.items():
            before = self._sums.get(name, (0.0, 0.0))
            total = total.detach() if isinstance(total, Tensor) else total
            self._sums[name] = (before[0] + total, before[1] + weight)

    def pop(self) -> dict[str, float]:
        """Means over all ranks, and start again. Metrics without weight are left out."""
        means = {}
        for name, (total, weight) in self._sums.items():
            total, weight = distributed.all_reduce_sum(
                torch.tensor([float(total), float(weight)], dtype=torch.float64)
            ).tolist()
            if weight:
                means[name] = total / weight
        self._sums.clear()
        return means

    def state(self) -> dict[str, list[float]]:
        """What a checkpoint keeps, so that a resumed run logs the same lines."""
        return {name: [float(total), float(weight)] for name, (total, weight) in self._sums.items()}

    def restore(self, state: dict[str, list[float]]) -> None:
        self._sums = {name: (total, weight) for name, (total, weight) in state.items()}

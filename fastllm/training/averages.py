"""Weighted means of metrics between two log lines, summed on the device without waiting."""

from __future__ import annotations

from collections.abc import Iterable

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
        names = _of_all_ranks(self._sums)
        own = [[float(part) for part in self._sums.get(name, (0.0, 0.0))] for name in names]
        table = distributed.all_reduce_sum(torch.tensor(own, dtype=torch.float64).view(-1, 2))
        self._sums.clear()
        sums = zip(names, table.tolist(), strict=True)
        return {name: total / weight for name, (total, weight) in sums if weight}

    def state(self) -> dict[str, list[float]]:
        """What a checkpoint keeps, so that a resumed run logs the same lines."""
        return {name: [float(total), float(weight)] for name, (total, weight) in self._sums.items()}

    def restore(self, state: dict[str, list[float]]) -> None:
        self._sums = {name: (total, weight) for name, (total, weight) in state.items()}


def _of_all_ranks(names: Iterable[str]) -> list[str]:
    """Names that any rank has, in the same order on all: often one rank alone measured something,
    such as the length of a completion that ended."""
    if distributed.world_size() == 1:
        return list(names)
    text = "\n".join(names).encode()
    width = distributed.all_reduce_max(len(text))
    rows = torch.zeros(distributed.world_size(), width, dtype=torch.uint8)
    rows[distributed.rank(), : len(text)] = torch.tensor(list(text), dtype=torch.uint8)
    texts = [bytes(row).rstrip(b"\0").decode() for row in distributed.all_reduce_sum(rows).tolist()]
    return sorted({name for text in texts for name in text.split("\n") if name})

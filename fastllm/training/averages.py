"""Weighted means of metrics between two log lines, gathered without waiting for the device."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from . import distributed

# A metric of one pass: (sum, weight). Tensors stay on their device until a line is logged.
Metric = tuple[Tensor | float, Tensor | float]

_UNREAD = 4096
"""Scalars that may wait on the device. Reading them is a wait for it, but a rare one."""


class Averages:
    """Accumulates metrics as (sum, weight) pairs, in fp64 and in the order they come in."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, float]] = {}
        self._names: list[str] = []
        self._unread: list[Tensor | float] = []

    def add(self, metrics: dict[str, Metric]) -> None:
        for name, metric in metrics.items():
            self._names.append(name)
            self._unread += map(_waiting, metric)
        if len(self._unread) > _UNREAD:
            self._read()

    def pop(self) -> dict[str, float]:
        """Means over all ranks, and start again. Metrics without weight are left out."""
        self._read()
        names = _of_all_ranks(self._sums)
        own = [self._sums.get(name, (0.0, 0.0)) for name in names]
        table = distributed.all_reduce_sum(torch.tensor(own, dtype=torch.float64).view(-1, 2))
        self._sums.clear()
        sums = zip(names, table.tolist(), strict=True)
        return {name: total / weight for name, (total, weight) in sums if weight}

    def state(self) -> dict[str, list[float]]:
        """What a checkpoint keeps, so that a resumed run logs the same lines."""
        self._read()
        return {name: list(sums) for name, sums in self._sums.items()}

    def restore(self, state: dict[str, list[float]]) -> None:
        self._sums = {name: (total, weight) for name, (total, weight) in state.items()}

    def _read(self) -> None:
        values = iter(on_host(self._unread))
        for name in self._names:
            total, weight = self._sums.get(name, (0.0, 0.0))
            self._sums[name] = total + next(values), weight + next(values)
        self._names.clear()
        self._unread.clear()


def _waiting(scalar: Tensor | float) -> Tensor | float:
    """A scalar that may wait: on the CPU its value, on a device a tensor without its graph.

    A small tensor kept on the CPU would sit in the middle of the memory of the step's large
    buffers, which then no longer fits the next step's: 0.4 MB a step were lost.
    """
    if not isinstance(scalar, Tensor):
        return scalar
    return float(scalar) if scalar.device.type == "cpu" else scalar.detach()


def on_host(scalars: Sequence[Tensor | float]) -> list[float]:
    """The values of scalars; those on a device come over together, in one transfer."""
    far: dict[torch.dtype, list[int]] = {}
    for index, x in enumerate(scalars):
        if isinstance(x, Tensor) and x.device.type != "cpu":
            far.setdefault(x.dtype, []).append(index)
    if not far:
        return [float(x) for x in scalars]
    # One launch for each dtype, not for each scalar.
    stacks = [torch.stack([scalars[i] for i in indices]) for indices in far.values()]  # type: ignore[misc]
    wide = torch.float32 if stacks[0].device.type == "mps" else torch.float64  # MPS has no fp64
    values = torch.cat([stack.to(wide) for stack in stacks]).tolist()
    found = dict(zip((i for indices in far.values() for i in indices), values, strict=True))
    return [found[i] if i in found else float(x) for i, x in enumerate(scalars)]


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

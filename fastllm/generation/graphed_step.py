"""The token step replayed from CUDA graphs: what a GPU does for a token costs one launch.

A graph is for fixed shapes, so the batch is padded to the next power of two, and so is the number
of prompts. A row of padding is the last row once more: it writes what that one writes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields

import numpy as np
import torch
from torch import Tensor

from ..model import Transformer
from .batch import Drawn, RunningBatch
from .cache import BlockCache
from .token_step import OpByOpStep, StepRows

_NAMES = tuple(field.name for field in fields(StepRows))


class GraphedStep(OpByOpStep):
    """A `TokenStep` whose layers are captured once for each size of the batch.

    Args:
        model: computes in evaluation mode.
        cache: keeps the keys and values.
        capture: False computes the padded batch op by op, on any device.

    Raises:
        ValueError: the model is on a device that has no CUDA graphs.
    """

    def __init__(self, model: Transformer, cache: BlockCache, capture: bool = True) -> None:
        if capture and cache.device.type != "cuda":
            raise ValueError(f"step: 'graphs' needs a CUDA device, the model is on {cache.device}")
        super().__init__(model, cache, "asked for")
        self.description = f"CUDA graphs on {cache.device}"
        self._capture = capture
        self._longest = model.config.max_position_embeddings
        self._sizes: dict[tuple[int, int], _Fixed] = {}
        self._bound: tuple[int, ...] = ()
        self._widths = 1, 1

    def __call__(self, batch: RunningBatch, steps: int) -> Drawn:
        widths = batch.tail_blocks.shape[1], batch.prefix_blocks.shape[1]
        if self._bound != (*widths, self._cache.version):
            # What the graphs read has moved, or has another shape.
            self._sizes.clear()
            self._bound, self._widths = (*widths, self._cache.version), widths
        return super().__call__(batch, steps)

    def _logits(self, rows: StepRows[np.ndarray]) -> Tensor:
        used = len(rows.token)
        size = _power_of_two(used), _power_of_two(len(rows.prefix_length))
        if size not in self._sizes:
            self._sizes[size] = _Fixed(*size, *self._widths, self._cache.device)
        fixed = self._sizes[size]
        fixed.fill(rows)
        # A table of angles for any position, so that it never moves either.
        return fixed.run(lambda: self._compute(fixed.rows, self._longest), self._capture)[:used]


class _Fixed:
    """Tensors of fixed address and shape, and the graph that reads them.

    Args:
        batch: rows (B).
        prompts: G.
        tail_blocks: J. prefix_blocks: Jp.
    """

    def __init__(
        self, batch: int, prompts: int, tail_blocks: int, prefix_blocks: int, device: torch.device
    ) -> None:
        shapes = {name: (batch,) for name in _NAMES} | {
            "tail_blocks": (batch, tail_blocks),
            "prefix_length": (prompts,),
            "prefix_blocks": (prompts, prefix_blocks),
        }
        sizes = [int(np.prod(shape)) for shape in shapes.values()]
        on_gpu = device.type == "cuda"
        self._host = torch.zeros(sum(sizes), dtype=torch.int32, pin_memory=on_gpu)
        self._device = torch.zeros(sum(sizes), dtype=torch.int32, device=device)
        self._views = StepRows(
            *(
                part.view(shape).numpy()
                for part, shape in zip(self._host.split(sizes), shapes.values(), strict=True)
            )
        )
        self.rows = StepRows(
            *(
                part.view(shape)
                for part, shape in zip(self._device.split(sizes), shapes.values(), strict=True)
            )
        )
        self._graph: torch.cuda.CUDAGraph | None = None
        self._result: Tensor | None = None

    def fill(self, rows: StepRows[np.ndarray]) -> None:
        """Put a batch in, and rows of padding after it."""
        for name in _NAMES:
            source, into = getattr(rows, name), getattr(self._views, name)
            into[tuple(slice(size) for size in source.shape)] = source
            into[len(source) :] = 0 if name.startswith("prefix") else into[len(source) - 1]
        self._device.copy_(self._host, non_blocking=True)

    def run(self, compute: Callable[[], Tensor], capture: bool) -> Tensor:
        """What `compute` makes of the rows, by the graph once there is one."""
        if not capture:
            return compute()
        if self._graph is None:
            self._warm_up(compute)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._result = compute()
        self._graph.replay()
        assert self._result is not None
        return self._result

    @staticmethod
    def _warm_up(compute: Callable[[], Tensor]) -> None:
        """Compile kernels and make tables and workspaces, none of which a graph may do."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                compute()
        torch.cuda.current_stream().wait_stream(stream)


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()

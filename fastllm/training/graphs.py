"""Passes replayed from CUDA graphs: a forward and backward pass costs the host one launch.

A graph is for fixed shapes and addresses. Batches come with rounded sizes (see buckets.py), all of
their tensors in one buffer (see prefetch.py), so that one copy fills the buffer that a graph reads.
The gradients are added to tensors that stay where they are.

Sizes that come for the first time are computed op by op, which compiles kernels and makes their
workspaces; when they come again, the pass is captured.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..model.lora import adapters
from ..ops import backend
from ..ops.working import refresh_copies
from .averages import Metric
from .optimizer import Optimizer
from .passes import LossFn, Pass
from .prefetch import Bytes, Parcel, unpack

_log = logging.getLogger("fastllm")

MOST_GRAPHS = 32
"""Graphs share one pool of memory, but each has its launches: some megabytes of a large model."""


def check(model: Any, device: torch.device) -> None:
    """Refuse now what no graph can be captured of.

    Raises:
        ValueError: naming it.
    """
    if device.type != "cuda":
        raise ValueError(f"cuda_graphs: expected a CUDA device, found {device}")
    if any(adapter.dropout.p > 0 for adapter in adapters(model)):
        raise ValueError("cuda_graphs: expected lora_dropout 0, a replay would drop the same again")
    if backend.kernels("attention", next(model.parameters())) is None:
        raise ValueError("cuda_graphs: expected the Triton kernels, PyTorch's attention waits")


class GraphedPasses:
    """Forward and backward passes of one run.

    Args:
        model: what is trained; its parameters stay where they are.
        loss_fn: as the loop takes it; metrics that depend on the data are tensors.
        optimizer: scales the loss and takes the gradients.
        capture: False computes the padded passes op by op, on any device.
        most: graphs that are kept, those used last.
    """

    def __init__(
        self,
        model: Any,
        loss_fn: LossFn,
        optimizer: Optimizer,
        capture: bool = True,
        most: int = MOST_GRAPHS,
    ) -> None:
        self._model, self._loss_fn, self._optimizer = model, loss_fn, optimizer
        self._capture, self._most = capture, most
        self._device = next(model.parameters()).device
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._gradients = [torch.zeros_like(p) for p in self._parameters]
        self._graphs: OrderedDict[Bytes, _Graph] = OrderedDict()
        self._seen: set[Bytes] = set()
        self._pool = torch.cuda.graph_pool_handle() if capture else None

    def begin(self) -> None:
        """Before the passes of a step: gradients of zero, where the graphs know them, and copies of
        weights that a callback may have written since the last one."""
        refresh_copies(self._model.parameters())
        torch._foreach_zero_(self._gradients)
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient

    def __call__(self, one: Pass, normaliser: float) -> tuple[Tensor, dict[str, Metric]]:
        """The loss of a pass over `normaliser`, and its metrics; adds its gradients."""
        parcel: Parcel = one.batch
        graph = self._graph(parcel)
        if graph is None:
            return self._op_by_op(parcel, normaliser).unpacked()
        return graph.replay(parcel, normaliser).unpacked()

    def _op_by_op(self, parcel: Parcel, normaliser: float) -> _Result:
        before = _tables(parcel.batch)
        divisor = torch.full((), normaliser, device=self._device)
        result = self._compute(parcel.batch, divisor)
        made = _tables(parcel.batch) - before
        if made and self._capture:
            raise RuntimeError(
                f"cuda_graphs: a pass made tables of its layout by itself ({', '.join(made)}); "
                "a graph would keep those of one batch"
            )
        return result

    def _graph(self, parcel: Parcel) -> _Graph | None:
        """The graph for the sizes of a batch, or None where it is computed op by op."""
        sizes = parcel.bytes
        if not self._capture or sizes not in self._seen:
            self._seen.add(sizes)
            return None
        if sizes not in self._graphs:
            if len(self._graphs) == self._most:
                self._graphs.popitem(last=False)
                _log.info("cuda_graphs: %d are kept, the one used longest ago goes", self._most)
            # Another batch may need a longer table of angles; this graph goes on reading this one.
            angles = self._model.model.rotary(_positions(self._model, parcel.batch), self._device)
            self._graphs[sizes] = _Graph(parcel, self._compute, self._pool, angles)
            _log.info("cuda_graphs: captured number %d", len(self._graphs))
        self._graphs.move_to_end(sizes)
        return self._graphs[sizes]

    def _compute(self, batch: Any, normaliser: Tensor) -> _Result:
        # The table of angles must depend on the sizes alone.
        batch.layout.max_position = _positions(self._model, batch)
        loss, metrics = self._loss_fn(self._model, batch)
        loss = loss / normaliser
        self._optimizer.backward(loss)
        return _Result.of(loss.detach(), metrics)


def _tables(batch: Any) -> set[str]:
    """Names of all tables of a batch's layouts."""
    last = batch.layout.select(batch.rows)
    return {*batch.layout.tables(), *(f"last {name}" for name in last.tables())}


def _positions(model: Any, batch: Any) -> int:
    return max(model.config.max_position_embeddings, batch.layout.total_tokens)


@dataclass(frozen=True)
class _Result:
    """The numbers of a pass, those on the device in one tensor."""

    values: Tensor
    """The loss, then the tensors among `metrics` [n], fp32."""
    metrics: dict[str, Metric]
    """Numbers; an `_Index` into `values` in place of tensors."""

    @classmethod
    def of(cls, loss: Tensor, metrics: dict[str, Metric]) -> _Result:
        scalars = [loss]

        def noted(scalar: Tensor | float) -> Any:
            if not isinstance(scalar, Tensor):
                return scalar
            scalars.append(scalar.detach())
            return _Index(len(scalars) - 1)

        places: Any = {name: (noted(a), noted(b)) for name, (a, b) in metrics.items()}
        return cls(torch.stack([scalar.float() for scalar in scalars]), places)

    def unpacked(self) -> tuple[Tensor, dict[str, Metric]]:
        values = self.values.unbind()

        def found(scalar: Any) -> Tensor | float:
            return values[scalar.place] if isinstance(scalar, _Index) else scalar

        return values[0], {name: (found(a), found(b)) for name, (a, b) in self.metrics.items()}


@dataclass(frozen=True)
class _Index:
    place: int


class _Graph:
    """One captured pass and the memory that it reads.

    Args:
        parcel: a batch of the sizes that the graph is for.
        compute: batch, normaliser -> numbers; it has run with these sizes before.
        pool: memory of the intermediate results, shared by all graphs: only one runs at a time.
        kept: what else the graph reads and must not be freed.
    """

    def __init__(
        self, parcel: Parcel, compute: Callable[[Any, Tensor], _Result], pool: Any, kept: Any
    ) -> None:
        self._kept = kept
        self._buffer = parcel.buffer.clone()
        self._batch = unpack(parcel.batch, parcel.bytes, self._buffer)
        self._normaliser = torch.ones((), device=self._buffer.device)
        self._graph = torch.cuda.CUDAGraph()
        # The thread that prepares batches goes on with its copies meanwhile.
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            self._result = compute(self._batch, self._normaliser)

    def replay(self, parcel: Parcel, normaliser: float) -> _Result:
        self._buffer.copy_(parcel.buffer)
        self._normaliser.fill_(normaliser)
        self._graph.replay()
        # The next replay writes over this one's results.
        return _Result(self._result.values.clone(), self._result.metrics)

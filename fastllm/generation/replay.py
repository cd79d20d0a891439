"""What of CUDA a token step needs: a computation replayed from a graph, and copies to wait for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Replayed:
    """A computation on tensors of fixed addresses: run once as it is, and captured after that.

    The first run compiles kernels and makes tables and workspaces, none of which a graph may do.

    Args:
        compute: what it does; reads and writes tensors that live longer.
        pool: memory that the graphs share, since they never run at the same time
            (`torch.cuda.graph_pool_handle`); None computes op by op, on any device.
    """

    def __init__(self, compute: Callable[[], None], pool: Any) -> None:
        self._compute, self._pool = compute, pool
        self._graph: torch.cuda.CUDAGraph | None = None
        self._ran = False

    def __call__(self) -> None:
        """Compute once more."""
        if self._pool is None or not self._ran:
            self._compute()
            self._ran = True
            return
        if self._graph is None:
            self._graph = _capture(self._compute, self._pool)
        self._graph.replay()


class Copies:
    """Rows of a tensor on their way to the host.

    Args:
        there: on the device [n, ...]. On the CPU it is read where it is.
    """

    def __init__(self, there: Tensor) -> None:
        self._there, self._on_gpu = there, there.is_cuda
        self.host = (
            torch.empty_like(there, device="cpu", pin_memory=True) if there.is_cuda else there
        )
        """What has been waited for."""

    def fetch(self, first: int, stop: int) -> Callable[[], None]:
        """Send for rows first..stop; the result waits until they are here."""
        if not self._on_gpu:
            return lambda: None
        self.host[first:stop].copy_(self._there[first:stop], non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return event.synchronize


def _capture(compute: Callable[[], None], pool: Any) -> torch.cuda.CUDAGraph:
    # Not `torch.cuda.graph`, which waits for the device and gives all its free memory back: a
    # trainer would have to ask for it again.
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            compute()
        finally:
            graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)
    return graph

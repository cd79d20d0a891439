"""What the sections need of a device: memory, waiting, and timing of calls.

`Gpu` replays CUDA graphs; `Host` stands in for it where there is no GPU, so that everything around
the timing can be tested.
"""

from __future__ import annotations

import contextlib
import gc
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ..harness import Block, repeated

Call = Callable[[], Any]

# Work of one graph, and of one block of replays.
GRAPH_SECONDS, BLOCK_SECONDS = 0.003, 0.02
MOST_CALLS = 64


@dataclass(frozen=True)
class Timed:
    """A block of calls, and how it is timed."""

    block: Block
    how: str


class Device(Protocol):
    """A GPU, or what stands for it."""

    place: torch.device
    backend: str
    """What has to serve ours: nothing may stand in for the kernels that are measured."""
    l2_bytes: int
    processors: int

    def working(self) -> contextlib.AbstractContextManager[None]:
        """What is made and timed inside can be captured."""

    def synchronize(self) -> None:
        """Wait for everything that was launched."""

    def timed(self, calls: Sequence[Call], graph: bool = True) -> Timed:
        """Seconds of one call, the calls taken one after another, again and again.

        The calls do the same work on inputs of their own, so that none finds them in a cache.
        What cannot be captured (or is not to be: `graph`) is timed between events.
        """

    def wall(self, call: Call, count: int) -> float:
        """Seconds of the host for one call, the device far behind it or idle."""

    def peak(self, call: Call) -> float | None:
        """Bytes at most while the call runs, above what was there before; None: not known."""

    def free_bytes(self) -> int:
        """Memory that can be had."""

    def forget(self) -> None:
        """Give back what nothing refers to."""

    def alive(self) -> bool:
        """Whether it still answers."""


class Gpu:
    """A CUDA or ROCm device."""

    backend = "triton"

    def __init__(self) -> None:
        self.place = torch.device("cuda", torch.cuda.current_device())
        properties = torch.cuda.get_device_properties(self.place)
        self.l2_bytes = getattr(properties, "L2_cache_size", 64 << 20)
        self.processors = properties.multi_processor_count
        # Autograd runs a backward pass on the stream of its forward pass, and only a stream that
        # is captured may be used meanwhile: so everything is on this one.
        self._stream = torch.cuda.Stream()

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        self.synchronize()
        with torch.cuda.stream(self._stream):
            yield
            self.synchronize()

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def timed(self, calls: Sequence[Call], graph: bool = True) -> Timed:
        for _ in range(2):
            for call in calls:
                call()
        once = self._between_events(lambda: [call() for call in calls]) / len(calls)
        if not graph:
            return Timed(self._by_events(calls, once), "by events")
        turns = min(MOST_CALLS, max(1, round(GRAPH_SECONDS / (once * len(calls)))))
        try:
            captured = self._captured(calls, turns)
        except (RuntimeError, NotImplementedError) as error:
            self.synchronize()
            return Timed(self._by_events(calls, once), f"by events: {first_line(error)}")
        return Timed(self._by_replay(captured, turns * len(calls)), "by graph")

    def _by_replay(self, graph: torch.cuda.CUDAGraph, count: int) -> Block:
        graph.replay()
        once = self._between_events(graph.replay)
        replays = max(1, round(BLOCK_SECONDS / once))

        def replay() -> None:
            for _ in range(replays):
                graph.replay()

        return lambda: self._between_events(replay) / (replays * count)

    def _captured(self, calls: Sequence[Call], turns: int) -> torch.cuda.CUDAGraph:
        """A graph of all calls, `turns` times; results live until the same call comes again."""
        graph, results = torch.cuda.CUDAGraph(), [None] * len(calls)
        self.synchronize()
        with torch.cuda.graph(graph, stream=self._stream):
            for _ in range(turns):
                for index, call in enumerate(calls):
                    results[index] = call()
        return graph

    def _by_events(self, calls: Sequence[Call], once: float) -> Block:
        turns = max(1, round(BLOCK_SECONDS / (once * len(calls))))

        def run() -> None:
            for _ in range(turns):
                for call in calls:
                    call()

        return lambda: self._between_events(run) / (turns * len(calls))

    def _between_events(self, run: Callable[[], object]) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def wall(self, call: Call, count: int) -> float:
        return _wall(self, call, count)

    def peak(self, call: Call) -> float | None:
        self.forget()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        self.synchronize()
        del result
        return float(torch.cuda.max_memory_allocated() - before)

    def free_bytes(self) -> int:
        return torch.cuda.mem_get_info()[0]

    def forget(self) -> None:
        gc.collect()
        self.synchronize()
        torch.cuda.empty_cache()

    def alive(self) -> bool:
        try:
            self.synchronize()
        except RuntimeError:
            return False
        return True


class Host:
    """The CPU in a GPU's place, for tests: times are wall clock, and there are no graphs.

    Kernels are those of Triton where its interpreter was asked for, else what serves by itself.
    """

    backend = "triton" if os.environ.get("TRITON_INTERPRET") == "1" else "auto"
    place = torch.device("cpu")
    l2_bytes = 1 << 10
    processors = 2

    def working(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def synchronize(self) -> None:
        pass

    def timed(self, calls: Sequence[Call], graph: bool = True) -> Timed:
        whole = repeated(lambda: [call() for call in calls], self.place, 1e-4, most=2)
        return Timed(lambda: whole() / len(calls), "by wall clock")

    def wall(self, call: Call, count: int) -> float:
        return _wall(self, call, min(count, 2))

    def peak(self, call: Call) -> float | None:
        call()
        return None

    def free_bytes(self) -> int:
        return 1 << 30

    def forget(self) -> None:
        gc.collect()

    def alive(self) -> bool:
        return True


def _wall(device: Device, call: Call, count: int) -> float:
    device.synchronize()
    begin = time.perf_counter()
    for _ in range(count):
        call()
    seconds = (time.perf_counter() - begin) / count
    device.synchronize()
    return seconds


def first_line(error: BaseException) -> str:
    """What an error says, short enough for a table."""
    text = str(error).strip().splitlines() or [type(error).__name__]
    return f"{type(error).__name__}: {text[0]}"[:160]

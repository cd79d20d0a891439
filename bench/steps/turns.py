"""What a worker does: wait for its turn, run a block of steps, say how long they took.

A worker is a process with one contender in it. The parent writes `block N` or `end` to its
standard input; the worker answers each with one line of JSON on what was its standard output (the
libraries' own prints go to standard error). Nothing runs between two turns, so the contenders of
a case can alternate. This module is shared with the peers' environment: no torch, no fastllm.
"""

from __future__ import annotations

import json
import os
import re
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Result:
    """What a block of steps gave."""

    check: list[float]
    """What can be compared with the other contenders' results."""
    seconds: float | None = None
    """Of the steps; None: all that the block took."""
    parts: dict[str, float] = field(default_factory=dict)
    """Seconds of parts of the steps, by their names."""
    held_bytes: float | None = None
    """Bytes of what the case asks about (a cache), at most."""


# Runs that many steps.
Block = Callable[[int], "list[float] | Result"]


class Ended(Exception):
    """The parent has asked for the last block."""


class Line:
    """The worker's end of the conversation."""

    def __init__(self) -> None:
        sys.stdout.flush()
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def ready(self) -> None:
        """Everything is loaded; nothing has run."""
        self.answer(ready=True)

    def answer(self, **values: Any) -> None:
        self._answers.write(json.dumps(values) + "\n")
        self._answers.flush()

    def next_block(self) -> int:
        """Steps of the next block, when it is asked for.

        Raises:
            Ended: there is none; the parent is told the peak memory.
        """
        command, _, count = sys.stdin.readline().partition(" ")
        if command != "block":
            self.answer(peak_mb=peak_mb())
            raise Ended
        return int(count)


def serve(line: Line, block: Block) -> None:
    """Run blocks of a function until the parent has enough."""
    line.ready()
    while True:
        count = line.next_block()
        started = time.perf_counter()
        result = block(count)
        seconds = time.perf_counter() - started
        if not isinstance(result, Result):
            result = Result(result)
        line.answer(
            steps=count,
            seconds=seconds if result.seconds is None else result.seconds,
            check=result.check,
            parts=result.parts,
            held_bytes=result.held_bytes,
        )


class Turns:
    """The same inside a trainer: a callback that stops the run between two blocks.

    A block lasts from the beginning of its first step to the beginning of the step after its last
    one, so that fetching the data and logging count. Works for Transformers' trainers and ours.

    Args:
        line: to the parent.
        compared: metrics of a log.
        parts: seconds of the parts of a block, given its log, its steps and its seconds.
    """

    def __init__(
        self,
        line: Line,
        compared: tuple[str, ...] = ("loss",),
        parts: Callable[[dict[str, Any], int, float], dict[str, float]] | None = None,
    ) -> None:
        self._line, self._compared, self._parts = line, compared, parts
        self._left = self._count = self._tokens = 0
        self._started = 0.0
        self._log: dict[str, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._line.ready()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._left == 0:
            if self._count:
                self._report(time.perf_counter() - self._started)
            self._left = self._count = self._line.next_block()
            self._started = time.perf_counter()
        self._left -= 1

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_log = self._left == 0

    def on_log(
        self, args: Any, state: Any, control: Any, logs: Any = None, timings: Any = None, **_: Any
    ) -> None:
        self._log = {**(logs or {}), **(timings or {})}

    def _report(self, seconds: float) -> None:
        seen = int(self._log.get("num_tokens", 0))
        check = [float(self._log[name]) for name in self._compared]
        tokens, self._tokens = seen - self._tokens, seen
        parts = self._parts(self._log, self._count, seconds) if self._parts else {}
        self._line.answer(
            steps=self._count, seconds=seconds, check=check, tokens=tokens, parts=parts
        )


def peak_mb() -> float:
    """Largest resident size of this program so far.

    Not `ru_maxrss` where the kernel tells better: that is inherited from the parent's.
    """
    status = Path("/proc/self/status")
    if status.exists():
        match = re.search(r"^VmHWM:\s*(\d+) kB", status.read_text(), re.MULTILINE)
        if match:
            return int(match.group(1)) * 1024 / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6

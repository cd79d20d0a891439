"""Where the seconds of an optimizer step go."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from .averages import Metric


class Timings:
    """Seconds of each part, logged as `time/<part>`: means over optimizer steps.

    Args:
        parts: all parts that there are; one that did not occur in a step took 0 s.
    """

    def __init__(self, *parts: str) -> None:
        self._seconds = dict.fromkeys(parts, 0.0)

    def add(self, part: str, seconds: float) -> None:
        self._seconds[part] += seconds

    @contextmanager
    def measuring(self, part: str) -> Iterator[None]:
        """Count the time of the block, whether or not it ends well."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(part, time.perf_counter() - start)

    def take(self) -> dict[str, Metric]:
        """The seconds since the last call, as those of one step."""
        taken: dict[str, Metric] = {
            f"time/{part}": (seconds, 1) for part, seconds in self._seconds.items()
        }
        self._seconds = dict.fromkeys(self._seconds, 0.0)
        return taken

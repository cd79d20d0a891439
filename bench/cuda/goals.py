"""What a figure is to reach: a share of a measured ceiling, a rate, a time, a number of bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from .. import table
from ..records import Record


class Goal(Protocol):
    """Something that a record with a figure reaches or not."""

    def met(self, record: Record) -> bool:
        """Whether it is reached."""

    def __str__(self) -> str:
        """For a reader."""


@dataclass(frozen=True)
class Share:
    """Of the measured ceiling, at least."""

    of_ceiling: float

    def met(self, record: Record) -> bool:
        return record.roofline is not None and record.roofline >= self.of_ceiling

    def __str__(self) -> str:
        return f">= {self.of_ceiling:.0%} of the ceiling"


@dataclass(frozen=True)
class Rate:
    """Units of work in a second, at least."""

    least: float
    unit: str = "FLOP"

    def met(self, record: Record) -> bool:
        return record.rate is not None and record.rate >= self.least

    def __str__(self) -> str:
        return f">= {table.amount(self.least, self.unit)}/s"


@dataclass(frozen=True)
class Within:
    """Seconds, at most; perhaps with bytes, at most."""

    seconds: float
    peak_bytes: float | None = None

    def met(self, record: Record) -> bool:
        if record.seconds is None or record.seconds > self.seconds:
            return False
        if self.peak_bytes is None:
            return True
        return record.peak_bytes is not None and record.peak_bytes <= self.peak_bytes

    def __str__(self) -> str:
        memory = f", {table.amount(self.peak_bytes, 'B')} extra" if self.peak_bytes else ""
        return f"<= {table.time(self.seconds)}{memory}"


def faster(record: Record, peer: Record | None, times: float, whose: str) -> dict[str, object]:
    """Fields for a goal that is a peer's time, so many times over."""
    goal = f">= {times:g}x as fast as {whose}"
    if record.seconds is None or peer is None or peer.seconds is None:
        return {"goal": goal}
    return {"goal": goal, "met": peer.seconds / record.seconds >= times}


def judged(record: Record, goal: Goal | None) -> dict[str, object]:
    """The fields of a record that say what was to be reached, and whether it was."""
    if goal is None or record.seconds is None:
        return {}
    return {"goal": str(goal), "met": goal.met(record)}

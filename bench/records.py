"""What the suite measures: one `Record` per section, name, case, dtype and contender.

A record keeps the seconds of every round. The rounds of the records of one group (all but
`contender` equal) were taken in turns, so a ratio is formed round by round.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

OURS = "fastllm"

# The note of a contender that does other work than was asked, for comparison.
OTHER_WORK = "not the same result"

# Differences below this are never called a difference: two runs of one program differ by as much.
CLAIM = 0.05


@dataclass(frozen=True)
class Record:
    """One contender's times for one piece of work."""

    section: str
    name: str
    """What is done: "rms_norm forward+backward", "RM step"."""
    case: str
    """At which size: "4096x128"."""
    dtype: str
    """"float32", "bfloat16", ...; "" where it has no meaning."""
    contender: str
    """Who does it; `OURS` for this project."""
    rounds: tuple[float, ...] = ()
    """Seconds for `work`, one value per round; none: no figure, and `note` says why."""
    work: float = 0.0
    """Amount of `unit` done in `seconds`."""
    unit: str = ""
    """"B", "FLOP", "tokens", "samples", "steps", ..."""
    roofline: float | None = None
    """Share of what this machine was measured to be able to do."""
    peak_bytes: float | None = None
    """Memory at most, above what was there before."""
    foreign: float | None = None
    """Share of the processors that others took meanwhile; None: not known here."""
    disturbed: bool = False
    """Others took more than the harness allows, and repeating did not help."""
    axis: str = ""
    """What grows along a curve ("length", "threads", ...); "" for a point of no curve."""
    x: float | None = None
    """Where on the axis."""
    expected: float | None = None
    """Seconds that the arithmetic alone predicts from the first point of the curve."""
    note: str = ""
    goal: str = ""
    """What this is to reach; "" where nothing was set."""
    met: bool | None = None
    """Whether it is reached; None: no goal, or no figure to hold against it."""

    @property
    def seconds(self) -> float | None:
        """The median over the rounds."""
        return statistics.median(self.rounds) if self.rounds else None

    @property
    def spread(self) -> float | None:
        """(slowest - fastest) / median."""
        if not self.rounds:
            return None
        return (max(self.rounds) - min(self.rounds)) / statistics.median(self.rounds)

    @property
    def rate(self) -> float | None:
        """Units of work per second."""
        return self.work / self.seconds if self.seconds and self.work else None

    @property
    def group(self) -> tuple[str, str, str, str]:
        """What records that may be compared have in common."""
        return self.section, self.name, self.case, self.dtype


@dataclass(frozen=True)
class Ratio:
    """How many times faster one contender is than another, round by round."""

    median: float
    low: float
    high: float

    @property
    def even(self) -> bool:
        """Too close to call: within `CLAIM`, or some rounds say one thing and some the other."""
        return abs(self.median - 1) < CLAIM or self.low <= 1 <= self.high

    def __str__(self) -> str:
        return f"{self.median:.2f}x [{self.low:.2f}..{self.high:.2f}]" + " even" * self.even


@dataclass(frozen=True)
class Document:
    """A whole run: the machine and what was measured on it."""

    machine: dict[str, Any]
    records: list[Record] = field(default_factory=list)

    def write(self, path: Path) -> None:
        """Write JSON, with the derived figures for readers who have no Python."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.to_json(), indent=1) + "\n")

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers."""
        derived = ("seconds", "spread", "rate")
        return {
            "machine": self.machine,
            "records": [
                dataclasses.asdict(record) | {name: getattr(record, name) for name in derived}
                for record in self.records
            ],
        }

    @classmethod
    def read(cls, path: Path) -> Document:
        """The document in a file.

        Raises:
            ValueError: the file holds something else.
        """
        found = json.loads(path.read_text())
        if not isinstance(found, dict) or not {"machine", "records"} <= found.keys():
            raise ValueError(f"{path}: expected a saved benchmark with 'machine' and 'records'")
        return cls.from_json(found)

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> Document:
        """The inverse of `to_json`."""
        known = {field.name for field in dataclasses.fields(Record)}
        records = [{k: v for k, v in item.items() if k in known} for item in found["records"]]
        return cls(
            found["machine"], [Record(**{**r, "rounds": tuple(r["rounds"])}) for r in records]
        )


def ratio(ours: Record, theirs: Record, in_turns: bool = True) -> Ratio | None:
    """How many times faster `ours` is; None where one of them has no figure.

    Without `in_turns` the rounds have nothing to do with each other, and the range is that of all
    pairs.
    """
    if not ours.rounds or not theirs.rounds:
        return None
    if in_turns and len(ours.rounds) == len(theirs.rounds):
        each = [b / a for a, b in zip(ours.rounds, theirs.rounds, strict=True)]
        return Ratio(statistics.median(each), min(each), max(each))
    low = min(theirs.rounds) / max(ours.rounds)
    high = max(theirs.rounds) / min(ours.rounds)
    return Ratio(statistics.median(theirs.rounds) / statistics.median(ours.rounds), low, high)


def groups(records: Iterable[Record]) -> list[list[Record]]:
    """Records of one piece of work together, in the order in which they came."""
    found: dict[tuple[str, ...], list[Record]] = {}
    for record in records:
        found.setdefault(record.group, []).append(record)
    return list(found.values())


def ours_in(group: Sequence[Record]) -> Record | None:
    """This project's record of a group."""
    return next((record for record in group if record.contender == OURS), None)

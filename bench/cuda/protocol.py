"""What supervisor and worker say to each other: one JSON object to a line, in both directions."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

from ..records import Record


@dataclass(frozen=True)
class Order:
    """A section, or a part of its cases, to be run until a deadline."""

    section: str
    scale: str
    rounds: int
    seed: int
    deadline: float
    compile: bool = True
    only: str = ""
    part: int = 0
    parts: int = 1
    """Cases of several workers are dealt out in turn; large ones all go to the first."""
    done: tuple[str, ...] = ()
    """Cases that an earlier worker ended, or died of."""
    rates: dict[str, float] = field(default_factory=dict)

    def line(self) -> str:
        return json.dumps(dataclasses.asdict(self)) + "\n"

    @classmethod
    def read(cls, line: str) -> Order:
        found = json.loads(line)
        return cls(**{**found, "done": tuple(found["done"])})


def message(kind: str, **what: Any) -> str:
    """begin: a case; doing: what is done now; record; rates; ended: a case; finished."""
    return json.dumps({"kind": kind, **what}) + "\n"


def packed(record: Record) -> dict[str, Any]:
    return dataclasses.asdict(record)


def unpacked(found: dict[str, Any]) -> Record:
    return Record(**{**found, "rounds": tuple(found["rounds"])})

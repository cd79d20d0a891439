"""A case: one piece of work of a section, and what it is given."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from ..records import OURS, Record
from .device import Device


@dataclass
class Context:
    """What the cases of a section are given."""

    device: Device
    scale: str = "full"
    """Sizes: "full" as the goals ask, "quick" for a first look, "tiny" for tests."""
    rounds: int = 5
    seed: int = 0
    deadline: float = float("inf")
    """When the section has to end, by `time.time`."""
    compile: bool = True
    rates: dict[str, float] = field(default_factory=dict)
    """The measured ceilings: bytes and operations per second."""
    progress: Callable[[str], None] = lambda _: None
    """Is told what begins, so that whoever watches knows what hangs."""

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.time()

    def generator(self, *what: object) -> torch.Generator:
        """Random numbers of their own for each case and each run's seed."""
        seed = zlib.crc32(repr((self.seed, *what)).encode())
        return torch.Generator(self.device.place).manual_seed(seed)

    def pick(self, full: Any, quick: Any, tiny: Any) -> Any:
        """One of three by the scale."""
        return {"full": full, "quick": quick, "tiny": tiny}[self.scale]


Run = Callable[[Context], Iterator[Record]]


@dataclass(frozen=True)
class Case:
    """One piece of work; `run` yields its records as they come."""

    section: str
    name: str
    label: str
    run: Run
    dtype: str = "bfloat16"
    seconds: float = 4.0
    """It is not begun when less is left."""
    large: bool = False
    """Needs much memory: runs in the first of several workers."""

    @property
    def key(self) -> str:
        """What it is called between processes."""
        return f"{self.name} | {self.label} | {self.dtype}"

    def remark(self, note: str, contender: str = OURS) -> Record:
        """A record without a figure."""
        return Record(self.section, self.name, self.label, self.dtype, contender, note=note)

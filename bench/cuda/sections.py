"""The sections of the suite on a GPU, in their order, with the share of the time of each."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

MODULES = {
    "check": "bench.cuda.checks",
    "ceilings": "bench.cuda.ceilings",
    "ops": "bench.cuda.rows",
    "attention": "bench.cuda.attention",
    "head": "bench.cuda.head",
    "optimizer": "bench.cuda.optimizer",
    "steps": "bench.cuda.steps",
    "decode": "bench.cuda.decode",
}

WEIGHTS = {
    "check": 100,
    "ceilings": 15,
    "ops": 90,
    "attention": 80,
    "head": 45,
    "optimizer": 25,
    "steps": 110,
    "decode": 65,
}

WHOLE_SECONDS, SECTION_SECONDS = 530, 175
"""Of all sections together, and of one at most: a little under nine and three minutes."""


@dataclass
class Budget:
    """Divides the time that is left among the sections that are left, by their weights.

    What a section leaves over is the others'.
    """

    ends: float
    """By the clock that is handed in."""

    def deadline(self, now: float, section: str, later: tuple[str, ...]) -> float:
        """When a section has to end that begins now."""
        weights = [WEIGHTS[name] for name in (section, *later)]
        share = (self.ends - now) * weights[0] / sum(weights)
        return now + max(0.0, min(share, SECTION_SECONDS))


def module_of(section: str) -> Any:
    """The module with the section's `cases(context)`."""
    return importlib.import_module(MODULES[section])

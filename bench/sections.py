"""The sections of the suite, in the order in which they run.

A section is a module with a `NAME` and `run(options) -> Iterator[Record]`. It yields records as
they come; one that cannot run here yields a record without rounds whose note says why.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import cast

from .options import Options
from .records import Record

MODULES = (
    "bench.roofline",
    "bench.op_times",
    "bench.growth",
    "bench.threads",
    "bench.steps.steps",
    "bench.steps.scoring",
    "bench.steps.generate",
)

Run = Callable[[Options], Iterator[Record]]


def sections(names: tuple[str, ...]) -> Iterator[Run]:
    """The functions of the sections asked for."""
    for path in MODULES:
        module = importlib.import_module(path)
        if module.NAME in names:
            yield cast(Run, module.run)

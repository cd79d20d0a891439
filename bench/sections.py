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

# Imported when asked for: a section may need what another does without.
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


def sections(names: tuple[str, ...]) -> Iterator[tuple[str, Run]]:
    """Name and function of the sections asked for."""
    for path in MODULES:
        if path.rpartition(".")[2] not in names and path != "bench.op_times":
            continue
        module = importlib.import_module(path)
        if module.NAME in names:
            yield module.NAME, cast(Run, module.run)

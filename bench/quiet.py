"""Whether the machine was ours: the share of the processors that other processes took.

The kernel counts the busy time of each processor, and the time that the hypervisor kept from it
(steal), in /proc/stat; what we and our children used is subtracted. Elsewhere than on Linux
nothing is known, and nothing is claimed.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

# Columns of a "cpuN" line. Guests are already counted under user and nice.
_IDLE = (3, 4)
_COUNTED = 8

# The counters move in ticks of 10 ms, each on its own: so many of them may be a rounding error.
ROUNDING_TICKS = 3


@dataclass(frozen=True)
class Sample:
    """Ticks since boot: of all our processors, and used by our own processes."""

    total: int
    busy: int
    own: int


def sample() -> Sample | None:
    """Where the counters are now; None where there are none."""
    try:
        text = Path("/proc/stat").read_text()
    except OSError:
        return None
    total, busy = parse(text, os.sched_getaffinity(0))
    return Sample(total, busy, own_ticks())


def parse(text: str, processors: Collection[int]) -> tuple[int, int]:
    """All ticks and the busy ones (steal included) of some processors, from /proc/stat's text."""
    total = busy = 0
    for line in text.splitlines():
        name, *fields = line.split()
        if not (name.startswith("cpu") and name[3:].isdigit() and int(name[3:]) in processors):
            continue
        ticks = [int(value) for value in fields[:_COUNTED]]
        total += sum(ticks)
        busy += sum(ticks) - sum(ticks[i] for i in _IDLE)
    return total, busy


def foreign_share(before: Sample | None, after: Sample | None) -> float | None:
    """Share of the processors' time that went to others between two samples."""
    if before is None or after is None or after.total <= before.total:
        return None
    others = (after.busy - before.busy) - (after.own - before.own)
    return max(0, others - ROUNDING_TICKS) / (after.total - before.total)


def own_ticks() -> int:
    """Ticks used by this process and everything that descends from it, ended children included."""
    parents, used = {}, {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            # The name in parentheses may hold anything, spaces too.
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        parents[int(folder.name)] = int(fields[1])
        used[int(folder.name)] = sum(int(value) for value in fields[11:15])
    return sum(ticks for pid, ticks in used.items() if _descends(pid, os.getpid(), parents))


def _descends(pid: int, ancestor: int, parents: dict[int, int]) -> bool:
    while pid != ancestor and pid in parents:
        pid = parents[pid]
    return pid == ancestor

"""Section `threads`: the RM step and the SFT step on 1, 2, 4, ... threads.

Beside each figure stands the time on one thread over their number.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .harness import in_turns
from .options import Options
from .records import OURS, Record
from .training_steps import Mismatch, Work, blocks

NAME = "threads"

WORKS = (
    Work("RM", batch=8, length=256, vocabulary=260),
    Work("SFT", batch=8, length=256),
)


def run(options: Options) -> Iterator[Record]:
    """One curve for each kind of step."""
    if options.device != "cpu":
        yield Record(NAME, "threads", "", "", OURS, note="runs on the CPU only")
        return
    dtype = options.dtypes[0]
    for work in WORKS:
        if not options.wants(work.kind):
            continue
        alone: dict[str, float] = {}
        for threads in counts(options.threads, options.quick):
            torch.set_num_threads(threads)
            try:
                for record in _point(work, dtype, threads, alone, options):
                    if threads == 1 and record.seconds is not None:
                        alone[record.contender] = record.seconds
                    yield record
            finally:
                torch.set_num_threads(options.threads)


def counts(most: int, quick: bool) -> list[int]:
    """Every number up to four, then powers of two, and the most."""
    if quick:
        return sorted({1, most})
    powers = [1 << power for power in range(2, most.bit_length())]
    return sorted({n for n in (1, 2, 3, *powers, most) if n <= most})


def _point(
    work: Work, dtype: str, threads: int, alone: dict[str, float], options: Options
) -> Iterator[Record]:
    sequences = "pairs" if work.kind == "RM" else "sequences"
    case = f"{work.layers} x {work.width}, {work.batch} {sequences} x {work.length}"
    what = f"{work.kind} step", f"{case}, threads {threads}", dtype
    try:
        found = blocks(work, dtype, 1 if options.quick else 5, "cpu")
    except Mismatch as error:
        yield Record(NAME, *what, OURS, note=str(error))
        return
    yield from in_turns(found, options.rounds).records(
        NAME,
        *what,
        work=work.tokens,
        unit="tokens",
        axis="threads",
        x=threads,
        expected={name: seconds / threads for name, seconds in alone.items()},
    )

"""How things are timed: in turns, on inputs that exist before the clock starts.

A contender is a function without arguments that runs one block of work and returns the seconds
that one unit of it took; what it does inside (call an op a hundred times, ask a worker process for
ten training steps) is its own affair. Contenders run one after another, round after round, in
alternating order, so that whatever else the machine does falls on all of them alike. A round in
which other processes took more than `QUIET` of the processors is taken again, for everybody, up to
a limit; what is still disturbed then is kept and marked.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from . import quiet
from .records import Record

Block = Callable[[], float]

# Share of the processors that others may take during a round.
QUIET = 0.04

# What takes so long is warm after its check and one call more.
WARM_UP_SECONDS = 1.0


@dataclass(frozen=True)
class Turns:
    """Seconds of each contender, one value per round, and how quiet the machine was."""

    rounds: dict[str, tuple[float, ...]]
    foreign: float | None = None
    disturbed: bool = False
    kept: tuple[int, ...] = ()
    """Which of the rounds that were taken these are."""

    def records(
        self,
        section: str,
        name: str,
        case: str,
        dtype: str = "",
        *,
        work: float = 0.0,
        unit: str = "",
        **more: Any,
    ) -> Iterator[Record]:
        """One record for each contender.

        `more` are other fields of `Record`; a dict is looked up by contender
        (``peak_bytes={"fastllm": 1e6, "trl": 2e6}``).
        """
        for contender, rounds in self.rounds.items():
            own: dict[str, Any] = {
                k: v.get(contender) if isinstance(v, dict) else v for k, v in more.items()
            }
            yield Record(
                section,
                name,
                case,
                dtype,
                contender,
                rounds,
                work,
                unit,
                foreign=self.foreign,
                disturbed=self.disturbed,
                **own,
            )


def in_turns(
    contenders: Mapping[str, Block],
    rounds: int,
    retries: int | None = None,
    sample: Callable[[], quiet.Sample | None] = quiet.sample,
) -> Turns:
    """Run every contender once a round until `rounds` quiet rounds are there.

    Warm-up (compilation, first touches) is the caller's: each block is on the clock.

    Args:
        contenders: Blocks by the contender's name.
        rounds: How many rounds to keep.
        retries: Rounds that may be taken again; default: half as many as `rounds`.
        sample: Where the processors' counters are read.
    """
    taken: list[tuple[float | None, dict[str, float]]] = []
    limit = rounds + (rounds // 2 if retries is None else retries)
    while len([1 for share, _ in taken if _calm(share)]) < rounds and len(taken) < limit:
        names = list(contenders)[:: -1 if len(taken) % 2 else 1]
        before = sample()
        seconds = {name: contenders[name]() for name in names}
        taken.append((quiet.foreign_share(before, sample()), seconds))
    # The sort is stable and looks at quietness only, never at the times.
    noise = [0.0 if _calm(share) else share or 0.0 for share, _ in taken]
    kept = tuple(sorted(range(len(taken)), key=noise.__getitem__)[:rounds])
    shares = [share for share, _ in (taken[i] for i in kept) if share is not None]
    return Turns(
        {name: tuple(taken[i][1][name] for i in kept) for name in contenders},
        foreign=sum(shares) / len(shares) if shares else None,
        disturbed=not all(_calm(taken[i][0]) for i in kept),
        kept=kept,
    )


def repeated(
    call: Callable[[], object],
    device: torch.device | str = "cpu",
    block_seconds: float = 0.05,
    most: int = 1000,
) -> Block:
    """A block that makes the same call often enough to last about `block_seconds`.

    Calls it up to three times first, which warms it up.
    """
    device = torch.device(device)
    once = [_timed(call, 1, device)]
    while len(once) < 3 and sum(once) < WARM_UP_SECONDS:
        once.append(_timed(call, 1, device))
    count = max(1, min(most, round(block_seconds / min(once))))
    return lambda: _timed(call, count, device) / count


def _calm(share: float | None) -> bool:
    return share is None or share <= QUIET


def _timed(call: Callable[[], object], count: int, device: torch.device) -> float:
    _wait(device)
    begin = time.perf_counter()
    for _ in range(count):
        call()
    _wait(device)
    return time.perf_counter() - begin


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

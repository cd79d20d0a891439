"""A case: everybody's first results compared, then blocks of steps in turns."""

from __future__ import annotations

import dataclasses
import functools
import os
import statistics
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import harness
from ..options import Options
from ..peers import environment
from ..records import OURS as NAME
from ..records import Record
from . import workers
from .job import Job
from .limits import Limit
from .material import NotHere
from .workers import Contender, Failed, Worker

# fastllm on PyTorch's own operations: what is compared with where there are no peers.
DEFINITION = "fastllm's PyTorch definitions"


@dataclass(frozen=True, kw_only=True)
class Case:
    """One piece of work and who does it."""

    section: str
    name: str
    size: str
    dtype: str
    job: Callable[[Path], Job]
    """Writes model and records into a folder."""
    contenders: tuple[Contender, ...]
    reference: str = ""
    """The contender whose results are taken for right; not needed with a judge."""
    judge: Callable[[Path, list[float]], list[float]] | None = None
    """How wrong each of a block's results is, given the folder of the job: 0 where it is right."""
    work: float
    """Amount of `unit` in a step; with `per_token`, the tokens for which times are given."""
    unit: str
    per_token: bool = False
    """Steps differ in length: divide each block by its tokens."""
    tolerance: float = 1e-3
    slack: float = 0.0
    """Share of the compared results that may be farther off (tokens that were nearly even)."""
    curve: bool = False
    """The results are losses: say how they went."""
    checked: int = 3
    """Steps, one block each, whose results are compared; they warm up too."""
    block_steps: int | None = None
    """Steps of a block, where all contenders must see the same data in a block."""
    rounds: int | None = None
    gigabytes: float = 1.0
    """Memory that a contender may take: no more of them are started than fit."""
    parts: Mapping[str, tuple[float, str]] = field(default_factory=dict)
    """Parts of a step that have records of their own, and how much of which unit each does."""
    limits: Mapping[str, Limit] = field(default_factory=dict)
    """What the machine would need for a part; "" is the whole."""
    held: bool = False
    """Memory is what contenders say that they held (a cache), not all that the process had."""
    asked_as: str = ""
    """The dtype by which `--dtypes` asks for it; "" for its own."""


def run_all(cases: Iterable[Case], options: Options) -> Iterator[Record]:
    """The cases that are asked for."""
    if options.data is not None:
        os.environ["FASTLLM_DATA"] = str(options.data)
    for case in cases:
        dtype = case.asked_as or case.dtype
        if dtype in options.dtypes and options.wants(f"{case.name} {case.size}"):
            try:
                if options.device != "cpu":
                    raise NotHere("compared on the CPU only: --device cpu")
                yield from run(case, options)
            except NotHere as reason:
                yield _silent(case, NAME, str(reason))


def run(case: Case, options: Options) -> Iterator[Record]:
    """Measure a case; contenders that fail or disagree get a record without a figure."""
    python = environment.python()
    present = [c for c in case.contenders if c.module == workers.OURS or python is not None]
    if not options.compile:
        present = [c for c in present if not c.settings.get("compile")]
    if options.quick:
        present = [c for c in present if c.keep_memory]
    if python is None:
        yield _silent(case, "peers", f"no peers: {environment.COMMAND} sets them up")
    else:
        for contender in _lacking(present, python):
            present.remove(contender)
            note = f"{contender.package} is not installed: {environment.EXTRA_COMMAND} builds it"
            yield _silent(case, contender.name, note)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        dataclasses.replace(case.job(folder), threads=options.threads).write(folder)
        contest = Contest(case, folder, options, python or Path())
        try:
            yield from contest.run(present, None if case.judge else _reference(case, present))
        finally:
            contest.close()


class Contest:
    """The contenders of a case, from their start to their end."""

    def __init__(self, case: Case, folder: Path, options: Options, python: Path) -> None:
        self._case, self._folder, self._options, self._python = case, folder, options, python
        self._running: dict[str, Worker] = {}
        self._excluded: dict[str, str] = {}
        self._steps: dict[str, int] = {}
        self._answers: dict[str, list[dict[str, Any]]] = {}

    def run(self, present: Sequence[Contender], reference: Contender | None) -> Iterator[Record]:
        """All parties, one after the other; without a reference, the case judges."""
        expected = None
        if reference is not None:
            self._start(reference)
            if reference.name not in self._running:
                note = f"no reference: {reference.name}: {self._excluded[reference.name]}"
                yield from (_silent(self._case, c.name, note) for c in present)
                return
            expected = _results(self._running[reference.name])
        parties = _parties(present, self._case.gigabytes)
        if reference is not None and reference.name not in [c.name for c in parties[0]]:
            self.close()  # no party has room for a guest
        for party in parties:
            size = self._case.size
            if len(parties) > 1:
                size += ", beside " + ", ".join(c.name for c in party[1:])
            for contender in party:
                self._start(contender)
                self._compare(contender, expected)
            yield from self._measure([c.name for c in party], size)
            self.close()

    def close(self) -> None:
        """End what runs."""
        for worker in self._running.values():
            worker.kill()
        self._running.clear()

    def _start(self, contender: Contender) -> None:
        """Start a contender, unless it runs, and take the steps that are compared."""
        if contender.name in self._running:
            return
        tuned = contender.keep_memory and self._options.malloc == "tuned"
        worker = Worker(
            contender.command(self._folder, self._python),
            contender.environment(self._options.threads, tuned),
            self._folder / f"{contender.name}.log",
        )
        self._running[contender.name] = worker
        try:
            worker.wait_ready()
            for _ in range(self._case.checked):
                seconds = worker.block(1)["seconds"]
        except Failed as failure:
            self._exclude(contender.name, str(failure))
            return
        steps = round((0.5 if self._options.quick else 2.0) / seconds)
        self._steps[contender.name] = self._case.block_steps or max(1, min(200, steps))

    def _compare(self, contender: Contender, expected: list[float] | None) -> None:
        """Let nobody go on whose results are not those that are expected."""
        if contender.name not in self._running or contender.compared == 0:
            return
        case, found = self._case, _results(self._running[contender.name])
        if expected is None:
            assert case.judge is not None
            found = case.judge(self._folder, found)
            expected = [0.0] * len(found)
        tolerance = case.tolerance if contender.tolerance is None else contender.tolerance
        pairs = list(zip(found, expected, strict=True))[: contender.compared]
        differences = [abs(a - b) for a, b in pairs]
        off = [d for d in differences if not d <= tolerance]
        if len(off) > case.slack * len(differences):
            self._exclude(
                contender.name,
                f"WRONG, not timed: {len(off)} of {len(differences)} results are off, by up to "
                f"{max(off):.2g} (allowed: {tolerance:.2g})",
            )

    def _exclude(self, name: str, why: str) -> None:
        self._excluded[name] = why
        self._running.pop(name).kill()

    def _measure(self, names: list[str], size: str) -> Iterator[Record]:
        case = dataclasses.replace(self._case, size=size)
        timed = {name: self._running[name] for name in names if name in self._running}
        yield from (
            _silent(case, name, self._excluded[name]) for name in names if name not in timed
        )
        self._answers = {name: [] for name in timed}
        try:
            turns = harness.in_turns(
                {name: functools.partial(self._block, name) for name in timed},
                case.rounds or self._options.rounds,
            )
            curves = {name: worker.curve for name, worker in timed.items()}
            peaks = {name: worker.end() for name, worker in timed.items()}
        except Failed as failure:
            yield from (_silent(case, name, f"not timed: {failure}") for name in timed)
            return
        kept = {name: [answers[i] for i in turns.kept] for name, answers in self._answers.items()}
        compared = curves.get(case.reference) if case.block_steps else None
        notes = {name: _about(curves[name], compared) for name in timed} if case.curve else {}
        if case.held:
            peaks = {name: _held(answers) for name, answers in kept.items()}
        yield from self._records(case, "", turns, peak_bytes=peaks, note=notes)
        for part in case.parts:
            rounds = {name: _part(part, answers) for name, answers in kept.items()}
            measured = {name: seconds for name, seconds in rounds.items() if seconds is not None}
            yield from self._records(case, part, dataclasses.replace(turns, rounds=measured))

    def _records(
        self, case: Case, part: str, turns: harness.Turns, **more: Any
    ) -> Iterator[Record]:
        """The records of the whole (part "") or of a part, held against what limits it."""
        notes = dict(more.pop("note", {}))
        limit, reached = case.limits.get(part), {}
        if limit is not None:
            seconds = limit.seconds(self._options)
            reached = {n: seconds / statistics.median(r) for n, r in turns.rounds.items()}
            words = limit.words(self._options)
            notes = {
                name: ", ".join(filter(None, (notes.get(name), words * (name == NAME))))
                for name in turns.rounds
            }
        work, unit = case.parts[part] if part else (case.work, case.unit)
        yield from turns.records(
            case.section,
            f"{case.name}, {part}" if part else case.name,
            case.size,
            case.dtype,
            work=work,
            unit=unit,
            roofline=reached,
            note={name: notes.get(name, "") for name in turns.rounds},
            **more,
        )

    def _block(self, name: str) -> float:
        """Seconds for `work` of one block."""
        answer = self._running[name].block(self._steps[name])
        self._answers[name].append(answer)
        if self._case.per_token:
            return answer["seconds"] / answer["tokens"] * self._case.work
        return answer["seconds"] / answer["steps"]


def _silent(case: Case, contender: str, note: str) -> Record:
    return Record(case.section, case.name, case.size, case.dtype, contender, note=note)


def _part(part: str, answers: Sequence[dict[str, Any]]) -> tuple[float, ...] | None:
    """Seconds of a part of each round's steps; None where it is not known."""
    if not all(part in answer.get("parts", {}) for answer in answers):
        return None
    return tuple(answer["parts"][part] / answer["steps"] for answer in answers)


def _held(answers: Sequence[dict[str, Any]]) -> float | None:
    found = [answer.get("held_bytes") for answer in answers]
    return max((value for value in found if value is not None), default=None)


def _lacking(present: Sequence[Contender], python: Path) -> list[Contender]:
    """Who needs a package that the peers' environment does not have."""
    if not any(contender.package for contender in present):
        return []
    found = environment.versions(python)
    return [c for c in present if c.package and c.package not in found]


def _parties(present: Sequence[Contender], gigabytes: float) -> list[list[Contender]]:
    """Contenders that run together: ourselves in each party, as many others as memory allows."""
    ours, *others = present
    beside = max(1, int(_free_gigabytes() * 0.9 / gigabytes) - 1)
    parties = [[ours, *others[i : i + beside]] for i in range(0, len(others), beside)]
    return parties or [[ours]]


def _reference(case: Case, present: Sequence[Contender]) -> Contender:
    """Who is right: a peer, or without peers our definitions in plain PyTorch."""
    found = next((c for c in present if c.name == case.reference), None)
    return found or dataclasses.replace(present[0], name=DEFINITION, backend="torch")


def _results(worker: Worker) -> list[float]:
    return [value for check in worker.checks for value in check]


def _about(curve: list[float], reference: list[float] | None) -> str:
    """The losses of a run in a few words; beside the reference's, where blocks are the same."""
    text = f"loss {curve[0]:.4f} to {curve[-1]:.4f}"
    if reference is None or reference is curve:
        return text
    pairs = list(zip(curve, reference, strict=True))
    return f"{text}, {sum(abs(a - b) for a, b in pairs) / len(pairs):.4f} from the reference's"


def _free_gigabytes() -> float:
    info = Path("/proc/meminfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024 / 1e9
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9

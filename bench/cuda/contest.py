"""One op at one size: every contender is checked, then timed forward and backward in turns."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fastllm.ops import use_backend

from ..harness import Block, in_turns
from ..records import OTHER_WORK, OURS, Record
from .case import Case, Context
from .device import Call, first_line
from .exact import Exact, Inputs, Right, Wrong, compare, outputs_of, poisoned
from .goals import Goal, judged

# Inputs that the caches may hold together, times this, is what the sets of inputs come to.
CACHES = 3
MOST_SETS = 16


@dataclass(frozen=True)
class Work:
    """What one pass has to do, and what it is to reach."""

    amount: float
    unit: str = "B"
    """"B", held against the copy, or "FLOP", against the matrix product."""
    goal: Goal | None = None


def same(tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True)
class Contender:
    """A way to do an op. Raising NotImplementedError, it cannot do this case."""

    name: str
    function: Callable[..., Any]
    prepare: Callable[[Inputs], Inputs] | None = None
    """Makes from the op's inputs what a program would have at hand when it gets here."""
    lay: Callable[[Tensor], Tensor] = same
    """From the op's layout of outputs to its own, for the outputs' gradients."""
    unlay: Callable[[Tensor], Tensor] = same
    """Its outputs and gradients in the op's layout."""
    equal: bool = True
    """False: it does other work than was asked, and is shown for comparison."""
    compile: bool = False
    goals: Mapping[str, Goal] = field(default_factory=dict)
    """What a contender that may serve for us is to reach, by pass."""
    around: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    """The state in which to call it."""


def ours(function: Callable[..., Any], prepare: Any = None) -> Contender:
    """This project's op, on its kernels for the device."""
    return Contender(OURS, function, prepare)


@dataclass(frozen=True)
class Op:
    """An op at a size."""

    section: str
    name: str
    label: str
    inputs: Callable[[torch.device, torch.Generator], Inputs]
    contenders: Callable[[], Sequence[Contender]]
    exact: Exact
    forward: Work | None
    backward: Work | None = None
    both: Work | None = None
    """Forward and backward in one, where the parts cannot be told apart."""
    leaves: tuple[str, ...] = ()
    like: str = ""
    """The input that the only output is like; "": the contender "eager" says what outputs are."""
    dtype: torch.dtype = torch.bfloat16
    memory: bool = False
    seconds: float = 4.0

    def case(self) -> Case:
        """To be run by a worker."""
        short = str(self.dtype).removeprefix("torch.")
        return Case(
            self.section, self.name, self.label, self._run, dtype=short, seconds=self.seconds
        )

    def _run(self, context: Context) -> Iterator[Record]:
        with context.device.working():
            yield from _Contest(self, context).records()


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """By torch.compile, so that its backward pass can be called again and again."""
    import torch._functorch.config as settings

    settings.donated_buffer = False
    return torch.compile(function, dynamic=False)


@dataclass
class _Entry:
    """A contender with its inputs, one set after another."""

    contender: Contender
    function: Callable[..., Any]
    sets: list[Inputs]
    leaves: list[list[Tensor]]
    gradients: list[list[Tensor]]
    passes: dict[str, str] = field(default_factory=dict)
    """Which passes may be timed, and a remark on each."""

    def outputs(self, index: int) -> tuple[Tensor, ...]:
        return outputs_of(self.function(**self.sets[index]))

    def forward(self, index: int) -> Call:
        return lambda: self.outputs(index)

    def both(self, index: int) -> Call:
        def call() -> Any:
            return self._backward(self.outputs(index), index, retain=False)

        return call

    def backward(self, index: int) -> Call:
        outputs = self.outputs(index)
        return lambda: self._backward(outputs, index, retain=True)

    def _backward(self, outputs: Sequence[Tensor], index: int, retain: bool) -> Any:
        asked = [output for output in outputs if output.requires_grad]
        gradients = self.gradients[index][: len(asked)]
        return torch.autograd.grad(asked, self.leaves[index], gradients, retain_graph=retain)


class _Contest:
    def __init__(self, op: Op, context: Context) -> None:
        self.op, self.context, self.device = op, context, context.device
        self.generator = context.generator(op.name, op.label)
        short = str(op.dtype).removeprefix("torch.")
        self.blank = Record(op.section, op.name, op.label, short, "")

    def records(self) -> Iterator[Record]:
        """First what cannot be timed, then each pass."""
        entries = []
        for contender in self._contenders():
            self.context.progress(f"{self.op.name}: {contender.name}")
            made = self._entry(contender)
            if isinstance(made, _Entry):
                entries.append(made)
                continue
            yield made
            if contender.name == OURS:
                return
        for name, work in self._passes():
            yield from self._timed(name, work, entries)

    def _passes(self) -> Iterator[tuple[str, Work]]:
        op = self.op
        for name, work in (
            ("forward", op.forward),
            ("backward", op.backward),
            ("forward+backward", op.both),
        ):
            if work is not None:
                yield name, work

    def _contenders(self) -> Iterator[Contender]:
        """Ours first: the others are of no use without it; the compiled ones last."""
        found = list(self.op.contenders())
        found.sort(key=lambda contender: (contender.name != OURS, contender.compile))
        yield from found

    @cached_property
    def sets(self) -> list[Inputs]:
        """Inputs, so many of them that no cache holds one until its turn comes again."""
        first = self.op.inputs(self.device.place, self.generator)
        size = sum(t.nbytes for t in first.values() if isinstance(t, Tensor))
        count = min(MOST_SETS, max(2, -(-CACHES * self.device.l2_bytes // max(size, 1)) + 1))
        rest = [self.op.inputs(self.device.place, self.generator) for _ in range(count - 1)]
        return [first, *rest]

    @cached_property
    def output_gradients(self) -> list[Tensor]:
        """Random, in the dtype of the outputs; a loss has the gradient that a trainer gives it."""
        if not self.op.leaves:
            return []
        if self.op.like:
            return [self._random(self.sets[0][self.op.like])]
        with torch.no_grad(), use_backend("torch"):
            found = next(c for c in self.op.contenders() if c.name == "eager")
            given = found.prepare(self.sets[0]) if found.prepare else self.sets[0]
            outputs = outputs_of(found.function(**given))
        return [
            torch.ones_like(t) if t.dim() == 0 else self._random(t)
            for t in outputs
            if t.is_floating_point()
        ]

    def _random(self, like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=self.generator, device=like.device).to(like.dtype)

    @cached_property
    def right(self) -> Right:
        return self.op.exact(self.sets[0], self.op.leaves, self.output_gradients)

    def _entry(self, contender: Contender) -> _Entry | Record:
        """The contender, checked; or why it is not timed."""
        op, mine = self.op, contender.name == OURS
        refused = replace(self.blank, contender=contender.name)
        if contender.compile and not self.context.compile:
            return replace(refused, note="left out: no compilation was asked for")
        if not mine and self.context.left < op.seconds:
            return replace(refused, note="left out: the section's time is over")
        try:
            entry = self._made(contender)
            self._check(entry)
        except Wrong as error:
            return replace(refused, note=f"WRONG, not timed: {error}")
        except (NotImplementedError, ImportError) as error:
            return replace(refused, note=f"not possible: {first_line(error)}")
        except Exception as error:
            if mine or not self.device.alive():
                raise
            return replace(refused, note=f"failed: {first_line(error)}")
        return entry

    def _made(self, contender: Contender) -> _Entry:
        sets, leaves, gradients = [], [], []
        for inputs in self.sets:
            given = dict(contender.prepare(inputs) if contender.prepare else inputs)
            own = [given[name].detach().requires_grad_() for name in self.op.leaves]
            sets.append(given | dict(zip(self.op.leaves, own, strict=True)))
            leaves.append(own)
            gradients.append([contender.lay(t) for t in self.output_gradients])
        function = contender.function
        if contender.compile:
            function = compiled(function)
        return _Entry(contender, function, sets, leaves, gradients)

    @contextlib.contextmanager
    def _ready(self, contender: Contender) -> Iterator[None]:
        backend = self.device.backend if contender.name == OURS else "torch"
        with use_backend(backend), contender.around():
            yield

    def _check(self, entry: _Entry) -> None:
        contender, op = entry.contender, self.op
        poison = poisoned() if contender.name == OURS else contextlib.nullcontext()
        with self._ready(contender), poison:
            outputs = entry.outputs(0)
            gradients = entry.both(0)() if op.backward or op.both else ()
        for name, _ in self._passes():
            entry.passes[name] = "" if contender.equal else OTHER_WORK
        if not contender.equal:
            return
        compare([contender.unlay(t) for t in outputs], self.right.outputs, "output", op.dtype)
        if gradients:
            found = [contender.unlay(t) for t in gradients]
            compare(found, self.right.gradients, "gradient", op.dtype)

    def _timed(self, name: str, work: Work, entries: Sequence[_Entry]) -> Iterator[Record]:
        self.__dict__.pop("right", None)
        blocks: dict[str, Block] = {}
        notes: dict[str, str] = {}
        blank = replace(self.blank, name=f"{self.op.name} {name}")
        for entry in entries:
            who = entry.contender.name
            self.context.progress(f"{self.op.name} {name}: {who}")
            try:
                blocks[who], notes[who] = self._block(entry, name)
            except Exception as error:
                if who == OURS or not self.device.alive():
                    raise
                yield replace(blank, contender=who, note=f"failed: {first_line(error)}")
        goals = {entry.contender.name: entry.contender.goals.get(name) for entry in entries}
        goals[OURS] = work.goal
        turns = in_turns(blocks, self.context.rounds, sample=lambda: None)
        shares = self._shares(turns.rounds, work)
        peaks = self._peaks(name, entries) if self.op.memory else {}
        for record in turns.records(
            blank.section,
            blank.name,
            blank.case,
            blank.dtype,
            work=work.amount,
            unit=work.unit,
            roofline=shares,
            peak_bytes=peaks,
            note=notes,
        ):
            yield replace(record, **judged(record, goals[record.contender]))

    def _block(self, entry: _Entry, name: str) -> tuple[Block, str]:
        make = {"forward": entry.forward, "backward": entry.backward}.get(name, entry.both)
        with self._ready(entry.contender):
            calls = [make(index) for index in range(len(entry.sets))]
            timed = self.device.timed(calls)

        def block() -> float:
            with self._ready(entry.contender):
                return timed.block()

        remarks = [entry.passes[name], "" if timed.how == "by graph" else timed.how]
        return block, "; ".join(filter(None, remarks))

    def _shares(self, rounds: dict[str, tuple[float, ...]], work: Work) -> dict[str, float]:
        rate = self.context.rates.get("copy" if work.unit == "B" else "product")
        if not rate:
            return {}
        return {name: work.amount / _median(taken) / rate for name, taken in rounds.items()}

    def _peaks(self, name: str, entries: Sequence[_Entry]) -> dict[str, float | None]:
        """Above the inputs, and the results that everybody has to return."""
        peaks = {}
        for entry in entries:
            make = entry.forward if name == "forward" else entry.both
            with self._ready(entry.contender):
                made = outputs_of(make(0)())
                returned = sum(t.nbytes for t in made if isinstance(t, Tensor))
                del made
                peak = self.device.peak(make(0))
            peaks[entry.contender.name] = None if peak is None else max(0.0, peak - returned)
        return peaks


def _median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]

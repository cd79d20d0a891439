"""Section `ops`: every op forward and backward, in turns with PyTorch's forms of it.

Each contender is first held against the fp64 reference. Memory peaks are taken in processes of
their own, where nothing else has touched the heap.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from . import imports, memory, optimizer_step, roofline
from .cases import Case, Contender, Problem, Suite, Wrong, suite_of, suites
from .harness import Block, in_turns, repeated
from .options import Options
from .records import OTHER_WORK, Record

NAME = "ops"

BLOCK_SECONDS = 0.05


def run(options: Options) -> Iterator[Record]:
    """All ops, then the optimizer's step and what `import fastllm` costs."""
    for op in filter(options.wants, suites()):
        suite = suite_of(op)
        for case in suite.cases[: 1 if options.quick else None]:
            for dtype in options.dtypes:
                yield from time_case(op, suite, case, getattr(torch, dtype), options)
    for extra in (optimizer_step, imports):
        if options.wants(extra.NAME):
            yield from extra.run(options)


def time_case(
    op: str, suite: Suite, case: Case, dtype: torch.dtype, options: Options
) -> Iterator[Record]:
    """Forward, and forward with backward, of one case."""
    problem = Problem(suite, case, torch.device(options.device), dtype)
    short = str(dtype).removeprefix("torch.")
    contenders = list(problem.contenders(options.compile))
    for backward in (False, True) if case.gradients_of else (False,):
        name = f"{op} {'forward+backward' if backward else 'forward'}"
        amount, unit = case.work(dtype, backward)
        what = partial(Record, NAME, name, case.label, short)
        blocks: dict[str, Block] = {}
        notes: dict[str, str] = {}
        for contender in contenders:
            try:
                problem.check(contender, backward)
            except NotImplementedError:
                continue
            except Wrong as error:
                yield what(contender.name, note=str(error))
                continue
            notes[contender.name] = "" if contender.same else OTHER_WORK
            blocks[contender.name] = _block(problem, contender, backward, options)
        turns = in_turns(blocks, options.rounds)
        yield from turns.records(
            NAME,
            name,
            case.label,
            short,
            work=amount,
            unit=unit,
            roofline=roofline.fractions(turns.rounds, amount, unit, short, options),
            peak_bytes=_peaks(op, case, short, backward, blocks, options),
            note=notes,
        )


def _block(problem: Problem, contender: Contender, backward: bool, options: Options) -> Block:
    call = problem.call(contender, backward)
    with contender.ready():
        block = repeated(call, options.device, BLOCK_SECONDS)

    def ready_block() -> float:
        with contender.ready():
            return block()

    return ready_block


def _peaks(
    op: str,
    case: Case,
    dtype: str,
    backward: bool,
    blocks: dict[str, Block],
    options: Options,
) -> dict[str, float | None]:
    if not case.memory or not backward or options.quick:
        return {}
    return {name: memory.peak_of_op(op, case.label, dtype, name, options) for name in blocks}

"""`python -m bench.tune [op ...]`: find the kernels' constants, and write them to their tables.

On a GPU each candidate is compiled, checked against the constants of now and timed by graph
replay, and the winner replaces them in `kernels/tuned/<op>.json`, for this architecture only.
`--dry-run --arch sm_90` needs no GPU: it compiles the candidates and ranks them by what a
processor can hold.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .cuda.device import Device, Gpu, first_line
from .cuda.exact import Wrong, compare
from .table import time as shown_time
from .tuning import constants, problems, resources, tables
from .tuning.constants import Constants, Place
from .tuning.problems import Problem
from .tuning.resources import Compiled

# What a winner must save: less is noise between two runs.
SAVING = 0.02

ROUNDS, SEED = 3, 0


@dataclass(frozen=True)
class Task:
    """A kernel that a problem launches, with the constants of now and what else to try."""

    number: int
    place: Place
    now: Constants
    candidates: list[Constants]

    @property
    def problem(self) -> Problem:
        return problems.PROBLEMS[self.number]

    def __str__(self) -> str:
        return f"{self.place.kernel} for {self.problem}"


def main(argv: Sequence[str] | None = None) -> int:
    """Tune, or rank without a GPU."""
    options = _parse(argv)
    deadline = time.monotonic() + options.minutes * 60
    arch = options.arch if options.dry_run else architecture()
    device = None if options.dry_run else Gpu()
    failures = 0
    for task in tasks(options.ops, options.only, arch):
        left = deadline - time.monotonic()
        if left <= 0:
            print(f"left out, {options.minutes:g} minutes are over: {task}", flush=True)
            continue
        try:
            if device is None:
                rank(task, arch, options)
            else:
                with device.working():
                    tune(task, arch, device, options, deadline)
        except Exception as error:
            failures += 1
            print(f"ERROR: {task}: {first_line(error)}", flush=True)
            if device is not None and not device.alive():
                print("the device is not usable any more")
                return 1
    return int(failures > 0)


def architecture() -> str:
    """The table that belongs to the GPU at hand."""
    from fastllm.kernels import configs
    from fastllm.kernels.launch import target

    return configs.architectures(target())[0]


def tasks(ops: Sequence[str], only: str, arch: str) -> Iterator[Task]:
    """Each tunable kernel of each problem; the first problem of a class of sizes stands for it.

    A problem that cannot be built with the kernels as they are is named and left out.
    """
    seen: set[tuple[str, int, str]] = set()
    for number, problem in enumerate(problems.PROBLEMS):
        if (ops and problem.op not in ops) or only not in str(problem):
            continue
        try:
            found = looked_up(problem, arch)
        except Exception as error:
            print(f"left out: {problem}: {first_line(error)}", flush=True)
            continue
        spaces = constants.spaces()
        for place, now in found.items():
            if place.kernel not in spaces:
                continue
            key = place.kernel, place.itemsize, tables.serving(arch, place)
            if key not in seen:
                seen.add(key)
                every = constants.candidates(now, spaces[place.kernel])
                yield Task(number, place, now, every)


def looked_up(problem: Problem, arch: str) -> dict[Place, Constants]:
    """The places whose constants a problem's launches ask for; nothing is launched."""
    from triton.runtime.driver import driver

    from fastllm.kernels.launch import launch

    found: dict[Place, Constants] = {}
    before = driver._active
    driver._active = resources._machine_code().AbsentGPU(arch)
    try:
        with constants.watched(found), launch.compiling():
            problem.make("meta")()
    finally:
        driver._active = before
    return found


# -- without a GPU ---------------------------------------------------------------------------------


def rank(task: Task, arch: str, options: argparse.Namespace) -> list[Compiled]:
    """Print the best candidates; with --write the first one is kept."""
    found = _compiled(task, arch, options)
    found.sort(key=lambda one: one.rank(arch))
    print(f"\n{task}, {arch}: {len(found)} candidates, now {task.now}")
    for one in found[: options.most]:
        print(_line(one, arch, task.now))
    best = found[0]
    if options.write and best.fits(arch):
        tables.put(tables.file_of(task.place.kernel), arch, task.place, best.constants)
    return found


def _line(one: Compiled, arch: str, now: Constants) -> str:
    mark = "*" if one.constants == now else " "
    if one.failed:
        return f" {mark} {one.constants}  {one.failed}"
    return (
        f" {mark} {one.constants}  {one.registers} registers, {one.spilled} spilled, "
        f"{one.shared >> 10} KiB shared, {one.warps(arch)} warps on a processor"
    )


def _compiled(task: Task, arch: str, options: argparse.Namespace) -> list[Compiled]:
    made = resources.compiled(task.number, task.place, task.candidates, arch, options.processes)
    return list(made)


# -- on a GPU --------------------------------------------------------------------------------------


def tune(
    task: Task, arch: str, device: Device, options: argparse.Namespace, deadline: float
) -> Constants:
    """Time what fits, and write the winner; returns the constants that the table then has."""
    fitting = [one for one in _compiled(task, arch, options) if one.fits(arch)]
    fitting.sort(key=lambda one: (one.constants != task.now, one.rank(arch)))
    torch.manual_seed(SEED)
    reference = [tensor.double() for tensor in task.problem.make(device.place)()]
    times: list[tuple[float, Constants]] = []
    for one in fitting:
        if time.monotonic() > deadline and times:
            print(f"left out, the time is over: {len(fitting) - len(times)} candidates of {task}")
            break
        try:
            times.append((measured(task, one.constants, device, reference), one.constants))
        except (Wrong, RuntimeError) as error:
            print(f"   {one.constants}: {first_line(error)}", flush=True)
            if not device.alive():
                raise
        device.forget()
    return settle(task, arch, times, write=not options.keep)


def measured(task: Task, chosen: Constants, device: Device, reference: Sequence[Tensor]) -> float:
    """Seconds of the problem's call with these constants, checked first.

    Raises:
        Wrong: the result is another than with the constants of now.
    """
    with constants.replaced(task.place, chosen):
        torch.manual_seed(SEED)
        calls = [task.problem.make(device.place) for _ in range(2)]
        compare(calls[0](), reference, "result", task.problem.dtype)
        # The optimizer's tables are copied from the host: no graph has it.
        block = device.timed(calls, graph=task.problem.op != "optimizer").block
        return min(block() for _ in range(ROUNDS))


def settle(
    task: Task, arch: str, times: list[tuple[float, Constants]], write: bool = True
) -> Constants:
    """Say what was found and write the winner, if it saves anything worth mentioning."""
    if not times:
        print(f"{task}: nothing could be timed", flush=True)
        return task.now
    times = sorted(times, key=lambda pair: pair[0])
    best, winner = times[0]
    now = next((seconds for seconds, chosen in times if chosen == task.now), None)
    old = "not possible" if now is None else shown_time(now)
    print(f"{task}, {arch}: {old} with {task.now}", flush=True)
    if now is not None and best > now * (1 - SAVING):
        print(f"   stays; {len(times)} timed", flush=True)
        return task.now
    print(f"   {shown_time(best)} with {winner}; {len(times)} timed", flush=True)
    if write:
        tables.put(tables.file_of(task.place.kernel), arch, task.place, winner)
    return winner


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.tune", description=(__doc__ or "").split("\n\n", 1)[1]
    )
    parser.add_argument("ops", nargs="*", help="files of kernels/, such as rms_norm (default: all)")
    parser.add_argument("--device", choices=("cuda",), default="cuda")
    parser.add_argument("--only", default="", metavar="TEXT", help="problems that contain TEXT")
    parser.add_argument("--minutes", type=float, default=9.0, help="what does not fit is named")
    parser.add_argument("--processes", type=int, default=resources.processes())
    parser.add_argument("--keep", action="store_true", help="print, and leave the tables alone")
    parser.add_argument("--dry-run", action="store_true", help="compile and rank, without a GPU")
    parser.add_argument("--arch", choices=sorted(resources.PROCESSORS), default="sm_90")
    parser.add_argument("--most", type=int, default=10, help="candidates shown by --dry-run")
    parser.add_argument("--write", action="store_true", help="--dry-run: keep the first in rank")
    options = parser.parse_args(argv)
    if not options.dry_run and not torch.cuda.is_available():
        parser.error("there is no GPU here: --dry-run --arch ... compiles and ranks without one")
    return options


if __name__ == "__main__":
    sys.exit(main())

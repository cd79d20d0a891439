"""What a candidate compiles to, for a GPU that need not be here: registers, memory, occupancy.

Candidates are compiled in processes of their own, several at a time. Where the GPU is the one at
hand, Triton's cache then has the kernels that are timed.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import problems
from .constants import Constants, Place, replaced

# Warps on a processor that hide the latency of memory; more of them are of little use.
ENOUGH = 32

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Processor:
    """What a streaming multiprocessor (compute unit) has."""

    shared: int
    """Bytes of shared memory for all blocks on it."""
    threads: int
    blocks: int
    registers: int = 65536
    lanes: int = 32


PROCESSORS = {
    "sm_80": Processor(164 << 10, 2048, 32),
    "sm_86": Processor(100 << 10, 1536, 16),
    "sm_90": Processor(228 << 10, 2048, 32),
    "sm_100": Processor(228 << 10, 2048, 32),
    "gfx942": Processor(64 << 10, 2048, 32, 4 * 512 * 64, 64),
}


@dataclass(frozen=True)
class Compiled:
    """A candidate's kernel."""

    constants: Constants
    registers: int = 0
    spilled: int = 0
    shared: int = 0
    failed: str = ""

    def fits(self, arch: str) -> bool:
        """Whether it can be launched, and keeps its registers."""
        most = _machine_code().SHARED_MEMORY[arch]
        return not self.failed and not self.spilled and self.shared <= most

    def warps(self, arch: str) -> int:
        """Warps that a processor holds at a time."""
        processor, warps = PROCESSORS[arch], self.constants.get("num_warps", 4)
        threads = warps * processor.lanes
        # A warp's registers are handed out 8 for each thread at a time.
        registers = max(8, -(-self.registers // 8) * 8) * threads
        blocks = min(
            processor.blocks,
            processor.threads // threads,
            processor.registers // registers,
            processor.shared // (self.shared + 1024) if self.shared else processor.blocks,
        )
        return blocks * warps

    def rank(self, arch: str) -> tuple[Any, ...]:
        """Better ones first: what fits, has the largest tile, keeps ENOUGH warps, and then uses
        most registers.

        A large tile of a matrix product reads its inputs least often, and registers in use are
        loads in flight; a guess all the same, which timing has to confirm.
        """
        tile = self.constants.get("BLOCK_M", 0) * self.constants.get("BLOCK_N", 0)
        warps = self.warps(arch)
        held = -min(warps, ENOUGH), -self.registers * warps
        return (not self.fits(arch), self.spilled, -tile, *held)


def compiled(
    number: int, place: Place, candidates: Sequence[Constants], arch: str, processes: int
) -> Iterator[Compiled]:
    """The candidates of one kernel of a problem, as they are compiled."""
    if processes <= 1:
        for constants in candidates:
            yield compile_one(number, place, constants, arch)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        futures = [
            pool.submit(compile_one, number, place, constants, arch) for constants in candidates
        ]
        for future in as_completed(futures):
            yield future.result()


def compile_one(number: int, place: Place, constants: Constants, arch: str) -> Compiled:
    """Launch the problem on tensors without data, under a driver that stands for the GPU."""
    from triton.runtime.driver import driver

    from fastllm.kernels.launch import launch

    machine_code = _machine_code()
    before = driver._active
    driver._active = machine_code.AbsentGPU(arch)
    try:
        with replaced(place, constants), launch.compiling() as kernels:
            problems.PROBLEMS[number].make("meta")()
        usage = [machine_code.resources(kernel) for kernel in launched(kernels, place.kernel)]
    except Exception as error:
        return Compiled(constants, failed=f"{type(error).__name__}: {error}".splitlines()[0][:100])
    finally:
        driver._active = before
    if not usage:
        return Compiled(constants, failed="it is not launched")
    worst = {name: max(one[name] for one in usage) for name in usage[0]}
    return Compiled(constants, worst["registers"], worst["spilled"], worst["shared"])


def launched(kernels: Sequence[Any], name: str) -> list[Any]:
    """The compiled kernels that a table's entry is for.

    An entry may be for one form of a kernel (attention_forward_bulk of attention_forward_kernel).
    """
    exact = [kernel for kernel in kernels if kernel.metadata.name == name]
    family = name.rpartition("_")[0] + "_"
    return exact or [kernel for kernel in kernels if kernel.metadata.name.startswith(family)]


def processes() -> int:
    """As many as there are cores to be had."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1


_loaded: list[Any] = []


def _machine_code() -> Any:
    """The reader of compilers' output of the ahead-of-time tests, found by its path."""
    if not _loaded:
        path = ROOT / "tests" / "kernels" / "machine_code.py"
        spec = importlib.util.spec_from_file_location("fastllm_machine_code", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        _loaded.append(module)
    return _loaded[0]

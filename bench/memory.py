"""The peak memory of one call of an op: forward and backward, above the inputs and the gradients.

On a CPU it is taken in a process of its own (`python -m bench.memory OP CASE DTYPE CONTENDER`
prints it), with an allocator that gives every large block back at once: the resident pages then
are what the call really needs, tensors and the kernels' own buffers alike.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from .options import Options

if TYPE_CHECKING:
    from torch import Tensor

# Blocks of 64 KB and more are mapped and unmapped one by one.
EXACT = {"MALLOC_MMAP_THRESHOLD_": str(1 << 16), "MALLOC_TRIM_THRESHOLD_": "0"}


def peak_of_op(op: str, case: str, dtype: str, contender: str, options: Options) -> float | None:
    """Bytes at most above inputs and results; None where this system does not tell."""
    tuned = ("MALLOC_MMAP_MAX_", "MALLOC_TOP_PAD_")
    inherited = {name: value for name, value in os.environ.items() if name not in tuned}
    command = [sys.executable, "-m", "bench.memory", op, case, dtype, contender]
    done = subprocess.run(
        [*command, str(options.threads), options.device],
        env=inherited | EXACT,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    found = json.loads(done.stdout.splitlines()[-1])
    return None if found is None else float(found)


def resident() -> tuple[int, int] | None:
    """Bytes of memory resident now, and at most since `forget_peak`; None if not known."""
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        return None
    found = dict(re.findall(r"^(VmRSS|VmHWM):\s*(\d+) kB", text, re.MULTILINE))
    return int(found["VmRSS"]) * 1024, int(found["VmHWM"]) * 1024


def forget_peak() -> bool:
    """Let the peak start again from what is resident now; False where that cannot be done."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _measure(op: str, label: str, dtype: str, name: str, device: str) -> float | None:
    import torch

    from .cases import Problem, suite_of

    suite = suite_of(op)
    case = next(case for case in suite.cases if case.label == label)
    problem = Problem(suite, case, torch.device(device), getattr(torch, dtype))
    found = {c.name: c for c in problem.contenders(name.startswith("compile"))}
    if name not in found:
        raise ValueError(f"{op} {label}: expected one of {', '.join(found)}, found {name}")
    contender = found[name]
    problem.right_outputs, problem.right_gradients = [], []
    with contender.ready():
        # What the first call sets up for good (threads, compiled code, libraries) is not the op's.
        problem.forward_backward(contender)
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            results = problem.forward_backward(contender)
            return torch.cuda.max_memory_allocated() - before - _size(results)
        start = resident() if forget_peak() else None
        results = problem.forward_backward(contender)
        end = resident()
    return None if start is None or end is None else float(end[1] - start[0] - _size(results))


def _size(tensors: Iterable[Tensor]) -> int:
    """Bytes of the gradients, which everybody has to return."""
    return sum(t.numel() * t.element_size() for t in tensors)


if __name__ == "__main__":
    import torch

    op, case, dtype, contender, threads, device = sys.argv[1:]
    torch.set_num_threads(int(threads))
    print(json.dumps(_measure(op, case, dtype, contender, device)))

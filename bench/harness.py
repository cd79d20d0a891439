"""How an op is timed: correct first, then in turns, on inputs that exist before the clock starts.

The contenders of a case run one after another, round after round, in alternating order, so that
whatever else the machine does falls on all of them alike. A time is the median over the rounds;
the spread is (slowest - fastest) / median. Rates divide the work that a perfectly fused kernel
would need (each tensor read or written once; recomputation is not counted) by that time.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastllm.layout import PackedLayout
from fastllm.ops import OPS, cpp, report, use_backend

# Our kernels for each type of device. (Triton's interpreter on the CPU is for tests.)
KERNELS = {"cpu": "cpp", "cuda": "triton"}

# Norm of the difference to the fp32 reference, over the norm of the reference.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}


@dataclass(frozen=True)
class Case:
    """One size of one op."""

    label: str
    inputs: Callable[[], dict[str, Any]]
    """Makes the op's arguments: fp32, on the CPU."""
    gradients_of: tuple[str, ...] = ()
    """Arguments to differentiate; none: the op has no backward pass."""
    elements: float = 0
    """Elements that a fused forward pass reads and writes; 0 when `flops` is what counts."""
    flops: float = 0
    both: float = 2.0
    """Work of forward and backward together, over that of the forward pass."""

    def work(self, dtype: torch.dtype, backward: bool) -> tuple[float, str]:
        """Work of one call and its unit, "B" or "FLOP"."""
        amount, unit = (self.flops, "FLOP") if self.flops else (self.elements * dtype.itemsize, "B")
        return amount * (self.both if backward else 1.0), unit


@dataclass(frozen=True)
class Suite:
    """An op, what it is measured against, and the sizes."""

    op: Callable[..., Any]
    reference: Callable[..., Any]
    cases: tuple[Case, ...]
    peers: dict[str, Callable[..., Any]] = field(default_factory=dict)
    """Other ways to write it in PyTorch; NotImplementedError for a case they cannot do."""
    fp32: tuple[str, ...] = ()
    """Arguments that stay in fp32."""


@dataclass(frozen=True)
class Contender:
    """A function and the backend on which it runs (None: plain PyTorch)."""

    name: str
    function: Callable[..., Any]
    backend: str | None = None

    def ready(self) -> contextlib.AbstractContextManager[None]:
        """The state in which to call the function."""
        return use_backend(self.backend) if self.backend else contextlib.nullcontext()


class Problem:
    """A case with its tensors: inputs, and the gradients of the outputs."""

    def __init__(self, suite: Suite, case: Case, device: torch.device, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.arguments = {
            name: _placed(value, device, torch.float32 if name in suite.fp32 else dtype)
            for name, value in case.inputs().items()
        }
        self.leaves = [self.arguments[name].requires_grad_() for name in case.gradients_of]
        with torch.no_grad():
            outputs = _outputs(suite.reference(**self.arguments))
        self.output_gradients = [torch.randn_like(t) for t in outputs]

    def forward(self, function: Callable[..., Any]) -> tuple[Tensor, ...]:
        """Outputs of `function`, without autograd."""
        with torch.no_grad():
            return _outputs(function(**self.arguments))

    def forward_backward(self, function: Callable[..., Any]) -> tuple[Tensor, ...]:
        """Gradients of the leaves."""
        outputs = _outputs(function(**self.arguments))
        return torch.autograd.grad(outputs, self.leaves, self.output_gradients)


def suite_of(op: str) -> Suite:
    """The suite in `bench/ops/<op>.py`."""
    return importlib.import_module(f"bench.ops.{op}").SUITE


def contenders(suite: Suite, device: torch.device, compiled: bool) -> list[Contender]:
    """PyTorch first, then everything else that runs on this device."""
    found = [Contender("torch", suite.reference)]
    found += [Contender(peer, function) for peer, function in suite.peers.items()]
    if compiled:
        found.append(Contender("torch.compile", torch.compile(suite.reference)))
    backend = KERNELS[device.type]
    if serves(backend, device)[0]:
        found.append(Contender(backend, suite.op, backend))
    return found


def serves(backend: str, device: torch.device) -> tuple[bool, str]:
    """Whether a backend can serve a device, and what it says about that."""
    with use_backend(backend):
        line = report()[OPS[0]][device.type]
    return not line.startswith("none"), line


def bench(
    op: str, device: torch.device, dtype: torch.dtype, quick: bool, compiled: bool
) -> Iterator[dict[str, Any]]:
    """Time every case of `op`, forward and forward with backward.

    Yields:
        One record per case, pass and contender. A contender that disagrees with the reference is
        named and has no time.
    """
    suite = suite_of(op)
    for case in suite.cases[: 1 if quick else None]:
        problem = Problem(suite, case, device, dtype)
        candidates = contenders(suite, device, compiled)
        for backward in (False, True) if case.gradients_of else (False,):
            call = problem.forward_backward if backward else problem.forward
            agreeing = [c for c in candidates if _agrees(op, case, problem, suite, c, backward)]
            times = in_turns(call, agreeing, device, rounds=3 if quick else 7)
            amount, unit = case.work(dtype, backward)
            for contender in agreeing:
                blocks = times[contender.name]
                median = statistics.median(blocks)
                yield {
                    "op": op,
                    "case": case.label,
                    "dtype": str(dtype).removeprefix("torch."),
                    "pass": "forward+backward" if backward else "forward",
                    "by": contender.name,
                    "seconds": median,
                    "spread": (max(blocks) - min(blocks)) / median,
                    "work": amount,
                    "unit": unit,
                    "speedup": statistics.median(times["torch"]) / median,
                }


def in_turns(
    call: Callable[..., Any],
    candidates: list[Contender],
    device: torch.device,
    rounds: int,
    block_seconds: float = 0.05,
) -> dict[str, list[float]]:
    """Seconds per call of each contender, one value per round."""
    times: dict[str, list[float]] = {c.name: [] for c in candidates}
    repeats = {}
    for candidate in candidates:
        with candidate.ready():
            once = min(_timed(call, candidate.function, 1, device) for _ in range(3))
        repeats[candidate.name] = max(1, min(1000, round(block_seconds / once)))
    for turn in range(rounds):
        for candidate in candidates[:: -1 if turn % 2 else 1]:
            count = repeats[candidate.name]
            with candidate.ready():
                times[candidate.name].append(
                    _timed(call, candidate.function, count, device) / count
                )
    return times


def environment(device: torch.device) -> dict[str, Any]:
    """The machine, the versions and the commit that a result belongs to."""
    gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if gpu else _processor(),
        "threads": torch.get_num_threads(),
        "isa": cpp.isa() if cpp.available() else None,
        "platform": platform.platform(terse=True),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "commit": _commit(),
    }


def slug(name: str) -> str:
    """A device's name as a file name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _agrees(
    op: str, case: Case, problem: Problem, suite: Suite, contender: Contender, backward: bool
) -> bool:
    """Whether the contender gives the reference's numbers; says so if not."""
    where = f"{op} {case.label}: {contender.name}"
    call = problem.forward_backward if backward else problem.forward
    try:
        with contender.ready():
            found = call(contender.function)
    except NotImplementedError:
        return False
    for index, (value, expected) in enumerate(zip(found, call(suite.reference), strict=True)):
        difference = (value.float() - expected.float()).norm()
        # The reference has the same rounding errors: up to twice the tolerance lies between them.
        error = float(difference / expected.float().norm().clamp(min=1e-30))
        if not error <= 2 * TOLERANCE[problem.leaves[0].dtype if problem.leaves else value.dtype]:
            what = "gradient" if backward else "output"
            print(f"{where}: WRONG, not timed ({what} {index} is off by {error:.2g})")
            return False
    return True


def _timed(call: Callable[..., Any], function: Any, count: int, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    for _ in range(count):
        call(function)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


def _outputs(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def _placed(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, dtype) if value.is_floating_point() else value.to(device)
    return value.to(device) if isinstance(value, PackedLayout) else value


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        match = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE)
        if match:
            return match.group(1)
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit, with "+" for a changed tree; None outside a git checkout."""
    git = ["git", "-C", os.path.dirname(__file__)]
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
    if head.returncode:
        return None
    changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True)
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")

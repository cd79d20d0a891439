"""The ops as the suite sees them: cases, contenders, and the check that precedes every figure."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastllm.layout import PackedLayout
from fastllm.ops import OPS, report, use_backend

from .records import OURS

# Our kernels for each type of device. (Triton's interpreter on the CPU is for tests.)
KERNELS = {"cpu": "cpp", "cuda": "triton"}

# Norm of the difference to the fp64 reference, over the norm of the reference.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}


class Wrong(Exception):
    """A contender whose numbers are not the reference's."""


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
    memory: bool = False
    """Whether the peak memory of this case is worth a process of its own."""

    def work(self, dtype: torch.dtype, backward: bool) -> tuple[float, str]:
        """Work of one call and its unit, "B" or "FLOP"; recomputation is not counted."""
        amount, unit = (self.flops, "FLOP") if self.flops else (self.elements * dtype.itemsize, "B")
        return amount * (self.both if backward else 1.0), unit


@dataclass(frozen=True)
class Peer:
    """Another way to do what an op does.

    It raises NotImplementedError, when called or prepared, for a case that it cannot do.
    """

    function: Callable[..., Any]
    prepare: Callable[[dict[str, Any]], dict[str, Any]] | None = None
    """Makes from the op's arguments what a program would have at hand when it gets here."""
    same: bool = True
    """False: it does more than was asked, and its numbers are others; it is not checked."""


@dataclass(frozen=True)
class Suite:
    """An op, what it is measured against, and the sizes. The first case is the quick one."""

    op: Callable[..., Any]
    reference: Callable[..., Any]
    cases: tuple[Case, ...]
    peers: dict[str, Peer] = field(default_factory=dict)
    compiled: str | None = "eager"
    """Which contender torch.compile gets: the form that it makes the most of."""
    fp32: tuple[str, ...] = ()
    """Arguments that stay in fp32."""


@dataclass(frozen=True)
class Contender:
    """A function, what it is given, and the backend on which it runs (None: plain PyTorch)."""

    name: str
    function: Callable[..., Any]
    arguments: dict[str, Any]
    backend: str | None = None
    same: bool = True

    def ready(self) -> contextlib.AbstractContextManager[None]:
        """The state in which to call the function."""
        return use_backend(self.backend) if self.backend else contextlib.nullcontext()


class Problem:
    """A case with its tensors: inputs, the gradients of the outputs, and the right answers."""

    def __init__(self, suite: Suite, case: Case, device: torch.device, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.suite, self.case, self.dtype = suite, case, dtype
        self.arguments = {
            name: _placed(value, device, torch.float32 if name in suite.fp32 else dtype)
            for name, value in case.inputs().items()
        }
        self.leaves = [self.arguments[name].requires_grad_() for name in case.gradients_of]
        with use_backend("torch"):
            self._solve()

    def _solve(self) -> None:
        exact = {
            name: value.detach().double() if _is_float(value) else value
            for name, value in self.arguments.items()
        }
        leaves = [exact[name].requires_grad_() for name in self.case.gradients_of]
        outputs = outputs_of(self.suite.reference(**exact))
        self.output_gradients = [
            # A loss is a single number, and its gradient is what a trainer gives it.
            torch.ones_like(t, dtype=t.dtype) if t.dim() == 0 else torch.randn_like(t)
            for t in outputs
        ]
        self.right_outputs = [t.detach() for t in outputs]
        self.right_gradients: list[Tensor] = []
        if leaves:
            self.right_gradients = list(torch.autograd.grad(outputs, leaves, self.output_gradients))

    def contenders(self, compiled: bool) -> Iterator[Contender]:
        """PyTorch first, then everything else that may run this case, ours last."""
        suite = self.suite
        found = {"eager": Contender("eager", suite.reference, self.arguments)}
        for name, peer in suite.peers.items():
            with contextlib.suppress(NotImplementedError):
                given = peer.prepare(self.arguments) if peer.prepare else self.arguments
                found[name] = Contender(name, peer.function, given, same=peer.same)
        yield from found.values()
        if compiled and suite.compiled in found:
            torch._dynamo.reset()
            of = found[suite.compiled]
            name = "compile" if of.name == "eager" else f"compile {of.name}"
            yield Contender(name, torch.compile(of.function, dynamic=False), of.arguments)
        device = self._device()
        backend = KERNELS[device.type]
        if serves(backend, device)[0]:
            yield Contender(OURS, suite.op, self.arguments, "auto")

    def forward(self, contender: Contender) -> tuple[Tensor, ...]:
        """Its outputs, without autograd."""
        with torch.no_grad():
            return outputs_of(contender.function(**contender.arguments))

    def forward_backward(self, contender: Contender) -> tuple[Tensor, ...]:
        """Its gradients of the leaves."""
        outputs = outputs_of(contender.function(**contender.arguments))
        return torch.autograd.grad(outputs, self.leaves, self._gradients_like(outputs))

    def call(self, contender: Contender, backward: bool) -> Callable[[], tuple[Tensor, ...]]:
        """What is timed."""
        run = self.forward_backward if backward else self.forward
        return lambda: run(contender)

    def check(self, contender: Contender, backward: bool) -> None:
        """Compare with the fp64 reference.

        Raises:
            Wrong: outputs or gradients are off.
            NotImplementedError: the contender cannot do this case.
        """
        with contender.ready():
            found = self.call(contender, backward)()
        if not contender.same:
            return
        right = self.right_gradients if backward else self.right_outputs
        for index, (value, expected) in enumerate(zip(found, right, strict=True)):
            error = _error(value, expected)
            if not error <= TOLERANCE[self.dtype]:
                what = "gradient" if backward else "output"
                raise Wrong(f"WRONG, not timed: {what} {index} is off by {error:.2g}")

    def _gradients_like(self, outputs: tuple[Tensor, ...]) -> list[Tensor]:
        dtypes = tuple(t.dtype for t in outputs)
        if getattr(self, "_cast_to", None) != dtypes:
            pairs = zip(self.output_gradients, outputs, strict=True)
            self._cast = [g.to(t.dtype) for g, t in pairs]
            self._cast_to = dtypes
        return self._cast

    def _device(self) -> torch.device:
        return next(v.device for v in self.arguments.values() if isinstance(v, Tensor))


def suites() -> list[str]:
    """The names of all suites: the ops, in their order, and what else has a file."""
    files = sorted(path.stem for path in (Path(__file__).parent / "ops").glob("[a-z]*.py"))
    return list(dict.fromkeys((*OPS, *files)))


def suite_of(op: str) -> Suite:
    """The suite in `bench/ops/<op>.py`."""
    return importlib.import_module(f"bench.ops.{op}").SUITE


def serves(backend: str, device: torch.device) -> tuple[bool, str]:
    """Whether a backend can serve a device, and what it says about that."""
    with use_backend(backend):
        line = report()[OPS[0]][device.type]
    return not line.startswith("none"), line


def outputs_of(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """A tuple, for ops with one output too."""
    return result if isinstance(result, tuple) else (result,)


def _error(value: Tensor, expected: Tensor) -> float:
    difference = (value.double() - expected).norm()
    return float(difference / expected.norm().clamp(min=1e-30))


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _placed(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, dtype) if value.is_floating_point() else value.to(device)
    return value.to(device) if isinstance(value, PackedLayout) else value

"""Right answers in fp64, and how far from them what was computed may be."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastllm.ops import use_backend

# Norm of the difference over the norm of the right answer: three roundings of an element, about.
NORM = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 1.5e-3, torch.float64: 1e-9}

# The largest difference over the largest element. It finds the one element in millions that the
# norm does not see.
LARGEST = {torch.float32: 1e-3, torch.bfloat16: 4e-2, torch.float16: 6e-3, torch.float64: 1e-8}

Inputs = dict[str, Any]


class Wrong(Exception):
    """Numbers that are not the reference's."""


@dataclass(frozen=True)
class Right:
    """The outputs, and the gradients of the leaves, in their order."""

    outputs: tuple[Tensor, ...]
    gradients: tuple[Tensor, ...] = ()


Exact = Callable[[Inputs, tuple[str, ...], Sequence[Tensor]], Right]
"""From inputs, the names of the leaves, and the outputs' gradients (none: no backward pass)."""


def by_autograd(reference: Callable[..., Any]) -> Exact:
    """The right answers by the op's definition in PyTorch, on fp64 copies."""

    def solve(inputs: Inputs, leaves: tuple[str, ...], gradients: Sequence[Tensor]) -> Right:
        given = {name: widened(value) for name, value in inputs.items()}
        asked = [given[name].requires_grad_() for name in leaves] if gradients else []
        with use_backend("torch"), torch.set_grad_enabled(bool(asked)):
            outputs = outputs_of(reference(**given))
        found: tuple[Tensor, ...] = ()
        if asked:
            differentiable = [output for output in outputs if output.requires_grad]
            wide = [widened(gradient) for gradient in gradients[: len(differentiable)]]
            found = torch.autograd.grad(differentiable, asked, wide)
        return Right(tuple(output.detach() for output in outputs), found)

    return solve


def widened(value: Any) -> Any:
    """An fp64 copy of a tensor of floats; anything else as it is."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().double()
    return value


def outputs_of(result: Any) -> tuple[Tensor, ...]:
    """A tuple, for functions with one output too."""
    return tuple(result) if isinstance(result, tuple | list) else (result,)


def compare(
    found: Sequence[Tensor], right: Sequence[Tensor], what: str, dtype: torch.dtype
) -> float:
    """The largest error in norm.

    Raises:
        Wrong: NaN, another shape, or too large a difference.
    """
    worst = 0.0
    for index, (value, expected) in enumerate(zip(found, right, strict=True)):
        name = f"{what} {index}" if len(right) > 1 else what
        if value.shape != expected.shape:
            raise Wrong(f"{name} has shape {tuple(value.shape)}, not {tuple(expected.shape)}")
        norm, largest = errors(value, expected)
        if not norm <= NORM[dtype] or not largest <= LARGEST[dtype]:
            raise Wrong(f"{name} is off by {norm:.2g} in norm, {largest:.2g} at most")
        worst = max(worst, norm)
    return worst


def errors(value: Tensor, expected: Tensor) -> tuple[float, float]:
    """Errors in norm and at most, relative; NaN is an infinite error."""
    if not value.numel():
        return 0.0, 0.0
    difference = value.detach().double() - expected
    small = torch.finfo(torch.float64).tiny
    norm = float(difference.norm() / expected.norm().clamp(min=small))
    largest = float(difference.abs().max() / expected.abs().max().clamp(min=small))
    return tuple(math.inf if math.isnan(error) else error for error in (norm, largest))


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Fill what is allocated with NaN, and integers with their largest, before it is written."""
    before = torch.are_deterministic_algorithms_enabled()
    warn = torch.is_deterministic_algorithms_warn_only_enabled()
    filling = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn)
        torch.utils.deterministic.fill_uninitialized_memory = filling

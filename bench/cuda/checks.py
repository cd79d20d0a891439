"""Section `check`: every kernel against fp64, on inputs that no run has seen before.

Memory that a kernel is given to write holds NaN until it does. Inputs must stay as they were, and a
second call must give the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastllm.ops import use_backend

from ..records import Record
from . import check_large, check_problems, check_sampling, optimizer
from .case import Case, Context
from .exact import Exact, Inputs, Right, Wrong, compare, outputs_of, poisoned

NAME = "check"
SHORT = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Check:
    """A call, its right answer, and how its tensors lie."""

    op: str
    label: str
    dtype: torch.dtype
    function: Callable[..., Any]
    exact: Exact
    inputs: Callable[[torch.device, torch.Generator], Inputs]
    leaves: tuple[str, ...] = ()
    gradients: str = "plain"
    """plain, expanded (one row for all) or spaced (rows that do not touch)."""
    spaced: tuple[str, ...] = field(default=())
    """Inputs whose rows do not touch either."""


def cases(context: Context) -> list[Case]:
    """All checks, those with more than 2^31 elements last."""
    checks = list(check_problems.checks(context))
    if context.scale == "quick":
        checks = [check for check in checks if check.dtype == torch.bfloat16][::3]
    found = [
        Case(NAME, check.op, check.label, partial(_run, check), _short(check.dtype), seconds=1.0)
        for check in checks
    ]
    found += check_sampling.cases(context)
    found += [
        Case(NAME, "optimizer", mode.label, partial(_optimizer, mode), "", seconds=1.0)
        for mode in optimizer.MODES
    ]
    if context.scale != "quick":
        found += check_large.cases(context)
    return found


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _run(check: Check, context: Context) -> Iterator[Record]:
    blank = Case(NAME, check.op, check.label, partial(_run, check), _short(check.dtype))
    try:
        error = run(check, context)
    except Wrong as wrong:
        yield blank.remark(f"WRONG: {wrong}")
    else:
        yield blank.remark(f"ok, off by {error:.2g}")


def _optimizer(mode: optimizer.Mode, context: Context) -> Iterator[Record]:
    blank = Case(NAME, "optimizer", mode.label, partial(_optimizer, mode), "")
    try:
        with poisoned():
            error = optimizer.check(mode, context)
    except Wrong as wrong:
        yield blank.remark(f"WRONG: {wrong}")
    else:
        yield blank.remark(f"ok, off by {error:.2g}")


def run(check: Check, context: Context) -> float:
    """How far outputs and gradients are off, in norm.

    Raises:
        Wrong: too far, or inputs were written to, or two calls differ.
    """
    generator = context.generator(check.op, check.label, check.dtype)
    inputs = check.inputs(context.device.place, generator)
    for name in check.spaced:
        inputs[name] = spaced(inputs[name])
    inputs |= {name: inputs[name].requires_grad_() for name in check.leaves}
    before = {n: t.detach().clone() for n, t in inputs.items() if isinstance(t, Tensor)}
    kernels = context.device.backend
    with use_backend(kernels), poisoned():
        outputs = outputs_of(check.function(**inputs))
    gradients = [laid(t, check.gradients, generator) for t in outputs if t.requires_grad]
    with use_backend(kernels), poisoned():
        found = _gradients(check, inputs, outputs, gradients)
        again = outputs_of(check.function(**inputs))
        once_more = _gradients(check, inputs, again, gradients)
    _unwritten(inputs, before)
    _alike([*outputs, *found], [*again, *once_more])
    right: Right = check.exact(inputs, check.leaves, gradients)
    error = compare(outputs, right.outputs, "output", check.dtype)
    return max(error, compare(found, right.gradients, "gradient", check.dtype))


def _gradients(
    check: Check, inputs: Inputs, outputs: Sequence[Tensor], gradients: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    if not check.leaves:
        return ()
    asked = [output for output in outputs if output.requires_grad]
    return torch.autograd.grad(asked, [inputs[name] for name in check.leaves], gradients)


def _unwritten(inputs: Inputs, before: dict[str, Tensor]) -> None:
    for name, was in before.items():
        if not torch.equal(inputs[name].detach(), was):
            raise Wrong(f"the input {name} was written to")


def _alike(first: Sequence[Tensor], second: Sequence[Tensor]) -> None:
    for index, (one, other) in enumerate(zip(first, second, strict=True)):
        if not torch.equal(one, other) and not bool(one.isnan().any()):
            raise Wrong(f"two calls differ in result {index}")


def spaced(tensor: Tensor) -> Tensor:
    """The same values in rows that do not touch, NaN between them."""
    room = tensor.new_full((*tensor.shape[:-1], tensor.shape[-1] + 16), float("nan"))
    return room[..., : tensor.shape[-1]].copy_(tensor)


def laid(like: Tensor, how: str, generator: torch.Generator) -> Tensor:
    """A random gradient in one of the memory layouts that autograd hands over."""
    if like.dim() == 0:
        return torch.ones_like(like)
    found = torch.randn(like.shape, generator=generator, device=like.device).to(like.dtype)
    if how == "expanded":
        return found[:1].expand(like.shape)
    return spaced(found) if how == "spaced" else found

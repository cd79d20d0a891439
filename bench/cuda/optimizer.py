"""Section `optimizer`: clip and AdamW on a billion parameters, in 28 and in 14 bytes for each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastllm.ops import use_backend
from fastllm.ops.optimizer import AdamW, Settings, Slot
from fastllm.ops.working import copy_of, keep_copies

from ..harness import in_turns
from ..records import OTHER_WORK, OURS, Record
from .case import Case, Context
from .device import first_line
from .exact import Wrong, compare
from .goals import Within, judged

NAME = "optimizer"

MAX_NORM, RATE, DECAY = 1.0, 1e-3, 0.1
BETA1, BETA2, EPS = 0.9, 0.999, 1e-8

Step = Callable[[], object]
Shapes = list[tuple[int, int]]


@dataclass(frozen=True)
class Mode:
    """What weights, gradients and moments are kept in."""

    label: str
    weight: torch.dtype
    gradient: torch.dtype
    moment: torch.dtype
    copies: bool
    bytes: int
    """Of a parameter: what the update reads and writes. The norm reads the gradients once more."""
    seconds: float | None = None
    """For a billion parameters."""


F32, B16 = torch.float32, torch.bfloat16

MODES = (
    Mode("fp32 master, bf16 copy and gradients", F32, B16, F32, True, 28, 7.0e-3),
    Mode("bf16, stochastic rounding", B16, B16, B16, False, 14, 3.6e-3),
    Mode("fp32 master, bf16 copy, fp32 gradients", F32, F32, F32, True, 30),
)

SMALL: Shapes = [(64, 48), (1, 130), (33, 7)]


def shapes(context: Context) -> Shapes:
    """The matrices of a model: layers of 2,048 and two tables."""
    layer = [(2048, 2048), (512, 2048), (512, 2048), (2048, 2048), *[(8192, 2048)] * 3, (1, 2048)]
    return context.pick([*layer * 16, (14000, 2048)], [*layer * 16, (14000, 2048)], SMALL)


def cases(context: Context) -> list[Case]:
    """One for each mode."""
    modes = MODES[:2] if context.scale == "quick" else MODES
    return [Case(NAME, "clip and AdamW", mode.label, partial(_run, mode), "") for mode in modes]


def _run(mode: Mode, context: Context) -> Iterator[Record]:
    with context.device.working():
        yield from _measured(mode, context)


def _measured(mode: Mode, context: Context) -> Iterator[Record]:
    count = sum(rows * columns for rows, columns in shapes(context))
    label = f"{count / 1e9:.2f}e9 parameters, {mode.label}"
    blank = Record(NAME, "clip and AdamW", label, "", OURS)
    try:
        check(mode, context)
    except Wrong as error:
        yield replace(blank, note=f"WRONG, not timed: {error}")
        return
    makers = {
        OURS: lambda mode, tensors: ours(mode, tensors, context.device.backend)[0],
        "clip, AdamW fused": partial(of_torch, fused=True, clip=True),
        "clip, AdamW foreach": partial(of_torch, fused=False, clip=True),
        "AdamW fused alone": partial(of_torch, fused=True, clip=False),
    }
    blocks, notes = {}, {}
    for name, make in makers.items():
        context.progress(f"optimizer, {mode.label}: {name}")
        try:
            step = make(mode, _tensors(mode, shapes(context), context))
            blocks[name] = context.device.timed([step], graph=False).block
        except Exception as error:
            if name == OURS or not context.device.alive():
                raise
            yield replace(blank, contender=name, note=f"failed: {first_line(error)}")
            continue
        alike = name == OURS or (mode.copies is False and "clip" in name)
        notes[name] = "" if alike else OTHER_WORK
    turns = in_turns(blocks, context.rounds, sample=lambda: None)
    goal = Within(mode.seconds * count / 1e9) if mode.seconds else None
    amount = float(mode.bytes) * count
    copy = context.rates.get("copy", 0.0)
    for record in turns.records(NAME, blank.name, label, "", work=amount, unit="B", note=notes):
        share = (record.rate or 0.0) / copy if copy else None
        record = replace(record, roofline=share)
        yield replace(record, **judged(record, goal if record.contender == OURS else None))


@dataclass
class _Tensors:
    weights: list[nn.Parameter]
    gradients: list[Tensor]


def _tensors(mode: Mode, sizes: Shapes, context: Context, name: object = "") -> _Tensors:
    generator = context.generator(mode.label, name)

    def normal(shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        found = torch.randn(shape, generator=generator, device=context.device.place)
        return found.to(dtype)

    return _Tensors(
        [nn.Parameter(normal(shape, mode.weight)) for shape in sizes],
        [normal(shape, mode.gradient) for shape in sizes],
    )


def ours(mode: Mode, tensors: _Tensors, backend: str) -> tuple[Step, list[Slot]]:
    """The kernels that our trainers' optimizer launches, and what they write."""
    if mode.copies:
        keep_copies(tensors.weights, B16)
    slots = [
        Slot(
            weight.detach() if not mode.copies else weight,
            torch.zeros_like(weight, dtype=mode.moment, requires_grad=False),
            torch.zeros_like(weight, dtype=mode.moment, requires_grad=False),
            DECAY,
        )
        for weight in tensors.weights
    ]
    loss = torch.zeros((), device=tensors.weights[0].device)
    settings = Settings(BETA1, BETA2, EPS, MAX_NORM)
    with use_backend(backend):
        adamw = AdamW(slots, settings)

    def step() -> object:
        with torch.no_grad():
            return adamw.step_(tensors.gradients, loss, RATE)

    return step, slots


def of_torch(mode: Mode, tensors: _Tensors, fused: bool, clip: bool) -> Step:
    """PyTorch's own, which has no copies and rounds to nearest."""
    how: dict[str, Any] = {"fused": True} if fused else {"foreach": True}
    adamw = torch.optim.AdamW(
        tensors.weights, lr=RATE, betas=(BETA1, BETA2), eps=EPS, weight_decay=DECAY, **how
    )
    gradients = [g.to(w.dtype) for g, w in zip(tensors.gradients, tensors.weights, strict=True)]

    def step() -> None:
        for weight, gradient in zip(tensors.weights, gradients, strict=True):
            weight.grad = gradient
        if clip:
            nn.utils.clip_grad_norm_(tensors.weights, MAX_NORM)
        adamw.step()

    return step


def check(mode: Mode, context: Context, sizes: Shapes = SMALL) -> float:
    """Two steps against PyTorch's AdamW in fp64; how far the weights are off.

    Raises:
        Wrong: by more than the dtype's rounding explains.
    """
    tensors = _tensors(mode, sizes, context, "check")
    exact = [nn.Parameter(weight.detach().double()) for weight in tensors.weights]
    adamw = torch.optim.AdamW(exact, lr=RATE, betas=(BETA1, BETA2), eps=EPS, weight_decay=DECAY)
    step, slots = ours(mode, tensors, context.device.backend)
    starts = [weight.detach().clone() for weight in exact]
    for _ in range(2):
        gradients = [gradient.double() for gradient in tensors.gradients]
        norm = sum(float(g.square().sum()) for g in gradients) ** 0.5
        for weight, gradient in zip(exact, gradients, strict=True):
            weight.grad = gradient * min(1.0, MAX_NORM / (norm + 1e-6))
        adamw.step()
        step()
    found = [slot.parameter.detach() for slot in slots]
    right = [weight.detach() for weight in exact]
    error = compare(found, right, "weight", mode.weight)
    if mode.weight == F32:
        # Most of a weight is where it was: what the steps changed has to be right too.
        changes = [(f.double() - s) for f, s in zip(found, starts, strict=True)]
        moved = [(r - s) for r, s in zip(right, starts, strict=True)]
        error = compare(changes, moved, "change", B16)
    if mode.copies:
        for weight, slot in zip(tensors.weights, slots, strict=True):
            copy = copy_of(weight)
            if copy is None or not torch.equal(copy, slot.parameter.detach().to(B16)):
                raise Wrong("the copy is not the weight, rounded")
    return error

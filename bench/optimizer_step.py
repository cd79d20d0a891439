"""The end of a training step on 124.7M parameters: clip the gradients, then AdamW.

Clipping alone reads every gradient and writes it back; it can be folded into the optimizer, which
reads them anyway. So the two are timed together, and PyTorch's AdamW without clipping beside them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from fastllm import SFTConfig
from fastllm.training.optimizer import Optimizer

from . import roofline
from .harness import in_turns, repeated
from .options import Options
from .records import OTHER_WORK, OURS, Record

NAME = "clip and AdamW"

# 12 layers of 768 and a vocabulary of 32,000.
LAYER = ((768, 768), (256, 768), (256, 768), (768, 768), (2048, 768), (2048, 768), (768, 2048))
SHAPES = ((32000, 768), *LAYER * 12, (32000, 768))
QUICK_SHAPES = LAYER * 2

MAX_NORM, LEARNING_RATE = 1.0, 1e-3

# PyTorch sums the squares of a matrix in fp32, and is off by as much as 6e-4 on the largest.
TOLERANCE = 1e-3

# A step on these gradients, which it may write to or drop.
Step = Callable[[Sequence[Tensor]], None]
Maker = Callable[[list[nn.Parameter]], Step]


def run(options: Options) -> Iterator[Record]:
    """Whole optimizer steps, checked on a smaller model."""
    shapes = QUICK_SHAPES if options.quick else SHAPES
    count = sum(rows * columns for rows, columns in shapes)
    what = "ops", NAME, f"{count / 1e6:.1f}M parameters", "float32"
    gradients = [torch.randn(shape, device=options.device) for shape in shapes]
    blocks, notes = {}, {}
    for name, make in contenders().items():
        clips = name != WITHOUT
        wrong = _wrong(make, options.device) if clips else ""
        if wrong:
            yield Record(*what, name, note=wrong)
            continue
        parameters = [nn.Parameter(torch.randn(shape, device=options.device)) for shape in shapes]
        blocks[name] = repeated(_call(make(parameters), gradients), options.device)
        notes[name] = "" if clips else OTHER_WORK
    turns = in_turns(blocks, options.rounds)
    # The gradients are read for their norm; then parameters, gradients and moments are read, and
    # all but the gradients written.
    amount = 8.0 * 4 * count
    shares = roofline.fractions(turns.rounds, amount, "B", "float32", options)
    yield from turns.records(*what, work=amount, unit="B", roofline=shares, note=notes)


WITH, WITHOUT = "clip, AdamW fused", "AdamW fused alone"


def contenders() -> dict[str, Maker]:
    """Makers of steps, by name."""
    return {
        WITH: lambda parameters: _torch(parameters, clip=True),
        WITHOUT: lambda parameters: _torch(parameters, clip=False),
        OURS: ours,
    }


def _torch(parameters: list[nn.Parameter], clip: bool) -> Step:
    adamw = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0, fused=True)

    def step(gradients: Sequence[Tensor]) -> None:
        _give(parameters, gradients)
        if clip:
            nn.utils.clip_grad_norm_(parameters, MAX_NORM)
        adamw.step()
        adamw.zero_grad(set_to_none=True)

    return step


def ours(parameters: list[nn.Parameter]) -> Step:
    """The optimizer that our trainers use."""
    model = nn.ParameterList(parameters)
    optimizer = Optimizer(model, SFTConfig(max_grad_norm=MAX_NORM), scale_loss=False)
    loss = torch.zeros((), device=parameters[0].device)

    def step(gradients: Sequence[Tensor]) -> None:
        _give(parameters, gradients)
        optimizer.step(LEARNING_RATE, loss)

    return step


def _give(parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor]) -> None:
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient


def _call(step: Step, gradients: Sequence[Tensor]) -> Callable[[], None]:
    return lambda: step(gradients)


def _wrong(make: Maker, device: str) -> str:
    """What is wrong with two steps on two sets of gradients; "" if nothing is."""
    generator = torch.Generator().manual_seed(0)

    def random() -> list[Tensor]:
        return [torch.randn(shape, generator=generator).to(device) for shape in QUICK_SHAPES]

    start = random()
    found = [nn.Parameter(t.clone()) for t in start]
    exact = [nn.Parameter(t.double()) for t in start]
    step = make(found)
    adamw = torch.optim.AdamW(exact, lr=LEARNING_RATE, weight_decay=0.0)
    for gradients in (random(), random()):
        norm = sum(float(g.double().square().sum()) for g in gradients) ** 0.5
        _give(exact, [g.double() * (MAX_NORM / norm) for g in gradients])
        adamw.step()
        step(gradients)
    error = max(
        float((one.detach() - right.detach()).norm() / (right.detach() - begin).norm())
        for one, right, begin in zip(found, exact, start, strict=True)
    )
    return f"WRONG, not timed: the update is off by {error:.2g}" if not error <= TOLERANCE else ""

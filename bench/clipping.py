"""Clipping the gradients of 124.7M parameters: one read of them, and one write if they are long."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from . import roofline
from .harness import in_turns, repeated
from .options import Options
from .records import OURS, Record

NAME = "clip_grad_norm"

# 12 layers of 768 and a vocabulary of 32,000: 124.7M parameters.
LAYER = ((768, 768), (256, 768), (256, 768), (768, 768), (2048, 768), (2048, 768), (768, 2048))
SHAPES = ((32000, 768), *LAYER * 12, (32000, 768))
QUICK_SHAPES = LAYER * 2

MAX_NORM = 1.0


def run(options: Options) -> Iterator[Record]:
    """Gradients far above the limit, so that every call has them to scale."""
    shapes = QUICK_SHAPES if options.quick else SHAPES
    parameters = [nn.Parameter(torch.empty(shape, device=options.device)) for shape in shapes]
    gradients = [torch.randn(shape, device=options.device) for shape in shapes]
    count = sum(p.numel() for p in parameters)
    case = f"{count / 1e6:.1f}M parameters"
    blocks = {}
    for name, clip in contenders().items():
        wrong = _wrong(clip, parameters, gradients)
        if wrong:
            yield Record("ops", NAME, case, "float32", name, note=wrong)
            continue
        blocks[name] = repeated(_renewed(clip, parameters, gradients), options.device)
    turns = in_turns(blocks, options.rounds)
    amount = 3.0 * 4 * count  # read, read again and written
    shares = roofline.fractions(turns.rounds, amount, "B", "float32", options)
    yield from turns.records("ops", NAME, case, "float32", work=amount, unit="B", roofline=shares)


def contenders() -> dict[str, Callable[[list[nn.Parameter], float], Tensor]]:
    """Functions that clip the gradients of parameters in place and return their norm."""
    found = {
        "clip_grad_norm_": lambda p, limit: nn.utils.clip_grad_norm_(p, limit),
        "clip_grad_norm_ foreach": lambda p, limit: nn.utils.clip_grad_norm_(
            p, limit, foreach=True
        ),
    }
    try:
        from fastllm.training.optimizer import clip_grad_norm_
    except ImportError:
        return found
    return found | {OURS: clip_grad_norm_}


def _renewed(clip: Callable, parameters: list[nn.Parameter], gradients: list[Tensor]) -> Callable:
    """Clip the same tensors each time; the limit sinks, so that each call scales them."""
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    limit = [MAX_NORM]

    def call() -> Tensor:
        limit[0] *= 0.999
        return clip(parameters, limit[0])

    return call


def _wrong(clip: Callable, parameters: list[nn.Parameter], gradients: list[Tensor]) -> str:
    """What is wrong with its numbers; "" if nothing is."""
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    # Summed tensor by tensor in fp64: 124.7M numbers as one would need a gigabyte.
    exact = sum(float(g.double().square().sum()) for g in gradients) ** 0.5
    norm = float(clip(parameters, MAX_NORM))
    factor = MAX_NORM / (exact + 1e-6)
    error = max(
        float((p.grad - g * factor).norm() / (g * factor).norm())
        for p, g in zip(parameters, gradients, strict=True)
        if p.grad is not None
    )
    error = max(error, abs(norm - exact) / exact)
    return f"WRONG, not timed: off by {error:.2g}" if not error <= 1e-4 else ""

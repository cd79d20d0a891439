"""What kernels/optimizer.py computes, in PyTorch: the definition, and what serves elsewhere."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

# Places in `numbers` and `counts`: as in kernels/optimizer.py.
RATE, FACTOR, SCALE = range(3)
TAKEN, FAILED, CLEAN, SKIPPED = range(4)

FIRST_SCALE = 2.0**16
"""The loss scale of fp16 at the start, as in torch.amp.GradScaler."""

_WORD = 0xFFFFFFFF
_GOLDEN = 0x9E3779B9


@dataclass(frozen=True)
class Settings:
    """What does not change during a run."""

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    max_norm: float = math.inf
    """Longer gradients are clipped to this; inf for no clipping."""
    seed: int = 0
    """Of stochastic rounding."""
    scaled: bool = False
    """The loss is multiplied by `AdamW.scale`. An overflow of the gradients halves it and leaves
    the step out; it is no failure."""
    growth_interval: int = 2000
    """Steps without an overflow until the loss scale is doubled."""


class Slot(NamedTuple):
    """A tensor that is optimized."""

    parameter: Tensor
    mean: Tensor
    square: Tensor
    decay: float
    """Decoupled weight decay."""


def adamw_reference(
    slot: Slot, gradient: Tensor, step: Tensor, rate: Tensor, settings: Settings
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition, in the dtype of the gradient.

    Args:
        slot: the parameter and its moments, which are not written.
        gradient: unscaled and clipped.
        step: which one this is for the parameter, from 1.
        rate: learning rate.

    Returns:
        The new parameter, mean and square.
    """
    parameter, mean, square = (t.to(gradient.dtype) for t in slot[:3])
    mean = mean + (gradient - mean) * (1 - settings.beta1)
    square = square * settings.beta2 + gradient * gradient * (1 - settings.beta2)
    correction1 = -torch.expm1(step * logarithm(settings.beta1))
    correction2 = -torch.expm1(step * logarithm(settings.beta2))
    size = square.sqrt() / correction2.sqrt() + settings.eps
    change = parameter * (rate * slot.decay) + mean / size * (rate / correction1)
    return parameter - change, mean, square


def update_(
    slot: Slot,
    gradient: Tensor,
    steps: Tensor,
    rate: Tensor,
    taken: Tensor,
    stream: int,
    settings: Settings,
) -> None:
    """Take the step of one slot if it is to be taken; bf16 is rounded stochastically.

    Args:
        slot: written.
        gradient: unscaled and clipped, in the dtype of the arithmetic.
        steps: how many were taken, counted up.
        rate: learning rate.
        taken: a scalar, bool.
        stream: number of the slot, for its random bits.
    """
    steps += taken
    new = adamw_reference(slot, gradient, steps, rate, settings)
    stored = slot.parameter, slot.mean, slot.square
    words = None
    if torch.bfloat16 in {old.dtype for old in stored}:
        words = random_words(settings.seed, stream, steps, slot.parameter)
    for old, value, bits in zip(stored, new, shares(words), strict=True):
        old.copy_(torch.where(taken, rounded(value, old.dtype, bits), old))


def random_words(seed: int, stream: int, step: Tensor, like: Tensor) -> Tensor:
    """32 random bits for each element of a tensor, int64: as in kernels/stochastic.py.

    Args:
        seed: of the run.
        stream: number of the tensor.
        step: a scalar.
        like: its shape is that of the result.
    """
    index = torch.arange(like.numel(), device=like.device).view_as(like)
    key = _mixed(((seed & 0x7FFFFFFF) + step.long() * _GOLDEN) & _WORD)
    key = _mixed(key ^ ((stream * 0x85EBCA6B + (index >> 32)) & _WORD))
    x = (index & _WORD) ^ key
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _WORD
    x = ((x ^ (x >> 15) ^ _mixed((key + _GOLDEN) & _WORD)) * 0x846CA68B) & _WORD
    return x ^ (x >> 16)


def _mixed(x: Tensor) -> Tensor:
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _WORD
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _WORD
    return x ^ (x >> 16)


def shares(words: Tensor | None) -> tuple[Tensor | None, ...]:
    """16 random bits each for the parameter, its mean and its square."""
    if words is None:
        return None, None, None
    return words & 0xFFFF, ((words * _GOLDEN) & _WORD) >> 16, words >> 16


def rounded(x: Tensor, dtype: torch.dtype, random: Tensor | None) -> Tensor:
    """fp32 numbers in `dtype`; bf16 stochastically, with 16 random bits each."""
    if dtype != torch.bfloat16:
        return x.to(dtype)
    assert random is not None
    # The probability of the next larger magnitude is the part that is cut off.
    bits = (x.float().view(torch.int32) + random.to(torch.int32)) & -0x10000
    return torch.where(x.isnan(), x, bits.view(torch.float32)).to(dtype)


def gradient_norm(gradients: Sequence[Tensor | None], scale: Tensor) -> Tensor:
    """Of gradients that are divided by the loss scale."""
    given = [g for g in gradients if g is not None]
    if not given:
        return torch.zeros_like(scale)
    norms = [torch.linalg.vector_norm(g, dtype=scale.dtype) for g in given]
    return torch.linalg.vector_norm(torch.stack(norms)) / scale


def decide_(
    settings: Settings, numbers: Tensor, counts: Tensor, norm: Tensor, loss: Tensor
) -> Tensor:
    """Whether the step is taken; what it does to the factor, the loss scale and the counts."""
    finite, good_loss = norm.isfinite(), loss.isfinite()
    before = counts[FAILED] != 0
    taken = finite & good_loss & ~before
    scale = numbers[SCALE].clone()
    numbers[FACTOR] = (settings.max_norm / (norm + 1e-6)).clamp(max=1.0) / scale
    counts[TAKEN] = taken
    if not settings.scaled:
        counts[FAILED] = before | ~good_loss | ~finite
        return taken
    counted = good_loss & ~before
    longer = (counts[CLEAN] + 1) * finite
    grows = longer == settings.growth_interval
    doubled = torch.where((scale * 2).isfinite(), scale * 2, scale)
    changed = torch.where(finite, torch.where(grows, doubled, scale), scale / 2)
    numbers[SCALE] = torch.where(counted, changed, scale)
    counts[CLEAN] = torch.where(counted, longer * ~grows, counts[CLEAN])
    counts[SKIPPED] += counted & ~finite
    counts[FAILED] = before | ~good_loss
    return taken


def logarithm(base: float) -> float:
    """Natural, of 0 too."""
    return math.log(base) if base > 0 else -math.inf

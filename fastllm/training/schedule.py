"""The learning rate as a function of the step: no state, so nothing to save or restore."""

from __future__ import annotations

import math

from .config import TrainingConfig


def warmup_steps(config: TrainingConfig, total_steps: int) -> int:
    """Steps of warm-up; a setting below 1 is a fraction of all steps."""
    setting = config.warmup_steps
    return math.ceil(setting * total_steps) if setting < 1 else int(setting)


def learning_rate(config: TrainingConfig, peak: float, step: int, total_steps: int) -> float:
    """Learning rate of optimizer step `step` (from 0) of `total_steps`."""
    warmup = warmup_steps(config, total_steps)
    if step < warmup:
        return peak * step / warmup
    progress = (step - warmup) / max(1, total_steps - warmup)
    match config.lr_scheduler_type:
        case "linear":
            return peak * (1 - progress)
        case "cosine":
            return peak * 0.5 * (1 + math.cos(math.pi * progress))
        case _:
            return peak

"""What GRPO measures, in TRL's names: rewards and lengths of a rollout, sampler against trainer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..generation import Completion
from . import distributed
from .averages import Metric

ZERO_STD = 1e-8
"""Rewards whose standard deviation is below this are equal, as TRL counts them."""


def reward_metrics(
    total: Tensor, each: Tensor, names: Sequence[str], group_std: Tensor
) -> dict[str, Metric]:
    """Metrics of rewards.

    Args:
        total: weighted rewards [B]; NaN where nothing scored.
        each: of each function [B, R].
        names: of the functions [R].
        group_std: standard deviation of each group [B / G].
    """
    metrics: dict[str, Metric] = {
        "reward": mean(total),
        "reward_std": (group_std.sum(), group_std.numel()),
        "frac_reward_zero_std": ((group_std < ZERO_STD).sum(), group_std.numel()),
    }
    for name, column in zip(names, each.unbind(1), strict=True):
        known = column[~column.isnan()]
        if known.numel():
            metrics[f"rewards/{name}/mean"] = mean(known)
            metrics[f"rewards/{name}/std"] = (known.std(correction=0), 1)
    return metrics


def length_metrics(completions: Sequence[Completion]) -> dict[str, Metric]:
    """Metrics of the completions' lengths, and of those that ended by themselves."""
    lengths = torch.tensor([len(c.token_ids) for c in completions], dtype=torch.float32)
    ended = torch.tensor([c.finish_reason == "stop" for c in completions])
    metrics: dict[str, Metric] = {
        "completions/mean_length": mean(lengths),
        "completions/min_length": (lengths.min(), 1),
        "completions/max_length": (lengths.max(), 1),
        "completions/clipped_ratio": ((~ended).sum(), len(completions)),
    }
    if ended.any():
        terminated = lengths[ended]
        metrics |= {
            "completions/mean_terminated_length": mean(terminated),
            "completions/min_terminated_length": (terminated.min(), 1),
            "completions/max_terminated_length": (terminated.max(), 1),
        }
    return metrics


def mean(values: Tensor) -> Metric:
    """The mean of the values that are not NaN."""
    known = values[~values.isnan()]
    return known.sum(), known.numel()


class SamplerAgreement:
    """The trainer's log-probabilities against the sampler's, token for token, over a step.

    Both are of the weights that sampled: what the ratio differs from 1 by is arithmetic.

    Args:
        device: of the log-probabilities.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._device, self._differences = device, list[Tensor]()

    def add(self, trainer_logp: Tensor, sampler_logp: Tensor) -> None:
        """The tokens of a pass [M]."""
        self._differences.append(trainer_logp - sampler_logp)

    def take(self) -> dict[str, Metric]:
        """Metrics of the passes since the last call, over all ranks; they call this together."""
        parts, self._differences = self._differences, []
        log_ratio = torch.cat(parts) if parts else torch.empty(0, device=self._device)
        ratio, distance = log_ratio.exp(), log_ratio.abs()
        metrics: dict[str, Metric] = {
            "sampling/sampling_logp_difference/mean": (distance.sum(), distance.numel()),
            "sampling/importance_sampling_ratio/mean": (ratio.sum(), ratio.numel()),
        }
        if not distributed.all_reduce_max(log_ratio.numel()):
            return metrics
        # Of what one rank has no tokens of, the others have the extremes.
        extremes = torch.full((3,), -torch.inf, device=log_ratio.device)
        if log_ratio.numel():
            extremes = torch.stack([distance.max(), ratio.max(), -ratio.min()])
        furthest, highest, lowest = distributed.all_reduce_max(extremes).unbind()
        return metrics | {
            "sampling/sampling_logp_difference/max": (furthest, 1),
            "sampling/importance_sampling_ratio/max": (highest, 1),
            "sampling/importance_sampling_ratio/min": (-lowest, 1),
        }

"""The GRPO family of losses on packed completions.

GRPO (Shao et al., 2024), BNPO, Dr. GRPO (Liu et al., 2025), DAPO (Yu et al., 2025), CISPO
(MiniMax, 2025) and the sequence-level ratio of GSPO (Zheng et al., 2025), as TRL defines them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .averages import Metric
from .config import GRPOConfig


@dataclass(frozen=True)
class Tokens:
    """What the loss knows of the M completion tokens of a pass.

    Attributes:
        logp: log-probability under the policy that is trained [M], with gradient.
        old: under the policy that sampled, or None on policy [M].
        reference: under the reference, or None without a KL term [M].
        sequence: completion of each token [M], int64.
        lengths: tokens of each completion [B].
        advantages: of each completion [B].
        weights: of each token of a completion in the step's sum [B], see `token_weights`.
        skipped: tokens that carry loss but are not among the M, since their advantage is 0.
    """

    logp: Tensor
    old: Tensor | None
    reference: Tensor | None
    sequence: Tensor
    lengths: Tensor
    advantages: Tensor
    weights: Tensor
    skipped: int = 0


def grpo_loss(tokens: Tokens, config: GRPOConfig) -> tuple[Tensor, dict[str, Metric]]:
    """Sum of the loss over a pass, to be divided by the step's normaliser.

    Per token, with ratio r = exp(logp - old) (for sequence level: of the completion's mean) and
    advantage A: -min(min(r, delta) A, clip(r, 1 - epsilon, 1 + epsilon_high) A), for cispo
    -min(r, epsilon_high) A logp with no gradient through r; plus beta * k3 * r.

    Returns:
        Scalar, and metrics as (sum, weight). `normaliser` says what to divide by.
    """
    old = tokens.logp.detach() if tokens.old is None else tokens.old
    log_ratio = tokens.logp - old
    if config.importance_sampling_level == "sequence":
        log_ratio = _sequence_mean(log_ratio, tokens)
    ratio = log_ratio.exp()
    advantage = tokens.advantages[tokens.sequence]
    low = config.epsilon
    high = low if config.epsilon_high is None else config.epsilon_high
    if config.loss_type == "cispo":
        loss = -ratio.clamp(max=high).detach() * advantage * tokens.logp
    else:
        bounded = ratio if config.delta is None else ratio.clamp(max=config.delta)
        loss = -torch.min(bounded * advantage, ratio.clamp(1 - low, 1 + high) * advantage)
    count = max(1, ratio.numel() + tokens.skipped)
    metrics = _clip_metrics(ratio.detach(), advantage, low, high, config.loss_type, count)
    if tokens.reference is not None:
        gap = tokens.reference - tokens.logp
        k3 = gap.exp() - gap - 1  # Schulman (2020): unbiased, never negative
        loss = loss + config.beta * k3 * ratio
        metrics["kl"] = (k3.detach().sum(), k3.numel())
    return (loss * tokens.weights[tokens.sequence]).sum(), metrics


def on_policy_credit(advantages: Tensor, weights: Tensor, config: GRPOConfig) -> Tensor | None:
    """Gradient of the loss by a completion's log-probabilities, times -1, where every ratio is 1.

    On policy it is known before the log-probabilities are, which spares their second computation.

    Args:
        advantages, weights: as in `Tokens` [B].

    Returns:
        [B]; None where the gradient depends on the log-probabilities: with a KL term, and where
        `delta` cuts a ratio of 1 off.
    """
    if config.beta != 0 or (config.delta is not None and config.delta <= 1):
        return None
    high = config.epsilon if config.epsilon_high is None else config.epsilon_high
    bound = min(1.0, high) if config.loss_type == "cispo" else 1.0
    return bound * advantages * weights


def token_weights(config: GRPOConfig, lengths: Sequence[int]) -> list[float]:
    """Weight of a token of each completion in the sum that `normaliser` divides.

    Args:
        lengths: loss tokens of every completion of a step on this rank, 0 for masked ones.
            For bnpo, per_device_train_batch_size of them in a row are TRL's micro-batch, whose
            tokens share a weight of 1.
    """
    match config.loss_type:
        case "grpo":
            return [1.0 / max(1, length) for length in lengths]
        case "bnpo":
            size = config.per_device_train_batch_size
            totals = [sum(lengths[i : i + size]) for i in range(0, len(lengths), size)]
            return [1.0 / max(1, totals[i // size]) for i in range(len(lengths))]
        case _:
            return [1.0] * len(lengths)


def normaliser(config: GRPOConfig, completions: int, loss_tokens: float) -> float:
    """What a rank adds to a step's normaliser.

    Args:
        completions: of the step on this rank, those included that are masked or not computed.
        loss_tokens: completion tokens of a step that carry loss: as in TRL, the mean over the
            steps that the rollout feeds.
    """
    match config.loss_type:
        case "grpo":
            return completions
        case "bnpo":
            return -(-completions // config.per_device_train_batch_size)
        case "dr_grpo":
            return completions * config.max_completion_length
        case _:
            return loss_tokens


def _sequence_mean(values: Tensor, tokens: Tokens) -> Tensor:
    """Mean over each completion, given to each of its tokens [M]."""
    zeros, sequence = values.new_zeros(tokens.lengths.shape), tokens.sequence
    if values.is_cuda:  # index_add adds with atomics there: in any order
        sums = zeros.index_put((sequence,), values, accumulate=True)
    else:
        sums = zeros.index_add(0, sequence, values)
    return (sums / tokens.lengths.clamp(min=1))[sequence]


def _clip_metrics(
    ratio: Tensor, advantage: Tensor, low: float, high: float, loss_type: str, count: int
) -> dict[str, Metric]:
    if loss_type == "cispo":
        clipped = (ratio > high) & (advantage > 0)
        return {"cispo_clip_ratio": (clipped.sum(), count)}
    below = (ratio < 1 - low) & (advantage < 0)
    above = (ratio > 1 + high) & (advantage > 0)
    return {
        "clip_ratio/low_mean": (below.sum(), count),
        "clip_ratio/high_mean": (above.sum(), count),
        "clip_ratio/region_mean": ((below | above).sum(), count),
    }


def group_advantages(
    rewards: Tensor, group_size: int, scale: str, batch_std: float
) -> tuple[Tensor, Tensor]:
    """Advantages of completions against their group.

    Args:
        rewards: [B], groups contiguous; NaN where no reward function scored a completion.
        group_size: completions of each prompt (G).
        scale: "group", "batch" or "none": what divides the difference from the group's mean.
        batch_std: standard deviation of all rewards of the step, for "batch".

    Returns:
        Advantages [B], fp32, 0 for completions without a reward; standard deviation of each group
        [B / G] (n - 1 in the denominator).
    """
    # In fp64 the mean of equal fp32 rewards is that reward: their advantage is 0, not the rounding
    # of a mean over 1e-4.
    grouped = rewards.double().view(-1, group_size)
    known = ~grouped.isnan()
    count = known.sum(1, keepdim=True)
    mean = grouped.nansum(1, keepdim=True) / count.clamp(min=1)
    difference = torch.where(known, grouped - mean, 0.0)
    std = (difference.square().sum(1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
    match scale:
        case "group":
            difference = difference / (std + 1e-4)
        case "batch":
            difference = difference / (batch_std + 1e-4)
    return difference.reshape(-1).float(), std.squeeze(1).float()

"""GRPO's source of batches: it rolls out completions, scores them and hands them out."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..data.packing import TokenBatch
from ..generation import Completion
from ..model.transformer import Transformer
from . import distributed
from .averages import Metric
from .config import GRPOConfig
from .groups import Group, GroupSource
from .grpo_loss import group_advantages
from .grpo_metrics import length_metrics, reward_metrics
from .grpo_passes import PassPlan, Sample
from .loop import Pass
from .timings import Timings


class RolloutSource:
    """Rolls out every `period` optimizer steps and serves the passes between.

    Args:
        model: the policy; it samples and trains with the same weights.
        groups: where scored completions come from.
        plan: how a step is cut into passes.
        config: batch sizes, advantages.
        reward_names: of the reward functions.
        policy_logp: log-probabilities of a batch's targets under the current policy, no
            gradient; used for what is trained on later than it was sampled.
        on_rollout: called with the groups of every rollout.
        on_step: metrics that the passes of a step left behind, asked for once after each step.
        timings: of the parts of a step.
    """

    def __init__(
        self,
        model: Transformer,
        groups: GroupSource,
        plan: PassPlan,
        config: GRPOConfig,
        *,
        reward_names: Sequence[str],
        policy_logp: Callable[[TokenBatch], Tensor],
        on_rollout: Callable[[Sequence[Group]], None],
        on_step: Callable[[], dict[str, Metric]],
        timings: Timings,
    ) -> None:
        self._model, self._groups, self._plan, self._config = model, groups, plan, config
        self._names, self._policy_logp, self._timings = reward_names, policy_logp, timings
        self._on_rollout, self._on_step = on_rollout, on_step
        self._steps_per_pass_over = config.passes_per_rollout // config.gradient_accumulation_steps
        self.period = self._steps_per_pass_over * config.num_iterations
        self.steps_per_epoch = groups.rollouts_per_epoch * self.period
        self._samples: list[Sample] = []
        self._metrics: dict[str, Metric] = {}
        self._training_since = time.perf_counter()

    def passes(self, step: int) -> list[Pass]:
        rollout, position = divmod(step, self.period)
        if position == 0:
            self._samples = self._roll_out(rollout)
        self._training_since = time.perf_counter()
        samples = self._parts()[position % self._steps_per_pass_over]
        # As in TRL: the tokens of the rollout, in equal parts for the steps that it feeds.
        loss_tokens = sum(s.loss_tokens for s in self._samples) / self._steps_per_pass_over
        return self._plan.step(samples, loss_tokens)

    def metrics(self) -> dict[str, Metric]:
        self._timings.add("train", time.perf_counter() - self._training_since)
        metrics, self._metrics = self._metrics, {}
        return metrics | self._on_step() | self._timings.take()

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The rollout in progress, so that a run that stops in its middle goes on with it."""
        return {}, {"samples": [vars(s) for s in self._samples] if self.period > 1 else []}

    def restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        self._samples = [Sample(**s) for s in state["samples"]]

    def close(self) -> None:
        """Nothing runs beside the step: a rollout needs the weights that the step leaves."""

    def _roll_out(self, rollout: int) -> list[Sample]:
        with self._timings.measuring("train"):
            _finish_training(self._model)
        # The policy that samples has no dropout, nor does what is remembered of it.
        self._model.eval()
        groups, self._metrics = self._groups.groups(rollout)
        rewards = torch.cat([group.total for group in groups])
        advantages, group_std = group_advantages(
            rewards,
            self._config.num_generations,
            self._config.scale_rewards,
            distributed_std(rewards),
        )
        completions = [(group, c) for group in groups for c in group.completions]
        samples = [
            Sample(group.prompt.input_ids, c.token_ids, c.logprobs, advantage, self._is_masked(c))
            for (group, c), advantage in zip(completions, advantages.tolist(), strict=True)
        ]
        each = torch.cat([group.each for group in groups])
        self._metrics |= reward_metrics(rewards, each, self._names, group_std)
        self._metrics |= length_metrics([c for _, c in completions])
        self._metrics["frac_groups_skipped"] = self._skipped(samples)
        self._on_rollout(groups)
        if self.period > 1:
            with self._timings.measuring("train"):
                self._samples = samples
                self._remember_policy()
        return samples

    def _is_masked(self, completion: Completion) -> bool:
        return self._config.mask_truncated_completions and completion.finish_reason == "length"

    def _skipped(self, samples: Sequence[Sample]) -> Metric:
        """Groups of which no completion is computed in training."""
        size = self._config.num_generations
        groups = [samples[i : i + size] for i in range(0, len(samples), size)]
        return sum(not any(map(self._plan.computed, group)) for group in groups), len(groups)

    def _remember_policy(self) -> None:
        """Log-probabilities under the policy that sampled, before it is trained any further.

        The passes are those of training, so that the first ratios are exactly 1.
        """
        for part in self._parts():
            for indices in self._plan.divide(part):
                active = [part[i] for i in indices]
                if not active:
                    continue
                logp = self._policy_logp(self._plan.pack(active)).cpu()
                values = logp.split([len(s.completion_ids) for s in active])
                for sample, own in zip(active, values, strict=True):
                    sample.old_logp = own.tolist()

    def _parts(self) -> list[list[Sample]]:
        """The completions of each optimizer step of a pass over the rollout."""
        config = self._config
        size = config.per_device_train_batch_size * config.gradient_accumulation_steps
        return [self._samples[i * size : (i + 1) * size] for i in range(self._steps_per_pass_over)]


def _finish_training(model: Transformer) -> None:
    """Wait for the steps that a GPU still computes: their time is not that of sampling."""
    device = next(model.parameters()).device
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def distributed_std(values: Tensor) -> float:
    """Standard deviation (n - 1) of the values of all ranks; NaN values do not count."""
    known = values[~values.isnan()].double()
    count, total = distributed.all_reduce_sum(
        torch.tensor([known.numel(), known.sum()], dtype=torch.float64)
    ).tolist()
    if count < 2:
        return 0.0
    squares = distributed.all_reduce_sum((known - total / count).square().sum())
    return (float(squares) / (count - 1)) ** 0.5

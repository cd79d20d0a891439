"""GRPO's source of batches: it rolls out completions, scores them and hands them out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import generation
from ..data.encoding import EncodedPrompt
from ..data.packing import TokenBatch, pack_groups
from ..data.tokenizer import Tokenizer
from ..generation import Completion
from ..model.transformer import Transformer
from . import distributed
from .averages import Metric
from .config import GRPOConfig
from .grpo_loss import group_advantages, normaliser
from .loop import Pass
from .rewards import Rewards, Rollout
from .sampler import EpochSampler


@dataclass(frozen=True)
class GRPOBatch:
    """One pass: packed completions and what the loss needs of them."""

    tokens: TokenBatch
    advantages: Tensor
    """[B], fp32."""
    lengths: Tensor
    """Tokens of each completion [B]."""
    sampler_logp: Tensor
    """What the sampler computed for each target [M], fp32."""
    old_logp: Tensor | None
    """What the policy gave each target when it was sampled [M]; None on policy."""


@dataclass
class Sample:
    """A completion between rollout and loss."""

    prompt_ids: list[int]
    completion_ids: list[int]
    logprobs: list[float]
    advantage: float
    masked: bool = False
    old_logp: list[float] | None = None


class RolloutSource:
    """Rolls out every `period` optimizer steps and serves the passes between.

    Args:
        model: the policy; it samples and trains with the same weights.
        prompts: encoded prompts with their columns.
        rewards: scores completions.
        tokenizer: of the policy.
        config: group size, sampling, batch sizes.
        device: where batches go.
        policy_logp: log-probabilities of a batch's targets under the current policy, no
            gradient; used for what is trained on later than it was sampled.
        context: what reward functions receive beside the rollout (`trainer_state`, ...).
        on_rollout: called with every scored rollout and its rewards [B].
    """

    def __init__(
        self,
        model: Transformer,
        prompts: Sequence[EncodedPrompt],
        rewards: Rewards,
        tokenizer: Tokenizer,
        config: GRPOConfig,
        device: torch.device,
        policy_logp: Any,
        context: dict[str, Any],
        on_rollout: Any,
    ) -> None:
        self._model, self._prompts, self._rewards = model, prompts, rewards
        self._tokenizer, self._config, self._device = tokenizer, config, device
        self._policy_logp, self._context, self._on_rollout = policy_logp, context, on_rollout
        per_rank = config.per_device_train_batch_size * config.passes_per_rollout
        self._prompts_per_rank = per_rank // config.num_generations
        per_rollout = self._prompts_per_rank * distributed.world_size()
        self._sampler = EpochSampler(
            len(prompts), per_rollout, config.seed, shuffle=config.shuffle_dataset, fill=True
        )
        self._steps_per_pass_over = config.passes_per_rollout // config.gradient_accumulation_steps
        self.period = self._steps_per_pass_over * config.num_iterations
        self.steps_per_epoch = self._sampler.steps_per_epoch * self.period
        self._samples: list[Sample] = []
        self._metrics: dict[str, Metric] = {}

    def passes(self, step: int) -> list[Pass]:
        rollout, position = divmod(step, self.period)
        if position == 0:
            self._samples = self._roll_out(rollout)
        config = self._config
        part = position % self._steps_per_pass_over
        per_step = config.per_device_train_batch_size * config.gradient_accumulation_steps
        samples = self._samples[part * per_step : (part + 1) * per_step]
        size = config.per_device_train_batch_size
        return [self._pass(samples[i : i + size]) for i in range(0, len(samples), size)]

    def metrics(self) -> dict[str, Metric]:
        metrics, self._metrics = self._metrics, {}
        return metrics

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The rollout in progress, so that a run that stops in its middle goes on with it."""
        return {}, {"samples": [vars(s) for s in self._samples] if self.period > 1 else []}

    def restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        self._samples = [Sample(**s) for s in state["samples"]]

    def close(self) -> None:
        """Nothing runs beside the step: a rollout needs the weights that the step leaves."""

    # -- rollouts ------------------------------------------------------------------------------

    def _roll_out(self, rollout: int) -> list[Sample]:
        # The policy that samples has no dropout, nor does what is remembered of it.
        self._model.eval()
        config, group = self._config, self._config.num_generations
        rank, world = distributed.rank(), distributed.world_size()
        chosen = [self._prompts[i] for i in self._sampler.indices(rollout, rank, world)]
        completions = generation.generate(
            self._model,
            [p.input_ids for p in chosen],
            config.max_completion_length,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            min_p=config.min_p or 0.0,
            repetition_penalty=config.repetition_penalty,
            num_return_sequences=group,
            seed=config.seed,
            # Numbers that no other prompt of the run has, whatever the number of ranks.
            request_ids=[
                (rollout * self._prompts_per_rank + i) * world + rank for i in range(len(chosen))
            ],
        )
        repeated = [p for p in chosen for _ in range(group)]
        scored = as_rollout(repeated, completions, self._tokenizer)
        rewards, each = self._rewards(scored, **self._context)
        advantages, group_std = group_advantages(
            rewards, group, config.scale_rewards, distributed_std(rewards)
        )
        self._measure(completions, rewards, each, group_std)
        self._on_rollout(scored, rewards)
        samples = [
            Sample(p.input_ids, c.token_ids, c.logprobs, a, self._is_masked(c))
            for p, c, a in zip(repeated, completions, advantages.tolist(), strict=True)
        ]
        if self.period > 1:
            self._remember_policy(samples)
        return samples

    def _is_masked(self, completion: Completion) -> bool:
        return self._config.mask_truncated_completions and completion.finish_reason == "length"

    def _remember_policy(self, samples: list[Sample]) -> None:
        """Log-probabilities under the policy that sampled, before it is trained any further."""
        size = self._config.per_device_train_batch_size
        for first in range(0, len(samples), size):
            active = [s for s in samples[first : first + size] if not s.masked]
            if not active:
                continue
            logp = self._policy_logp(self._pack(active)).cpu()
            parts = logp.split([len(s.completion_ids) for s in active])
            for sample, values in zip(active, parts, strict=True):
                sample.old_logp = values.tolist()

    # -- passes --------------------------------------------------------------------------------

    def _pass(self, samples: list[Sample]) -> Pass:
        # A masked completion carries no loss, so it is not computed; it still counts as one.
        active = [s for s in samples if not s.masked]
        tokens = self._pack(active)
        old = None
        if self.period > 1:
            old = torch.tensor([v for s in active for v in s.old_logp or ()], device=self._device)
        batch = GRPOBatch(
            tokens=tokens,
            advantages=torch.tensor([s.advantage for s in active], device=self._device),
            lengths=torch.tensor([len(s.completion_ids) for s in active], device=self._device),
            sampler_logp=torch.tensor([v for s in active for v in s.logprobs], device=self._device),
            old_logp=old,
        )
        weight = normaliser(self._config, len(samples), tokens.targets.numel())
        count = sum(len(s.prompt_ids) + len(s.completion_ids) for s in samples)
        return Pass(batch, weight, count)

    def _pack(self, samples: list[Sample]) -> TokenBatch:
        prompts: list[list[int]] = []
        group = []
        for sample in samples:
            if not prompts or prompts[-1] != sample.prompt_ids:
                prompts.append(sample.prompt_ids)
            group.append(len(prompts) - 1)
        completions = [s.completion_ids for s in samples]
        longest = None
        if not self._config.packing:
            longest = max((len(s.prompt_ids) + len(s.completion_ids) for s in samples), default=0)
        return pack_groups(
            prompts,
            completions,
            group,
            share_prefix=self._config.share_prefix,
            pad_to=longest,
            pad_token_id=self._tokenizer.pad_token_id or 0,
        ).to(self._device)

    # -- metrics -------------------------------------------------------------------------------

    def _measure(
        self, completions: list[Completion], rewards: Tensor, each: Tensor, group_std: Tensor
    ) -> None:
        lengths = torch.tensor([len(c.token_ids) for c in completions], dtype=torch.float32)
        ended = torch.tensor([c.finish_reason == "stop" for c in completions])
        self._metrics = {
            "reward": _sum(rewards),
            "reward_std": (group_std.sum(), group_std.numel()),
            "frac_reward_zero_std": ((group_std < 1e-8).sum(), group_std.numel()),
            "completions/mean_length": _sum(lengths),
            "completions/min_length": (lengths.min(), 1),
            "completions/max_length": (lengths.max(), 1),
            "completions/clipped_ratio": ((~ended).sum(), len(completions)),
        }
        if ended.any():
            terminated = lengths[ended]
            self._metrics |= {
                "completions/mean_terminated_length": _sum(terminated),
                "completions/min_terminated_length": (terminated.min(), 1),
                "completions/max_terminated_length": (terminated.max(), 1),
            }
        for name, column in zip(self._rewards.names, each.unbind(1), strict=True):
            known = column[~column.isnan()]
            if known.numel():
                self._metrics[f"rewards/{name}/mean"] = _sum(known)
                self._metrics[f"rewards/{name}/std"] = (known.std(correction=0), 1)


def as_rollout(
    prompts: Sequence[EncodedPrompt], completions: Sequence[Completion], tokenizer: Tokenizer
) -> Rollout:
    """Completions as reward functions see them; one prompt for each completion."""
    texts = tokenizer.decode_batch([c.token_ids for c in completions])
    written = [
        [{"role": "assistant", "content": text}] if isinstance(p.prompt, list) else text
        for p, text in zip(prompts, texts, strict=True)
    ]
    names = {name for p in prompts for name in p.columns}
    return Rollout(
        prompts=[p.prompt for p in prompts],
        completions=written,
        prompt_ids=[p.input_ids for p in prompts],
        completion_ids=[c.token_ids for c in completions],
        columns={name: [p.columns.get(name) for p in prompts] for name in sorted(names)},
    )


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


def _sum(values: Tensor) -> Metric:
    known = values[~values.isnan()]
    return known.sum(), known.numel()

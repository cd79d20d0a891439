"""Groups of scored completions: sampled, scored and, on request, replaced where they teach nothing.

Dynamic sampling (Yu et al., 2025, DAPO): a group whose rewards are all equal has no advantage to
learn from, so new prompts are sampled in its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from .. import generation
from ..data.encoding import EncodedPrompt
from ..data.tokenizer import Tokenizer
from ..generation import Completion, SamplingParams
from ..model.transformer import Transformer
from . import distributed
from .averages import Metric
from .config import GRPOConfig
from .grpo_loss import group_advantages
from .grpo_metrics import ZERO_STD, mean
from .sampler import EpochSampler
from .scoring import EarlyScores, Scorer, Scores
from .timings import Timings

ENGINE_OPTIONS = ("max_batch_size", "cache_bytes", "prefill_tokens", "weights", "step")
"""Keywords of `generate` that an engine is made with."""

_ROUND_SHIFT = 40
"""Request ids of a round lie above those of the rounds before it."""


@dataclass(frozen=True)
class Group:
    """A prompt and its G scored completions."""

    prompt: EncodedPrompt
    completions: list[Completion]
    each: Tensor
    """Rewards by each function [G, R]."""
    total: Tensor
    """Weighted rewards [G]; NaN where nothing scored."""
    extra: list[dict[str, Any]]
    """What reward functions logged of each completion."""

    @property
    def is_flat(self) -> bool:
        """Whether no completion is better than another."""
        return bool(group_advantages(self.total, len(self.completions), "none", 0.0)[1] < ZERO_STD)


class GroupSource:
    """The groups of a rollout on this rank.

    What a group says depends on the seed, its rollout, its place in it and its round alone, so a
    resumed run goes on as if it had not stopped.

    Args:
        model: the policy.
        prompts: encoded prompts with their columns.
        sampler: which prompts a rollout has.
        scorer: the reward functions.
        config: group size, sampling, rounds.
        timings: where sampling and scoring count their seconds.
    """

    def __init__(
        self,
        model: Transformer,
        prompts: Sequence[EncodedPrompt],
        sampler: EpochSampler,
        scorer: Scorer,
        config: GRPOConfig,
        timings: Timings,
    ) -> None:
        self._model, self._prompts, self._sampler = model, prompts, sampler
        self._scorer, self._config, self._timings = scorer, config, timings
        self._options = sampling_options(config, scorer.tokenizer)
        self._engine: generation.Engine | None = None

    @property
    def rollouts_per_epoch(self) -> int:
        return self._sampler.steps_per_epoch

    def groups(self, rollout: int) -> tuple[list[Group], dict[str, Metric]]:
        """The groups of a rollout, and metrics of dynamic sampling where it is on."""
        rank, world = distributed.rank(), distributed.world_size()
        chosen = self._sampler.indices(rollout, rank, world)
        groups = self._sample(rollout, chosen, range(len(chosen)), 0)
        most = self._config.dynamic_sampling_rounds
        if not most:
            return groups, {}
        sampled, rounds, replaced = list(groups), 0, 0
        others = self._sampler.others(rollout, rank, world)
        flat = [i for i, group in enumerate(groups) if group.is_flat]
        while flat and others and rounds < most:
            rounds += 1
            chosen, others = others[: len(flat)], others[len(flat) :]
            fresh = self._sample(rollout, chosen, flat[: len(chosen)], rounds)
            sampled += fresh
            for group in fresh:
                if not group.is_flat:
                    groups[flat.pop(0)] = group
                    replaced += 1
        rewards = torch.cat([group.total for group in sampled])
        return groups, {
            "dynamic_sampling/rounds": (rounds, 1),
            "dynamic_sampling/sampled_groups": (len(sampled), 1),
            "dynamic_sampling/replaced_groups": (replaced, 1),
            "dynamic_sampling/sampled_reward": mean(rewards),
        }

    def _sample(
        self, rollout: int, chosen: Sequence[int], places: Sequence[int], number: int
    ) -> list[Group]:
        """Groups of the prompts `chosen` for these places of a rollout, in round `number`."""
        rank, world = distributed.rank(), distributed.world_size()
        per_rank = self._sampler.per_step // world
        # Numbers that no other prompt of the run has, whatever the number of ranks.
        request_ids = [
            ((rollout * per_rank + place) * world + rank) + (number << _ROUND_SHIFT)
            for place in places
        ]
        prompts = [self._prompts[i] for i in chosen]
        size = self._config.reward_batch_size
        if size is None:
            completions = self._generate(prompts, request_ids)
            with self._timings.measuring("reward"):
                repeated = [p for p in prompts for _ in range(self._config.num_generations)]
                scores = self._scorer.score(self._scorer.rollout(repeated, completions))
        else:
            with EarlyScores(self._scorer, prompts, size) as early:
                completions = self._generate(prompts, request_ids, on_finished=early.add)
                with self._timings.measuring("reward"):
                    scores = early.result(completions)
        return self._grouped(prompts, completions, scores)

    def _generate(
        self, prompts: Sequence[EncodedPrompt], request_ids: list[int], **more: Any
    ) -> list[Completion]:
        stats = generation.Stats()
        with self._timings.measuring("decode"):
            completions = generation.generate(
                self._model,
                [p.input_ids for p in prompts],
                self._config.max_completion_length,
                temperature=self._config.temperature,
                num_return_sequences=self._config.num_generations,
                seed=self._config.seed,
                request_ids=request_ids,
                stats=stats,
                **self._rollout_options(),
                **more,
            )
        self._timings.add("decode", -stats.prefill_seconds)
        self._timings.add("prefill", stats.prefill_seconds)
        return completions

    def _rollout_options(self) -> dict[str, Any]:
        """Keywords of `generate`; on a GPU the engine stays, for its graphs and its memory."""
        if not keeps_engine(self._model):
            return self._options
        own = {name: v for name, v in self._options.items() if name in ENGINE_OPTIONS}
        if self._engine is None:
            self._engine = generation.Engine(self._model, self._options.get("tokenizer"), **own)
        else:
            self._engine.update_weights()
        return {n: v for n, v in self._options.items() if n not in own} | {"engine": self._engine}

    def _grouped(
        self, prompts: Sequence[EncodedPrompt], completions: list[Completion], scores: Scores
    ) -> list[Group]:
        size, groups = self._config.num_generations, []
        total = self._scorer.rewards.total(scores.each)
        for i, prompt in enumerate(prompts):
            own = slice(i * size, (i + 1) * size)
            group = Group(prompt, completions[own], scores.each[own], total[own], scores.extra[own])
            groups.append(group)
        return groups


def keeps_engine(model: Transformer) -> bool:
    """Whether rollouts share one engine: on a GPU, where it has graphs to lose."""
    return next(model.parameters()).device.type == "cuda"


def sampling_options(config: GRPOConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """Keywords of `generate` beside the prompts, their number, the length and the temperature.

    Raises:
        ValueError: a setting that nothing can be sampled with.
    """
    options: dict[str, Any] = {
        "top_k": config.top_k,
        "top_p": config.top_p,
        "min_p": config.min_p or 0.0,
        "repetition_penalty": config.repetition_penalty,
        **(config.generation_kwargs or {}),
    }
    stops = options.get("stop_strings") or ()
    if stops:
        options["stop_strings"] = (stops,) if isinstance(stops, str) else tuple(stops)
        options["tokenizer"] = tokenizer
    known = {field.name for field in fields(SamplingParams)}
    SamplingParams(
        max_new_tokens=config.max_completion_length,
        temperature=config.temperature,
        **{name: value for name, value in options.items() if name in known},
    )
    return options

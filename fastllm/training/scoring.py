"""Scores for completions: in one call after sampling, or in batches while sampling goes on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..data.encoding import EncodedPrompt
from ..data.tokenizer import Tokenizer
from ..generation import Completion
from .averages import Metric
from .rewards import Rewards, Rollout


@dataclass(frozen=True)
class Scores:
    """What reward functions said of B completions."""

    each: Tensor
    """Rewards by each function [B, R], fp32; NaN where it does not apply."""
    extra: list[dict[str, Any]]
    """What they logged of each completion [B]."""


class RewardLog:
    """What reward functions log beside their rewards, through TRL's two callables."""

    def __init__(self) -> None:
        self._metrics: dict[str, Metric] = {}
        self._columns: dict[str, list[Any]] = {}

    def metric(self, name: str, value: float) -> None:
        """TRL's `log_metric`."""
        total, count = self._metrics.get(name, (0.0, 0))
        self._metrics[name] = (total + float(value), count + 1)

    def extra(self, column: str, values: Iterable[Any]) -> None:
        """TRL's `log_extra`."""
        self._columns.setdefault(column, []).extend(values)

    def take_metrics(self) -> dict[str, Metric]:
        """What was logged since the last call."""
        taken, self._metrics = self._metrics, {}
        return taken

    def take_extra(self, count: int) -> list[dict[str, Any]]:
        """The columns since the last call, as one row for each of `count` completions."""
        columns, self._columns = self._columns, {}
        return [
            {name: values[i] for name, values in columns.items() if i < len(values)}
            for i in range(count)
        ]


class Scorer:
    """The reward functions with all that they are told.

    Args:
        rewards: the functions.
        tokenizer: of the policy.
        log: what `context` logs to.
        context: what every function gets beside the data.
    """

    def __init__(
        self, rewards: Rewards, tokenizer: Tokenizer, log: RewardLog, context: dict[str, Any]
    ) -> None:
        self.rewards, self.tokenizer = rewards, tokenizer
        self._log, self._context = log, context

    def rollout(
        self,
        prompts: Sequence[EncodedPrompt],
        completions: Sequence[Completion],
        columns: Iterable[str] | None = None,
    ) -> Rollout:
        """See `as_rollout`."""
        return as_rollout(prompts, completions, self.tokenizer, columns)

    def score(self, rollout: Rollout, functions: Sequence[int] | None = None) -> Scores:
        """Scores by the functions of these indices, each in one call; None for all."""
        chosen = range(len(self.rewards.names)) if functions is None else functions
        each = self.rewards.each(rollout, chosen, **self._context)
        return Scores(each, self._log.take_extra(len(rollout.completions)))


class EarlyScores:
    """Scores groups in batches, in a thread, while later groups are still sampled.

    Batches are of whole groups in the order in which these end, scored one after another. Reward
    models wait for all completions: they would compete with the sampler for the same processors,
    and in one call their numbers are those of scoring afterwards.

    Args:
        scorer: the reward functions.
        prompts: those that are sampled from, one for each group.
        size: completions of a batch; it is full with the group that reaches this.
    """

    def __init__(self, scorer: Scorer, prompts: Sequence[EncodedPrompt], size: int) -> None:
        self._scorer, self._prompts, self._size = scorer, prompts, size
        self._columns = column_names(prompts)
        models = scorer.rewards.models
        self._functions = [i for i in range(len(scorer.rewards.names)) if i not in models]
        self._waiting: list[tuple[int, Sequence[Completion]]] = []
        self._batches: list[tuple[list[int], Future[Scores]]] = []
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="fastllm-rewards")

    def __enter__(self) -> EarlyScores:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(cancel_futures=True)

    def add(self, index: int, completions: Sequence[Completion]) -> None:
        """The group of prompt `index` has ended.

        Raises:
            RuntimeError: a reward function failed on an earlier batch.
        """
        for _, batch in self._batches:
            if batch.done():
                batch.result()
        self._waiting.append((index, completions))
        if sum(len(group) for _, group in self._waiting) >= self._size:
            self._submit()

    def result(self, completions: Sequence[Completion]) -> Scores:
        """The scores of all completions, once all groups were added.

        Raises:
            RuntimeError: a reward function failed.
        """
        self._submit()
        group = len(completions) // len(self._prompts)
        each = torch.full((len(completions), len(self._scorer.rewards.names)), torch.nan)
        extra: list[dict[str, Any]] = [{} for _ in completions]
        for groups, batch in self._batches:
            scores = batch.result()
            rows = [index * group + i for index in groups for i in range(group)]
            each[torch.tensor(rows)[:, None], torch.tensor(self._functions)] = scores.each
            for row, logged in zip(rows, scores.extra, strict=True):
                extra[row] = logged
        models = self._scorer.rewards.models
        if models:
            prompts = [p for p in self._prompts for _ in range(group)]
            rollout = self._scorer.rollout(prompts, completions)
            each[:, models] = self._scorer.score(rollout, models).each
        return Scores(each, extra)

    def _submit(self) -> None:
        waiting, self._waiting = self._waiting, []
        if not waiting or not self._functions:
            return
        prompts = [self._prompts[index] for index, group in waiting for _ in group]
        completions = [completion for _, group in waiting for completion in group]
        groups = [index for index, _ in waiting]
        self._batches.append((groups, self._thread.submit(self._score, prompts, completions)))

    def _score(self, prompts: Sequence[EncodedPrompt], completions: Sequence[Completion]) -> Scores:
        rollout = self._scorer.rollout(prompts, completions, self._columns)
        parts = [self._named(index, rollout) for index in self._functions]
        rows = zip(*(scores.extra for scores in parts), strict=True)
        extra = [{name: v for row in logged for name, v in row.items()} for logged in rows]
        return Scores(torch.cat([scores.each for scores in parts], dim=1), extra)

    def _named(self, index: int, rollout: Rollout) -> Scores:
        try:
            return self._scorer.score(rollout, [index])
        except Exception as error:  # a user's function, in a thread: say which one it was
            raise RuntimeError(
                f"reward function {self._scorer.rewards.names[index]} failed on a batch of "
                f"{len(rollout.completions)} completions: {type(error).__name__}: {error}"
            ) from error


def as_rollout(
    prompts: Sequence[EncodedPrompt],
    completions: Sequence[Completion],
    tokenizer: Tokenizer,
    columns: Iterable[str] | None = None,
) -> Rollout:
    """Completions as reward functions see them.

    Args:
        prompts: one for each completion.
        completions: as sampled.
        tokenizer: of the policy.
        columns: names of the other columns; None for all that these prompts have.
    """
    texts = tokenizer.decode_batch([c.token_ids for c in completions])
    written = [
        [{"role": "assistant", "content": text}] if isinstance(p.prompt, list) else text
        for p, text in zip(prompts, texts, strict=True)
    ]
    names = column_names(prompts) if columns is None else columns
    return Rollout(
        prompts=[p.prompt for p in prompts],
        completions=written,
        prompt_ids=[p.input_ids for p in prompts],
        completion_ids=[c.token_ids for c in completions],
        columns={name: [p.columns.get(name) for p in prompts] for name in names},
    )


def column_names(prompts: Sequence[EncodedPrompt]) -> list[str]:
    """Names of the columns that any of the prompts has."""
    return sorted({name for p in prompts for name in p.columns})

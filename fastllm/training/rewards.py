"""Reward functions: Python callables in TRL's signature and reward models, mixed."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data.errors import DataError
from ..data.packing import pack_completions
from ..data.tokenizer import Tokenizer
from ..model import weights
from ..model.reward import RewardModel
from ..ops.working import keep_copies
from .start import tokenizer_of


@dataclass(frozen=True)
class Rollout:
    """Completions to score, groups contiguous; every list has one entry for each completion."""

    prompts: list[Any]
    """As the user wrote them: strings or messages."""
    completions: list[Any]
    """Strings, or `[{"role": "assistant", "content": ...}]`."""
    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    columns: dict[str, list[Any]]
    """The records' other columns."""


class Rewards:
    """All reward functions of a trainer and their weights.

    Args:
        functions: callables, reward models (ours or of transformers), or their paths.
        weights_given: one weight each; None for 1 each.
        tokenizer: of the policy; a reward model must share its vocabulary.
        device: where reward models run.
        dtype: in which they compute.

    Raises:
        DataError: a reward model with another vocabulary.
        ValueError: no functions, or a wrong number of weights.
    """

    def __init__(
        self,
        functions: Sequence[Any],
        weights_given: Sequence[float] | None,
        tokenizer: Tokenizer,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        if not functions:
            raise ValueError("reward_funcs: expected at least one reward function or reward model")
        self._functions = [
            f
            if callable(f) and not isinstance(f, nn.Module)
            else ModelReward(f, tokenizer, device, dtype)
            for f in functions
        ]
        self.names = [reward_name(f) for f in self._functions]
        if weights_given is not None and len(weights_given) != len(self._functions):
            raise ValueError(
                f"reward_weights: expected {len(self._functions)} values, one for each reward "
                f"function ({', '.join(self.names)}); found {len(weights_given)}"
            )
        self.weights = torch.tensor(weights_given or [1.0] * len(self._functions))

    def __call__(self, rollout: Rollout, **context: Any) -> tuple[Tensor, Tensor]:
        """Weighted rewards [B] (NaN where nothing scored) and each function's [B, R], fp32."""
        each = self.each(rollout, range(len(self._functions)), **context)
        return self.total(each), each

    @property
    def models(self) -> list[int]:
        """Which of the functions are reward models."""
        return [i for i, f in enumerate(self._functions) if isinstance(f, ModelReward)]

    @property
    def modules(self) -> list[nn.Module]:
        """The reward models themselves."""
        return [f.model for f in self._functions if isinstance(f, ModelReward)]

    def each(self, rollout: Rollout, indices: Sequence[int], **context: Any) -> Tensor:
        """Rewards by the functions of these indices [B, len(indices)], fp32."""
        columns = [self._score(i, rollout, context) for i in indices]
        return torch.stack(columns, dim=1)

    def total(self, each: Tensor) -> Tensor:
        """Weighted sum of all functions' rewards [B, R] -> [B]; NaN where nothing scored."""
        total = (each * self.weights).nansum(dim=1)
        total[each.isnan().all(dim=1)] = torch.nan
        return total

    def _score(self, index: int, rollout: Rollout, context: dict[str, Any]) -> Tensor:
        function, name = self._functions[index], self.names[index]
        if isinstance(function, ModelReward):
            return function(rollout)
        values = function(
            prompts=rollout.prompts,
            completions=rollout.completions,
            completion_ids=rollout.completion_ids,
            **rollout.columns,
            **context,
        )
        if inspect.isawaitable(values):
            # In a thread of its own: a notebook's thread has a running event loop already.
            with ThreadPoolExecutor(max_workers=1) as pool:
                values = pool.submit(asyncio.run, _awaited(values)).result()
        return _checked(values, len(rollout.completions), name)


class ModelReward:
    """A reward model as a reward function: it scores token ids as it was trained on them."""

    def __init__(
        self,
        model: str | Path | RewardModel | nn.Module,
        tokenizer: Tokenizer,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.__name__ = "reward_model"
        if isinstance(model, str | Path):
            self.__name__ = _run_name(Path(model))
            _check_vocabulary(tokenizer_of(model), tokenizer, model)
            model = weights.load_model(model, RewardModel)
        elif not isinstance(model, RewardModel):
            model = weights.from_transformers(model, RewardModel)
        if model.config.vocab_size < tokenizer.vocab_size:
            raise DataError(
                f"vocabulary mismatch: the policy's tokenizer has {tokenizer.vocab_size:,} tokens, "
                f"the reward model {model.config.vocab_size:,}"
            )
        self.model: RewardModel = model.to(device).eval().requires_grad_(False)
        self.model.model.compute_dtype = dtype
        if device.type == "cuda":
            keep_copies(self.model.parameters(), dtype)
        self._tokenizer, self._device = tokenizer, device

    def __call__(self, rollout: Rollout) -> Tensor:
        endings = {
            chat: self._tokenizer.ending_ids(chat)
            for chat in {isinstance(p, list) for p in rollout.prompts}
        }
        completions = [
            ended(ids, endings[isinstance(prompt, list)])
            for ids, prompt in zip(rollout.completion_ids, rollout.prompts, strict=True)
        ]
        return score_completions(self.model, rollout.prompt_ids, completions, self._device)


def ended(ids: Sequence[int], ending: Sequence[int]) -> list[int]:
    """A completion with what its tokenizer puts after an answer, as far as it is missing.

    A reward model was trained on complete sequences (with EOS, or the template's end of turn);
    sampling stops at the first token of that ending, or before it.
    """
    for present in range(min(len(ending), len(ids)), 0, -1):
        if list(ids[-present:]) == list(ending[:present]):
            return [*ids, *ending[present:]]
    return [*ids, *ending]


@torch.no_grad()
def score_completions(
    model: RewardModel,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    device: torch.device,
    tokens_per_pass: int = 16384,
) -> Tensor:
    """Scores of completions; neighbours with the same prompt share its computation.

    Args:
        model: the reward model, on `device`.
        prompts, completions: token ids, one entry for each completion; a prompt may be empty.
        tokens_per_pass: tokens computed at a time.

    Returns:
        [B], fp32, on the CPU.
    """
    scores, first, tokens = [], 0, 0
    for last in range(1, len(prompts) + 1):
        tokens += len(prompts[last - 1]) + len(completions[last - 1])
        if tokens >= tokens_per_pass or last == len(prompts):
            chunk = slice(first, last)
            packed = pack_completions(prompts[chunk], completions[chunk], model.config.pad_token_id)
            batch, index = packed[0].to(device), packed[1]
            found = model.score_rows(batch.input_ids, batch.layout, batch.rows)
            scores.append(found.float().cpu()[index])
            first, tokens = last, 0
    return torch.cat(scores) if scores else torch.empty(0)


def reward_name(function: Callable[..., Any]) -> str:
    """What the metrics of a reward function are called: its `__name__`, as in TRL."""
    return getattr(function, "__name__", type(function).__name__)


async def _awaited(values: Any) -> Any:
    return await values


def _checked(values: Any, expected: int, name: str) -> Tensor:
    values = list(values)
    if len(values) != expected:
        raise ValueError(
            f"reward function {name}: expected {expected} rewards, one for each completion; "
            f"found {len(values)}"
        )
    numbers = [float("nan") if v is None else float(v) for v in values]
    for i, number in enumerate(numbers):
        if values[i] is not None and not -float("inf") < number < float("inf"):
            raise ValueError(
                f"reward function {name}: completion {i} got {number}; rewards must be finite "
                "numbers, or None where the function does not apply"
            )
    return torch.tensor(numbers, dtype=torch.float32)


def _check_vocabulary(own: Tokenizer, policy: Tokenizer, path: str | Path) -> None:
    if own.fingerprint != policy.fingerprint:
        raise DataError(
            f"vocabulary mismatch between policy and reward model: the policy has a "
            f"{policy.description}; {path} has a {own.description}. Train the reward model with "
            "the policy's tokenizer (model= or tokenizer= its folder)"
        )


def _run_name(path: Path) -> str:
    return path.parent.name if path.suffix == ".pt" else path.name

"""The best of several completions, by a reward model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from ..data.columns import Text
from ..data.encoding import EncodedPrompt, encode_prompts
from ..data.records import prompt_records
from ..data.tokenizer import Tokenizer
from ..generation import Completion, generate
from ..generation.prefill import evaluating
from ..model import Transformer
from ..model.reward import RewardModel
from .rewards import ModelReward, Rollout, ended, score_completions


@dataclass(frozen=True, slots=True)
class BestCompletion:
    """What a reward model likes best of the completions of one prompt."""

    completion: Completion
    score: float
    index: int
    """Which of the completions it is; of equal scores the first."""
    scores: list[float]
    """Of all completions."""


class Judge:
    """Scores completions of a policy: the token ids that were drawn, never text encoded again.

    Args:
        reward_model: one with the policy's vocabulary, or its path.
        tokenizer: of the policy. With it completions are scored as complete answers, which is
            what reward models are trained on: an end that is missing is put after them.
        device: where a model from a path runs.
        dtype: in which it computes.

    Raises:
        DataError: a reward model with another vocabulary.
        ValueError: a path without a tokenizer to compare with.
    """

    def __init__(
        self,
        reward_model: str | Path | RewardModel,
        tokenizer: Tokenizer | None,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._tokenizer = tokenizer
        self._score: Callable[[Rollout], Tensor]
        if isinstance(reward_model, RewardModel):
            self._model = reward_model
            self._score = self._by_the_model_given
        elif tokenizer is not None:
            self._score = ModelReward(reward_model, tokenizer, device, dtype)
        else:
            raise ValueError(
                "tokenizer: expected the policy's, to compare with that of the reward model "
                f"{reward_model}; found none"
            )

    def __call__(
        self, prompts: Sequence[EncodedPrompt], completions: Sequence[Completion]
    ) -> list[float]:
        """The score of each completion; neighbours with the same prompt share its computation.

        Args:
            prompts: one for each completion.

        Raises:
            RuntimeError: a score that is not finite.
        """
        scores = self._score(
            Rollout(
                prompts=[prompt.prompt for prompt in prompts],
                completions=[completion.text for completion in completions],
                prompt_ids=[prompt.input_ids for prompt in prompts],
                completion_ids=[completion.token_ids for completion in completions],
                columns={},
            )
        )
        if not scores.isfinite().all():
            bad = int((~scores.isfinite()).nonzero()[0])
            raise RuntimeError(
                f"the reward model's scores are not finite: completion {bad} of {len(scores)} "
                f"got {float(scores[bad])}"
            )
        return scores.tolist()

    def _by_the_model_given(self, rollout: Rollout) -> Tensor:
        """As `ModelReward` does, but the model stays as it is: it is somebody's."""
        completions = rollout.completion_ids
        if self._tokenizer is not None:
            completions = [
                ended(ids, self._tokenizer.ending_ids(isinstance(prompt, list)))
                for ids, prompt in zip(completions, rollout.prompts, strict=True)
            ]
        model = self._model
        with evaluating(model):
            device = model.score.weight.device
            return score_completions(model, rollout.prompt_ids, completions, device)


def best_of_n(
    model: Transformer,
    reward_model: str | Path | RewardModel,
    prompts: Sequence[Sequence[int]] | Sequence[Text],
    n: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    *,
    tokenizer: Tokenizer | None = None,
    **sampling: Any,
) -> list[BestCompletion]:
    """Sample n completions of each prompt, and keep what a reward model likes best.

    Args:
        model: the language model.
        reward_model: a reward model with its vocabulary, or the path of one.
        prompts: token ids; or, with a tokenizer, texts or conversations.
        n: completions of each prompt.
        max_new_tokens, temperature: see `generate`.
        tokenizer: of the language model. With it completions are scored as complete answers,
            which is what reward models are trained on: an end that is missing is put after them.
        **sampling: the other options of `generate`.

    Returns:
        The best completion of each prompt.

    Raises:
        ValueError: an option out of its range, or prompts that need a tokenizer.
        DataError: a prompt that cannot be encoded, or a reward model with another vocabulary.
    """
    weight = model.lm_head.weight
    judge = Judge(reward_model, tokenizer, weight.device, model.model.compute_dtype or weight.dtype)
    encoded = _encoded(prompts, tokenizer)
    completions = generate(
        model,
        [prompt.input_ids for prompt in encoded],
        max_new_tokens,
        temperature,
        num_return_sequences=n,
        tokenizer=tokenizer,
        **sampling,
    )
    scores = judge([prompt for prompt in encoded for _ in range(n)], completions)
    groups = range(0, len(completions), n)
    return [best(completions[i : i + n], scores[i : i + n]) for i in groups]


def best(completions: Sequence[Completion], scores: Sequence[float]) -> BestCompletion:
    """The completion with the largest score, the first of equals."""
    index = max(range(len(scores)), key=scores.__getitem__)
    return BestCompletion(completions[index], scores[index], index, list(scores))


def _encoded(
    prompts: Sequence[Sequence[int]] | Sequence[Text], tokenizer: Tokenizer | None
) -> list[EncodedPrompt]:
    if not prompts:
        return []
    first = prompts[0]
    if isinstance(first, str) or (len(first) and isinstance(first[0], dict)):
        if tokenizer is None:
            raise ValueError("tokenizer: expected one for prompts that are text, found none")
        records = [{"prompt": prompt} for prompt in prompts]
        return encode_prompts(prompt_records(records), tokenizer)[0]
    tokens = cast(Sequence[Sequence[int]], prompts)
    return [EncodedPrompt(list(ids), {}, "") for ids in tokens]

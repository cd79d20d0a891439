"""What is asked of the engine, what it answers, and what it counts."""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from torch import Tensor

from ..model import ModelConfig
from .cache import blocks_of
from .sampling import SamplingParams

if TYPE_CHECKING:
    from .stopping import TextReader

FinishReason = Literal["stop", "length"]
# Token ids, log-probabilities, and those under the distribution drawn from.
Lists = tuple[list[int], list[float], list[float]]


@dataclass(frozen=True, slots=True)
class Completion:
    """What the model wrote after a prompt."""

    token_ids: list[int]
    """The tokens, with the stop token where there is one."""
    logprobs: list[float]
    """Log-probability of each token under temperature alone: log_softmax(logits / temperature),
    at temperature 1 when greedy. This is what a trainer computes again."""
    sampling_logprobs: list[float]
    """Log-probability of each token under the distribution that it was drawn from, that is with
    the filters and the repetition penalty; 0 when greedy."""
    finish_reason: FinishReason
    """"stop" after a stop token or a stop string, "length" after `max_new_tokens`."""
    text: str | None = None
    """The tokens' text, up to a stop string; None without a tokenizer."""


@dataclass(frozen=True, slots=True)
class Output:
    """What is new of one completion."""

    request_id: int
    index: int
    """Which of the request's completions."""
    token_ids: list[int]
    logprobs: list[float]
    sampling_logprobs: list[float]
    text: str | None
    """The text that the new tokens add. A character that is not complete yet, or what may turn out
    to begin a stop string, comes with a later output; None without a tokenizer."""
    finish_reason: FinishReason | None
    """None while more is to come."""


@dataclass(slots=True)
class Stats:
    """What an engine did."""

    prefill_tokens: int = 0
    """Tokens computed in packed passes: prompts, and what preempted sequences compute again."""
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    """Tokens drawn one at a time; the first of each sequence comes from the prefill."""
    decode_seconds: float = 0.0
    steps: int = 0
    """Tokens that the batch drew one after another."""
    preemptions: int = 0
    """How often a sequence had to wait with its tokens until there was room again."""
    peak_cache_bytes: int = 0
    """The most that keys and values took at a time."""
    cache_bytes: int = 0
    """Size of the cache's pool."""


class Tokens(NamedTuple):
    """Tokens of one sequence with their log-probabilities, as arrays of one length."""

    token_ids: np.ndarray
    logprobs: np.ndarray
    sampling_logprobs: np.ndarray

    def since(self, first: int) -> Lists:
        """From the `first`-th on, as lists."""
        return (
            self.token_ids[first:].tolist(),
            self.logprobs[first:].tolist(),
            self.sampling_logprobs[first:].tolist(),
        )


@dataclass(eq=False, slots=True)
class Request:
    """A prompt that one or more sequences continue."""

    id: int
    prompt: np.ndarray
    """[L], int64."""
    params: SamplingParams
    stop_tokens: tuple[int, ...]
    blocks: np.ndarray | None = None
    """Where the prompt's keys and values are; None while they are not in the cache."""
    logits: Tensor | None = None
    """After the prompt [V], for the sequences that have not begun."""
    slot: int = -1
    """Place among the prompts of the running batch; -1 while no sequence runs."""
    running: int = 0
    """Sequences that run now."""
    not_begun: int = 0
    """Sequences that have no token yet."""
    unfinished: int = 0

    @property
    def prompt_blocks(self) -> int:
        return blocks_of(len(self.prompt))

    @property
    def tail_blocks(self) -> int:
        """Of its longest completion: the last token is not kept."""
        return blocks_of(self.params.max_new_tokens - 1)


@dataclass(eq=False, slots=True)
class Sequence:
    """One completion of a request, waiting or running."""

    request: Request
    index: int
    """Which of the request's completions."""
    key: int
    """Key of its stream of random numbers."""
    tokens: Tokens | None = None
    """What it has drawn; while it runs, the tokens are in the batch's transcript."""
    joined: int = -1
    """Number of its entry into the batch: the latest is preempted first."""
    reader: TextReader | None = None
    """Follows its text, where somebody looks at that."""
    reported: int = 0
    """Tokens that an output told of."""
    finish_reason: FinishReason | None = None

    @property
    def count(self) -> int:
        """Tokens drawn before it waited."""
        return 0 if self.tokens is None else len(self.tokens.token_ids)


def checked_prompt(
    prompt: Many[int], max_new_tokens: int, config: ModelConfig, name: str
) -> np.ndarray:
    """The tokens of a prompt that the model can complete [L], int64.

    Raises:
        ValueError: it is empty, too long, or has a token outside the vocabulary.
    """
    ids = np.asarray(prompt, np.int64)
    if ids.ndim != 1 or len(ids) == 0:
        raise ValueError(f"{name} is empty; it needs at least one token")
    if len(ids) + max_new_tokens > config.max_position_embeddings:
        raise ValueError(
            f"{name} has {len(ids)} tokens; with max_new_tokens {max_new_tokens} "
            f"that passes the model's max_position_embeddings {config.max_position_embeddings}"
        )
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= config.vocab_size:
        raise ValueError(
            f"{name} has token {low if low < 0 else high}; the model's vocabulary is "
            f"0..{config.vocab_size - 1}"
        )
    return ids


def checked_stops(params: SamplingParams, config: ModelConfig) -> tuple[int, ...]:
    """The tokens that end a completion; those of the config where `params` names none.

    Raises:
        ValueError: one that the vocabulary does not have.
    """
    if params.stop_token_ids is None:
        return tuple(config.eos_token_ids)
    for token in params.stop_token_ids:
        if not 0 <= token < config.vocab_size:
            raise ValueError(
                f"stop_token_ids: expected ids in 0..{config.vocab_size - 1}, found {token}"
            )
    return tuple(params.stop_token_ids)

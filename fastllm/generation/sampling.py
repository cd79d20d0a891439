"""Drawing tokens: the filters, the log-probabilities, and randomness without a state.

The uniform number behind a request's t-th token is a hash of (seed, request, t). A request
therefore gives the same text whatever else is in the batch, and a rollout is repeated from its
seed alone. Every row of a batch has parameters of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..ops import backend, cpp
from .upload import upload

# The constants of SplitMix64 (Steele, Lea and Flood, 2014), as signed 64-bit integers.
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)
# A uniform number fills the significand of an fp32 exactly.
_UNIFORM_BITS = 24


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How a prompt is completed; names, meaning and order are those of `transformers`."""

    max_new_tokens: int = 128
    """Longest completion, in tokens."""
    min_new_tokens: int = 0
    """Tokens before which no stop token may be drawn."""
    temperature: float = 1.0
    """Divides the logits; 0 takes the likeliest token (greedy)."""
    top_k: int = 0
    """Keep the k likeliest tokens, and those as likely as the last of them; 0 for all."""
    top_p: float = 1.0
    """Keep the fewest likeliest tokens that hold this share of the probability."""
    min_p: float = 0.0
    """Keep tokens at least this likely, relative to the likeliest."""
    repetition_penalty: float = 1.0
    """Divides positive logits of tokens seen in the prompt or the completion, and multiplies
    negative ones (Keskar et al., 2019)."""
    num_return_sequences: int = 1
    """Completions of the prompt."""
    stop_token_ids: Sequence[int] | None = None
    """Tokens that end a completion; None for those of the model."""
    stop_strings: Sequence[str] = ()
    """Texts that end a completion."""
    seed: int | None = None
    """Of the random numbers; None for one of its own."""

    def __post_init__(self) -> None:
        for name, least in (("max_new_tokens", 1), ("num_return_sequences", 1)):
            count = getattr(self, name)
            _require(name, count, count >= least, f"at least {least}")
        _require(
            "min_new_tokens",
            self.min_new_tokens,
            0 <= self.min_new_tokens <= self.max_new_tokens,
            f"0..{self.max_new_tokens} (max_new_tokens)",
        )
        temperature, penalty = self.temperature, self.repetition_penalty
        _require("temperature", temperature, 0 <= temperature < math.inf, "a finite number >= 0")
        _require("top_k", self.top_k, 0 <= self.top_k < 1 << 31, ">= 0 (0 keeps all tokens)")
        _require("top_p", self.top_p, 0 < self.top_p <= 1, "a number in (0, 1]")
        _require("min_p", self.min_p, 0 <= self.min_p <= 1, "a number in [0, 1]")
        _require("repetition_penalty", penalty, 0 < penalty < math.inf, "a finite number > 0")
        self._settle_stops()

    def _settle_stops(self) -> None:
        ids, texts = self.stop_token_ids, self.stop_strings
        texts = (texts,) if isinstance(texts, str) else tuple(texts)
        _require("stop_strings", texts, all(texts), "texts that are not empty")
        object.__setattr__(self, "stop_strings", texts)
        if ids is not None:
            ids = tuple(int(token) for token in ids)
            _require("stop_token_ids", ids, all(token >= 0 for token in ids), "token ids >= 0")
            object.__setattr__(self, "stop_token_ids", ids)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def penalised(self) -> bool:
        return self.repetition_penalty != 1


class Draw(NamedTuple):
    """One token for each sequence."""

    token_ids: Tensor
    """[B], int64."""
    logprobs: Tensor
    """Under temperature alone, which is what the trainer computes again [B], fp32."""
    sampling_logprobs: Tensor
    """Under the filtered distribution that the token was drawn from [B], fp32."""


@dataclass(frozen=True)
class SamplingRows:
    """How each row of a batch draws its next token; one element, or row, for each."""

    temperature: Tensor
    """[B], fp32; 0 is greedy."""
    top_p: Tensor
    """[B], fp32."""
    min_p: Tensor
    """[B], fp32."""
    repetition_penalty: Tensor
    """[B], fp32."""
    top_k: Tensor
    """[B], int32."""
    key: Tensor
    """Stream of random numbers [B], int64."""
    count: Tensor
    """Tokens drawn so far [B], int32."""
    min_count: Tensor
    """With fewer, no stop token is drawn [B], int32."""
    stop_tokens: Tensor
    """[B, S], int32, -1 where there is none."""
    seen: Tensor
    """Tokens that the repetition penalty is for [B, V], uint8; [B, 0] where no row has one."""

    @classmethod
    def of(
        cls, arrays: Any, rows: Any = slice(None), device: torch.device | str = "cpu"
    ) -> SamplingRows:
        """The rows of a running batch: arrays in host memory as attributes of these names.

        On the CPU they are not copied, and elsewhere all at once.
        """
        columns = [np.asarray(getattr(arrays, field.name)[rows]) for field in fields(cls)]
        return cls(*upload(columns, torch.device(device)))

    def __len__(self) -> int:
        return self.temperature.numel()


def sample(logits: Tensor, rows: SamplingRows, filtered: bool | None = None) -> Draw:
    """Draw one token for each row of logits.

    Args:
        logits: [B, V], fp32.
        rows: how, on the same device.
        filtered: whether any row has a filter (top-k, top-p or min-p), which takes a sorted
            vocabulary where neither C++ nor False serves; None looks, for which a GPU is waited.

    Returns:
        The tokens and their log-probabilities. Greedy: `logprobs` are at temperature 1, and
        `sampling_logprobs` are 0, since the choice was certain. Logits that are not finite give
        log-probabilities that are not finite.
    """
    raw = backend.kernels("sampling", logits)
    if raw is cpp.sampling:
        return Draw(*raw.draw(logits, rows))
    filtered = _any_filter(rows) if filtered is None else filtered
    if raw is None or filtered:
        return sample_reference(logits, rows, filtered)
    return Draw(
        *raw.draw(
            logits,
            rows.temperature,
            rows.repetition_penalty,
            rows.key,
            rows.count,
            rows.min_count,
            rows.stop_tokens,
            rows.seen,
        )
    )


def sample_reference(logits: Tensor, rows: SamplingRows, filtered: bool | None = None) -> Draw:
    """The definition of `sample`, in PyTorch."""
    greedy = rows.temperature == 0
    temperature = torch.where(greedy, 1, rows.temperature)[:, None]
    logp = torch.log_softmax(logits / temperature, dim=-1)
    scores = _without_stops(_penalise(logits, rows), rows) / temperature
    filtered = _any_filter(rows) if filtered is None else filtered
    left = _filter(scores, rows) if filtered else scores
    left = torch.log_softmax(left, dim=-1)
    drawn = _invert(left, uniforms(rows.key, rows.count))
    tokens = torch.where(greedy, scores.argmax(dim=-1), drawn)
    sampling_logp = torch.where(greedy, 0, _pick(left, tokens))
    return Draw(tokens, _pick(logp, tokens), sampling_logp)


def random_keys(seed: int, request_ids: Tensor, samples: Tensor) -> Tensor:
    """The key of each request's stream of random numbers.

    Args:
        seed: any integer; its low 64 bits count.
        request_ids: [N], int64.
        samples: which completion of its request each sequence is [N], int64.

    Returns:
        [N], int64.
    """
    low = seed & ((1 << 64) - 1)
    start = torch.tensor(low - (1 << 64) if low >> 63 else low, device=request_ids.device)
    return _mix(_mix(_mix(start) + request_ids * _GOLDEN) + samples * _GOLDEN)


def uniforms(keys: Tensor, counts: Tensor) -> Tensor:
    """The `counts`-th uniform number of each stream: [B] int64, [B] -> [B] fp32 in [0, 1)."""
    bits = _shift_right(_mix(keys + counts.long() * _GOLDEN), 64 - _UNIFORM_BITS)
    return bits.to(torch.float32) * 2.0**-_UNIFORM_BITS


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser: every bit of the input moves half the bits of the output."""
    x = x + _GOLDEN
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift: PyTorch's own copies the sign bit."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _invert(logp: Tensor, uniform: Tensor) -> Tensor:
    """The token at which the cumulative distribution passes `uniform`: [B, V], [B] -> [B]."""
    cumulative = logp.exp().cumsum(dim=-1)
    # At most 1 - 2^-24 of the total, which is less than the total after rounding too: the search
    # ends at a token whose probability is not 0.
    target = uniform * cumulative[:, -1]
    tokens = torch.searchsorted(cumulative, target[:, None], right=True).squeeze(1)
    # Only NaN passes every entry; whoever reads the log-probabilities will find it.
    return tokens.clamp_(max=logp.shape[1] - 1)


def _pick(logp: Tensor, tokens: Tensor) -> Tensor:
    return logp.gather(1, tokens[:, None]).squeeze(1)


def _penalise(logits: Tensor, rows: SamplingRows) -> Tensor:
    if rows.seen.shape[1] == 0:
        return logits
    penalty = rows.repetition_penalty[:, None]
    penalised = torch.where(logits < 0, logits * penalty, logits / penalty)
    return torch.where(rows.seen.bool(), penalised, logits)


def _without_stops(logits: Tensor, rows: SamplingRows) -> Tensor:
    """Logits with -inf at the stop tokens of the rows that are too short to end."""
    banned = (rows.count < rows.min_count)[:, None] & (rows.stop_tokens >= 0)
    # One column more takes what is not banned.
    places = torch.where(banned, rows.stop_tokens, logits.shape[1]).long()
    ban = logits.new_zeros(logits.shape[0], logits.shape[1] + 1, dtype=torch.bool)
    return logits.masked_fill(ban.scatter_(1, places, True)[:, :-1], -torch.inf)


def _any_filter(rows: SamplingRows) -> bool:
    return bool(((rows.top_k > 0) | (rows.top_p < 1) | (rows.min_p > 0)).any())


def _filter(scores: Tensor, rows: SamplingRows) -> Tensor:
    """Scores [B, V] with -inf at the tokens that top-k, then top-p, then min-p leave out."""
    vocabulary = scores.shape[1]
    # Stable, so that of equal scores the later one counts as the larger, as in `transformers`.
    ascending, order = scores.sort(dim=-1, stable=True)
    limited = (rows.top_k > 0) & (rows.top_k < vocabulary)
    kept = torch.where(limited, rows.top_k, vocabulary).long()[:, None]
    smallest = ascending.gather(1, vocabulary - kept)
    ascending = ascending.masked_fill(ascending < smallest, -torch.inf)

    lower = ascending.softmax(dim=-1).cumsum(dim=-1)
    out = (lower <= 1 - rows.top_p[:, None]) & (rows.top_p < 1)[:, None]
    out[:, -1] = False  # the likeliest token stays even where rounding would leave it out
    out |= ascending < ascending[:, -1:] + rows.min_p[:, None].log()
    ascending = ascending.masked_fill(out, -torch.inf)
    return torch.empty_like(scores).scatter_(1, order, ascending)


def _require(name: str, found: Any, valid: bool, expected: str) -> None:
    if not valid:
        raise ValueError(f"{name}: expected {expected}, found {found}")

"""Drawing tokens: the filters, the log-probabilities, and randomness without a state.

The uniform number behind a request's t-th token is a hash of (seed, request, t). A request
therefore gives the same text whatever else is in the batch, and a rollout is repeated from its
seed alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

# The constants of SplitMix64 (Steele, Lea and Flood, 2014), as signed 64-bit integers.
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)
# A uniform number fills the significand of an fp32 exactly.
_UNIFORM_BITS = 24


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How the next token is drawn; names, meaning and order are those of `transformers`."""

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

    def __post_init__(self) -> None:
        _require(
            "temperature",
            self.temperature,
            0 <= self.temperature < math.inf,
            "a finite number >= 0",
        )
        _require("top_k", self.top_k, self.top_k >= 0, ">= 0 (0 keeps all tokens)")
        _require("top_p", self.top_p, 0 < self.top_p <= 1, "a number in (0, 1]")
        _require("min_p", self.min_p, 0 <= self.min_p <= 1, "a number in [0, 1]")
        penalty = self.repetition_penalty
        _require("repetition_penalty", penalty, 0 < penalty < math.inf, "a finite number > 0")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def penalised(self) -> bool:
        return self.repetition_penalty != 1

    @property
    def filtered(self) -> bool:
        """Whether the distribution sampled from differs from softmax(logits / temperature)."""
        return self.penalised or self.top_k > 0 or self.top_p < 1 or self.min_p > 0


class Draw(NamedTuple):
    """One token for each sequence."""

    token_ids: Tensor
    """[B], int64."""
    logprobs: Tensor
    """Under temperature alone, which is what the trainer computes again [B], fp32."""
    sampling_logprobs: Tensor
    """Under the filtered distribution that the token was drawn from [B], fp32."""


def sample(
    logits: Tensor, params: SamplingParams, uniform: Tensor, seen: Tensor | None = None
) -> Draw:
    """Draw one token for each row of logits.

    Args:
        logits: [B, V], fp32.
        params: the distribution to draw from.
        uniform: one number in [0, 1) per row [B], fp32; not read when greedy.
        seen: tokens that the repetition penalty is for [B, V], bool; read only when it is not 1.

    Returns:
        The tokens and their log-probabilities. Greedy: `logprobs` are at temperature 1, and
        `sampling_logprobs` are 0, since the choice was certain.
    """
    natural = logits if params.greedy or params.temperature == 1 else logits / params.temperature
    logp = torch.log_softmax(natural, dim=-1)
    if params.penalised:
        assert seen is not None
        logits = _penalise(logits, seen, params.repetition_penalty)
    if params.greedy:
        tokens = logits.argmax(dim=-1)
        return Draw(tokens, _pick(logp, tokens), torch.zeros_like(uniform))
    if not params.filtered:
        tokens = _invert(logp, uniform)
        logprobs = _pick(logp, tokens)
        return Draw(tokens, logprobs, logprobs)
    filtered = torch.log_softmax(_filter(logits / params.temperature, params), dim=-1)
    tokens = _invert(filtered, uniform)
    return Draw(tokens, _pick(logp, tokens), _pick(filtered, tokens))


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


def _penalise(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def _filter(scores: Tensor, params: SamplingParams) -> Tensor:
    """Scores [B, V] with -inf at the tokens that top-k, then top-p, then min-p leave out."""
    if 0 < params.top_k < scores.shape[-1]:
        smallest = scores.topk(params.top_k).values[:, -1:]
        scores = scores.masked_fill(scores < smallest, -torch.inf)
    if params.top_p < 1:
        scores = _keep_share(scores, params.top_p)
    if params.min_p > 0:
        floor = scores.amax(dim=-1, keepdim=True) + math.log(params.min_p)
        scores = scores.masked_fill(scores < floor, -torch.inf)
    return scores


def _keep_share(scores: Tensor, share: float) -> Tensor:
    ascending, order = scores.sort(dim=-1)
    # The likeliest token stays even where rounding would leave it out.
    out = ascending.softmax(dim=-1).cumsum(dim=-1)[:, :-1] <= 1 - share
    removed = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order[:, :-1], out)
    return scores.masked_fill(removed, -torch.inf)


def _require(name: str, found: float, valid: bool, expected: str) -> None:
    if not valid:
        raise ValueError(f"{name}: expected {expected}, found {found}")

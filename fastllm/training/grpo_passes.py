"""GRPO's samples into the passes of an optimizer step: packed, and nothing without a gradient."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from ..data.packing import TokenBatch, moved, pack_groups
from .config import GRPOConfig
from .grpo_loss import normaliser, token_weights
from .passes import Pass
from .prefetch import Placement


@dataclass
class Sample:
    """A completion between rollout and loss."""

    prompt_ids: list[int]
    completion_ids: list[int]
    logprobs: list[float]
    advantage: float
    masked: bool = False
    old_logp: list[float] | None = None

    @property
    def loss_tokens(self) -> int:
        return 0 if self.masked else len(self.completion_ids)


@dataclass(frozen=True)
class GRPOBatch:
    """One pass: packed completions and what the loss needs of them."""

    tokens: TokenBatch
    advantages: Tensor
    """[B], fp32."""
    lengths: Tensor
    """Tokens of each completion [B]."""
    weights: Tensor
    """Of each token of a completion in the step's sum [B], fp32."""
    sampler_logp: Tensor
    """What the sampler computed for each target [M], fp32."""
    old_logp: Tensor | None
    """What the policy gave each target when it was sampled [M]; None on policy."""
    skipped: int = 0
    """Loss tokens of the step that no pass computes, counted in its first pass."""

    def to(self, device: torch.device | str) -> GRPOBatch:
        return moved(self, device)


class PassPlan:
    """Divides the completions of a step into passes.

    Completions that carry no gradient are in none of them: masked ones, and without a KL term
    those whose advantage is 0. They count in the normaliser, so loss and gradients are those of
    all completions.

    Args:
        config: how to divide and pack, and the loss whose normaliser counts.
        place: puts a batch where it is computed.
        pad_token_id: filling where `packing` is off.
    """

    def __init__(
        self, config: GRPOConfig, place: torch.device | Placement, pad_token_id: int
    ) -> None:
        self._config, self._pad = config, pad_token_id
        self._place = place if isinstance(place, Placement) else Placement(place)

    def computed(self, sample: Sample) -> bool:
        """Whether a completion carries a gradient."""
        return not sample.masked and (self._config.beta != 0 or sample.advantage != 0)

    def divide(self, samples: Sequence[Sample]) -> list[list[int]]:
        """Indices of the samples of each pass; one empty pass where nothing is computed.

        The empty pass gives every parameter a gradient of 0: momentum and weight decay act as
        they would after the computation that was spared.
        """
        if self._config.max_tokens_per_pass is None:
            size = self._config.per_device_train_batch_size
            batches = [range(i, min(i + size, len(samples))) for i in range(0, len(samples), size)]
            kept = [[i for i in batch if self.computed(samples[i])] for batch in batches]
        else:
            kept = self._by_tokens(samples, self._config.max_tokens_per_pass)
        return [indices for indices in kept if indices] or [[]]

    def step(self, samples: Sequence[Sample], loss_tokens: float) -> list[Pass]:
        """The passes of one optimizer step.

        Args:
            samples: its completions on this rank, groups contiguous.
            loss_tokens: see `normaliser`.
        """
        weights = token_weights(self._config, [s.loss_tokens for s in samples])
        skipped = sum(s.loss_tokens for s in samples if not self.computed(s))
        # What counts for the whole step counts in its first pass, also for what is in no pass.
        weight = normaliser(self._config, len(samples), loss_tokens)
        read = sum(len(s.prompt_ids) + len(s.completion_ids) for s in samples)
        passes = []
        for indices in self.divide(samples):
            chosen = [samples[i] for i in indices]
            batch = self._place(self._batch(chosen, [weights[i] for i in indices], skipped))
            passes.append(Pass(batch, weight, read))
            skipped, weight, read = 0, 0.0, 0
        return passes

    def pack(self, samples: Sequence[Sample]) -> TokenBatch:
        """Completions after their prompts; neighbours share theirs where `share_prefix` is on."""
        return self._place(self._packed(samples))

    def _packed(self, samples: Sequence[Sample]) -> TokenBatch:
        prompts: list[list[int]] = []
        group = []
        for sample in samples:
            if not prompts or prompts[-1] != sample.prompt_ids:
                prompts.append(sample.prompt_ids)
            group.append(len(prompts) - 1)
        longest = None
        if not self._config.packing:
            longest = max((len(s.prompt_ids) + len(s.completion_ids) for s in samples), default=0)
        return pack_groups(
            prompts,
            [s.completion_ids for s in samples],
            group,
            share_prefix=self._config.share_prefix,
            pad_to=longest,
            pad_token_id=self._pad,
        )

    def _batch(
        self, samples: Sequence[Sample], weights: Sequence[float], skipped: int
    ) -> GRPOBatch:
        remembered = any(s.old_logp is not None for s in samples)
        old = _floats([v for s in samples for v in s.old_logp or ()])
        return GRPOBatch(
            tokens=self._packed(samples),
            advantages=_floats([s.advantage for s in samples]),
            lengths=torch.tensor([len(s.completion_ids) for s in samples]),
            weights=_floats(weights),
            sampler_logp=_floats([v for s in samples for v in s.logprobs]),
            old_logp=old if remembered else None,
            skipped=skipped,
        )

    def _by_tokens(self, samples: Sequence[Sample], limit: int) -> list[list[int]]:
        passes: list[list[int]] = [[]]
        load = _Load()
        for unit in self._units(samples, limit):
            fuller = load.plus([samples[i] for i in unit], self._config)
            if fuller.tokens > limit and passes[-1]:
                passes.append([])
                fuller = _Load().plus([samples[i] for i in unit], self._config)
            passes[-1] += unit
            load = fuller
        return passes

    def _units(self, samples: Sequence[Sample], limit: int) -> Iterator[list[int]]:
        """What stays together: a group, or a single completion of a group too long for a pass."""
        kept = [i for i, sample in enumerate(samples) if self.computed(sample)]
        for _, indices in groupby(kept, lambda i: samples[i].prompt_ids):
            group = list(indices)
            if _Load().plus([samples[i] for i in group], self._config).tokens <= limit:
                yield group
            else:
                yield from ([i] for i in group)


@dataclass(frozen=True)
class _Load:
    """What a pass holds, as far as it has been filled."""

    rows: int = 0
    longest: int = 0
    tokens: int = 0
    last_prompt: list[int] | None = None

    def plus(self, samples: Sequence[Sample], config: GRPOConfig) -> _Load:
        rows, longest, tokens, last = self.rows, self.longest, self.tokens, self.last_prompt
        for sample in samples:
            prompt, own = len(sample.prompt_ids), len(sample.completion_ids)
            rows, longest = rows + 1, max(longest, prompt + own)
            shared = config.packing and config.share_prefix and sample.prompt_ids == last
            tokens = rows * longest if not config.packing else tokens + own + (not shared) * prompt
            last = sample.prompt_ids
        return _Load(rows, longest, tokens, last)


def _floats(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)

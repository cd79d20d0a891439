"""Token ids into packed batches: the one place where a batch's layout is decided."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..layout import NO_PREFIX, PackedLayout


@dataclass(frozen=True)
class TokenBatch:
    """Packed sequences with targets: what SFT and GRPO train on.

    Target m is token `targets[m]` of sequence `sequence[m]`; it is predicted by the hidden state
    of packed row `rows[source[m]]`. Several targets share a row where several sequences continue
    one prefix.
    """

    input_ids: Tensor
    """[T], int64."""
    layout: PackedLayout
    rows: Tensor
    """Packed rows whose hidden state is read [N], ascending and unique, int64."""
    source: Tensor
    """Index into `rows` for each target [M], int64."""
    targets: Tensor
    """Token ids [M], int64."""
    sequence: Tensor
    """Sequence of each target, in the order given [M], int64."""
    num_sequences: int

    def to(self, device: torch.device | str) -> TokenBatch:
        return _move(self, device)


@dataclass(frozen=True)
class PairBatch:
    """Packed preference pairs: what a reward model trains on."""

    input_ids: Tensor
    """[T], int64."""
    layout: PackedLayout
    rows: Tensor
    """Scored packed rows [N], ascending and unique, int64."""
    chosen: Tensor
    """Index into `rows` of the chosen side of each pair [P], int64."""
    rejected: Tensor
    """The same for the rejected side [P], int64."""
    margin: Tensor | None
    """[P], fp32."""

    @property
    def num_pairs(self) -> int:
        return self.chosen.numel()

    def to(self, device: torch.device | str) -> PairBatch:
        return _move(self, device)


@dataclass(frozen=True)
class ScoredBatch:
    """Packed sequences of which some rows are scored."""

    input_ids: Tensor
    """[T], int64."""
    layout: PackedLayout
    rows: Tensor
    """Scored packed rows [N], ascending and unique, int64."""

    def to(self, device: torch.device | str) -> ScoredBatch:
        return _move(self, device)


Batch = TypeVar("Batch", TokenBatch, PairBatch, ScoredBatch)


class _Row:
    """A packed row under construction."""

    def __init__(self) -> None:
        self.input_ids: list[int] = []
        self.lengths: list[int] = []
        self.prefix: list[int] = []

    def add(self, ids: Sequence[int], prefix: int = NO_PREFIX) -> tuple[int, int]:
        """Append a segment; its index and first packed row."""
        first = len(self.input_ids)
        self.input_ids.extend(ids)
        self.lengths.append(len(ids))
        self.prefix.append(prefix)
        return len(self.lengths) - 1, first

    def tensors(self) -> tuple[Tensor, PackedLayout]:
        return torch.tensor(self.input_ids, dtype=torch.int64), PackedLayout(
            self.lengths, self.prefix
        )


def pack_sequences(
    sequences: Sequence[Sequence[int]],
    loss_masks: Sequence[Sequence[bool]],
    pad_to: int | None = None,
    pad_token_id: int = 0,
) -> TokenBatch:
    """Sequences one after another, each a segment of its own.

    Args:
        sequences: token ids of each sequence.
        loss_masks: for each token, whether predicting it carries loss. A sequence's first token
            has no predecessor, so its flag is ignored.
        pad_to: pad every sequence to this length, as a trainer without packing does: the same
            numbers, more work.
        pad_token_id: what to pad with.
    """
    row, wanted = _Row(), []
    for index, (ids, mask) in enumerate(zip(sequences, loss_masks, strict=True)):
        _, first = row.add(_padded(ids, pad_to, pad_token_id))
        wanted += [(first + t - 1, ids[t], index) for t in range(1, len(ids)) if mask[t]]
    return _token_batch(row, wanted, len(sequences))


def pack_groups(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    group: Sequence[int],
    share_prefix: bool = True,
    pad_to: int | None = None,
    pad_token_id: int = 0,
) -> TokenBatch:
    """Completions after their prompts; loss on every completion token.

    Args:
        prompts: token ids of each prompt, at least one token each.
        completions: token ids of each completion.
        group: index of each completion's prompt.
        share_prefix: store a prompt once for all its completions.
        pad_to, pad_token_id: as in `pack_sequences`; padding excludes sharing.
    """
    if not share_prefix or pad_to is not None:
        whole = [[*prompts[g], *c] for g, c in zip(group, completions, strict=True)]
        masks = [
            [False] * len(prompts[g]) + [True] * len(c)
            for g, c in zip(group, completions, strict=True)
        ]
        return pack_sequences(whole, masks, pad_to, pad_token_id)
    row, wanted = _Row(), []
    placed: dict[int, tuple[int, int]] = {}
    for index, (g, ids) in enumerate(zip(group, completions, strict=True)):
        if g not in placed:
            placed[g] = row.add(prompts[g])
        segment, prompt_first = placed[g]
        _, first = row.add(ids, prefix=segment)
        # The prompt's last row predicts the first token of every completion.
        before = [prompt_first + len(prompts[g]) - 1, *range(first, first + len(ids) - 1)]
        wanted += [(r, token, index) for r, token in zip(before, ids, strict=True)]
    return _token_batch(row, wanted, len(completions))


def pack_pairs(
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    margins: Sequence[float | None] | None = None,
    share_prefix: bool = True,
    pad_to: int | None = None,
    pad_token_id: int | None = 0,
) -> PairBatch:
    """Preference pairs: the beginning that both sides share once, then the two continuations.

    A sequence is scored at its last token that is not padding, which always lies in its own
    continuation.
    """
    row = _Row()
    scored: list[tuple[int, int]] = []
    for chosen, rejected in pairs:
        ends = scored_end(chosen, pad_token_id), scored_end(rejected, pad_token_id)
        shared = 0
        if share_prefix and pad_to is None:
            shared = min(common_prefix(chosen, rejected), min(ends) - 1)
        prefix = row.add(chosen[:shared])[0] if shared else NO_PREFIX
        sides = []
        for ids, end in zip((chosen, rejected), ends, strict=True):
            ids = ids[shared:end] if pad_to is None else _padded(ids, pad_to, pad_token_id)
            sides.append(row.add(ids, prefix)[1] + end - shared - 1)
        scored.append((sides[0], sides[1]))
    input_ids, layout = row.tensors()
    both = torch.tensor(scored, dtype=torch.int64).view(-1, 2)
    rows, index = torch.unique(both, return_inverse=True)
    return PairBatch(input_ids, layout, rows, index[:, 0], index[:, 1], _margins(margins))


def pack_completions(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    pad_token_id: int | None,
) -> tuple[ScoredBatch, Tensor]:
    """Completions to score; neighbours with the same prompt share its segment.

    Returns:
        The batch, and for each completion its index into the batch's rows [B].
    """
    row, scored = _Row(), []
    shared, segment = None, NO_PREFIX
    for prompt, completion in zip(prompts, completions, strict=True):
        end = scored_end([*prompt, *completion], pad_token_id)
        if end <= len(prompt):
            # The scored token lies in the prompt: a whole sequence of its own is simplest.
            _, first = row.add([*prompt, *completion][:end])
            scored.append(first + end - 1)
            continue
        if prompt != shared:
            shared, segment = prompt, row.add(prompt)[0] if prompt else NO_PREFIX
        _, first = row.add(completion[: end - len(prompt)], segment)
        scored.append(first + end - len(prompt) - 1)
    input_ids, layout = row.tensors()
    rows, index = torch.unique(torch.tensor(scored, dtype=torch.int64), return_inverse=True)
    return ScoredBatch(input_ids, layout, rows), index


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences share at their beginning."""
    limit = min(len(a), len(b))
    if a[:limit] == b[:limit]:
        return limit
    return next(i for i in range(limit) if a[i] != b[i])


def scored_end(ids: Sequence[int], pad_token_id: int | None) -> int:
    """Length of a sequence up to the token that a reward model reads.

    Raises:
        ValueError: nothing but padding.
    """
    end = len(ids)
    while end and ids[end - 1] == pad_token_id:
        end -= 1
    if not end:
        raise ValueError(f"a sequence has no token to score: {len(ids)} tokens, all padding")
    return end


def _token_batch(row: _Row, wanted: list[tuple[int, int, int]], num_sequences: int) -> TokenBatch:
    input_ids, layout = row.tensors()
    table = torch.tensor(wanted, dtype=torch.int64).view(-1, 3)
    rows, source = torch.unique(table[:, 0], return_inverse=True)
    return TokenBatch(input_ids, layout, rows, source, table[:, 1], table[:, 2], num_sequences)


def _padded(ids: Sequence[int], pad_to: int | None, pad_token_id: int | None) -> list[int]:
    return [*ids, *[pad_token_id or 0] * ((pad_to or 0) - len(ids))]


def _margins(margins: Sequence[float | None] | None) -> Tensor | None:
    if margins is None or all(m is None for m in margins):
        return None
    return torch.tensor([m or 0.0 for m in margins], dtype=torch.float32)


def _move(batch: Batch, device: torch.device | str) -> Batch:
    moved: dict[str, Any] = {
        name: value.to(device)
        for name, value in vars(batch).items()
        if isinstance(value, Tensor | PackedLayout)
    }
    return replace(batch, **moved)

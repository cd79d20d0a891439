"""Token ids into packed batches: the one place where a batch's layout is decided.

The tokens go through NumPy: this may run beside a training step, and torch would start a second
team of threads there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor

from ..layout import NO_PREFIX, PackedLayout

# Token ids or flags, one for each token. Arrays are packed without a look at the single token.
TokenIds: TypeAlias = Sequence[int] | np.ndarray
Flags: TypeAlias = Sequence[bool] | np.ndarray


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
    direct: bool = False
    """Target m is that of `rows[m]`: `source` counts 0..M-1."""
    token_weights: Tensor | None = None
    """What each target counts for [M], fp32; None for 1 each."""

    def of_targets(self, hidden: Tensor) -> Tensor:
        """The hidden states [N, C] of `rows` that predict the targets [M, C]."""
        return hidden if self.direct else hidden[self.source]

    def to(self, device: torch.device | str) -> TokenBatch:
        return moved(self, device)


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
        return moved(self, device)


@dataclass(frozen=True)
class ScoredBatch:
    """Packed sequences of which some rows are scored."""

    input_ids: Tensor
    """[T], int64."""
    layout: PackedLayout
    rows: Tensor
    """Scored packed rows [N], ascending and unique, int64."""

    def to(self, device: torch.device | str) -> ScoredBatch:
        return moved(self, device)


Batch = TypeVar("Batch")


class _Row:
    """A packed row under construction."""

    def __init__(self) -> None:
        self.parts: list[np.ndarray] = []
        self.lengths: list[int] = []
        self.prefix: list[int] = []
        self.size = 0

    def add(self, ids: np.ndarray, prefix: int = NO_PREFIX) -> tuple[int, int]:
        """Append a segment; its index and first packed row."""
        first = self.size
        self.parts.append(ids)
        self.lengths.append(len(ids))
        self.prefix.append(prefix)
        self.size += len(ids)
        return len(self.lengths) - 1, first

    def tensors(self) -> tuple[Tensor, PackedLayout]:
        ids = torch.from_numpy(_joined(self.parts, np.int64))
        return ids, PackedLayout(self.lengths, self.prefix)


def pack_sequences(
    sequences: Sequence[TokenIds],
    loss_masks: Sequence[Flags],
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
    row, flags = _Row(), []
    for ids, mask in zip(sequences, loss_masks, strict=True):
        row.add(_padded(_ids(ids), pad_to, pad_token_id))
        flags.append(_padded(np.asarray(mask, dtype=bool), pad_to, False))
    input_ids, layout = row.tensors()
    wanted = _joined(flags, np.bool_)
    lengths = np.asarray(row.lengths, dtype=np.int64)
    starts = np.cumsum(lengths) - lengths
    wanted[starts[lengths > 0]] = False
    targets = np.flatnonzero(wanted)
    # Each row predicts one token at most, so no two targets share one.
    return TokenBatch(
        input_ids=input_ids,
        layout=layout,
        rows=torch.from_numpy(targets - 1),
        source=torch.from_numpy(np.arange(len(targets))),
        targets=torch.from_numpy(input_ids.numpy()[targets]),
        sequence=torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths)[targets]),
        num_sequences=len(lengths),
        direct=True,
    )


def pack_groups(
    prompts: Sequence[TokenIds],
    completions: Sequence[TokenIds],
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
        pairs = [(_ids(prompts[g]), _ids(c)) for g, c in zip(group, completions, strict=True)]
        whole = [np.concatenate(pair) for pair in pairs]
        masks = [np.arange(len(p) + len(c)) >= len(p) for p, c in pairs]
        return pack_sequences(whole, masks, pad_to, pad_token_id)
    row, before = _Row(), []
    placed: dict[int, tuple[int, int]] = {}
    for g, completion in zip(group, completions, strict=True):
        if g not in placed:
            segment, first = row.add(_ids(prompts[g]))
            placed[g] = segment, first + row.lengths[-1] - 1
        segment, last_of_prompt = placed[g]
        _, first = row.add(_ids(completion), prefix=segment)
        # The prompt's last row predicts the first token of every completion.
        rows = np.arange(first - 1, first - 1 + len(completion))
        rows[:1] = last_of_prompt
        before.append(rows)
    input_ids, layout = row.tensors()
    rows, source = np.unique(_joined(before, np.int64), return_inverse=True)
    lengths = [len(completion) for completion in completions]
    return TokenBatch(
        input_ids=input_ids,
        layout=layout,
        rows=torch.from_numpy(rows),
        source=torch.from_numpy(source),
        targets=torch.from_numpy(_joined([_ids(c) for c in completions], np.int64)),
        sequence=torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths)),
        num_sequences=len(lengths),
    )


def pack_pairs(
    pairs: Sequence[tuple[TokenIds, TokenIds]],
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
    scored: list[int] = []
    for pair in pairs:
        sides = _ids(pair[0]), _ids(pair[1])
        ends = scored_end(sides[0], pad_token_id), scored_end(sides[1], pad_token_id)
        shared = 0
        if share_prefix and pad_to is None:
            shared = min(common_prefix(*sides), min(ends) - 1)
        prefix = row.add(sides[0][:shared])[0] if shared else NO_PREFIX
        for ids, end in zip(sides, ends, strict=True):
            kept = ids[shared:end] if pad_to is None else _padded(ids, pad_to, pad_token_id or 0)
            scored.append(row.add(kept, prefix)[1] + end - shared - 1)
    input_ids, layout = row.tensors()
    # Every side has a segment of its own, in this order: the scored rows ascend as they are.
    rows, index = torch.tensor(scored, dtype=torch.int64), torch.arange(len(scored))
    return PairBatch(input_ids, layout, rows, index[0::2], index[1::2], _margins(margins))


def pack_completions(
    prompts: Sequence[TokenIds],
    completions: Sequence[TokenIds],
    pad_token_id: int | None,
) -> tuple[ScoredBatch, Tensor]:
    """Completions to score; neighbours with the same prompt share its segment.

    Returns:
        The batch, and for each completion its index into the batch's rows [B].
    """
    row, scored = _Row(), []
    shared, segment = None, NO_PREFIX
    for prompt, completion in zip(prompts, completions, strict=True):
        whole = np.concatenate([_ids(prompt), _ids(completion)])
        end = scored_end(whole, pad_token_id)
        if end <= len(prompt):
            # The scored token lies in the prompt: a whole sequence of its own is simplest.
            _, first = row.add(whole[:end])
            scored.append(first + end - 1)
            continue
        if shared is None or not np.array_equal(prompt, shared):
            shared, segment = prompt, row.add(_ids(prompt))[0] if len(prompt) else NO_PREFIX
        _, first = row.add(whole[len(prompt) : end], segment)
        scored.append(first + end - len(prompt) - 1)
    input_ids, layout = row.tensors()
    rows = torch.tensor(scored, dtype=torch.int64)
    return ScoredBatch(input_ids, layout, rows), torch.arange(len(scored))


def common_prefix(a: TokenIds, b: TokenIds) -> int:
    """How many tokens two sequences share at their beginning."""
    limit = min(len(a), len(b))
    same = np.equal(a[:limit], b[:limit])
    return limit if same.all() else int(same.argmin())


def scored_end(ids: TokenIds, pad_token_id: int | None) -> int:
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


def _ids(ids: TokenIds) -> np.ndarray:
    return ids if isinstance(ids, np.ndarray) else np.asarray(ids, dtype=np.int64)


def _joined(parts: list[np.ndarray], dtype: type[np.generic]) -> np.ndarray:
    return np.concatenate([np.empty(0, dtype), *parts], dtype=dtype, casting="unsafe")


def _padded(values: np.ndarray, pad_to: int | None, filling: int | bool) -> np.ndarray:
    missing = (pad_to or 0) - len(values)
    return values if missing <= 0 else np.append(values, np.full(missing, filling, values.dtype))


def _margins(margins: Sequence[float | None] | None) -> Tensor | None:
    if margins is None or all(m is None for m in margins):
        return None
    return torch.tensor([m or 0.0 for m in margins], dtype=torch.float32)


def moved(batch: Batch, device: torch.device | str) -> Batch:
    """A batch (any dataclass of tensors, layouts and batches) with its tensors on `device`."""
    there: dict[str, Any] = {
        name: value.to(device) for name, value in vars(batch).items() if hasattr(value, "to")
    }
    return replace(batch, **there)  # type: ignore[type-var]

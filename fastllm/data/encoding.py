"""Turn records into token ids, by TRL's rules.

- Strings are framed as the tokenizer frames a text; EOS follows unless it is there already.
  Messages go through the chat template, which alone decides about special tokens.
- The completion begins where the tokens of the prompt and of prompt + completion part.
- SFT sequences longer than `max_length` lose their end; those left without a token that carries
  loss are dropped. Preference pairs with a side longer than `max_length` are dropped. A prompt
  longer than `max_length` is an error. Each rule is counted in an `EncodingSummary`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastllm.data.columns import Text
from fastllm.data.errors import DataError
from fastllm.data.records import PreferenceRecord, PromptRecord, SFTRecord
from fastllm.data.tokenise import (
    TokenIds,
    given_ids,
    joined,
    tokenise_prompts,
    tokenise_spoken,
    tokenise_wholes,
)
from fastllm.data.tokenizer import Tokenizer

logger = logging.getLogger("fastllm")


@dataclass(frozen=True, slots=True, eq=False)
class EncodedSequence:
    """Token ids [T], and which of them are targets of the loss (never the first: nothing comes
    before it to predict it from)."""

    input_ids: TokenIds
    loss_mask: NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class EncodedPair:
    """The token ids of both sides, each with its prompt."""

    chosen: TokenIds
    rejected: TokenIds
    margin: float | None = None

    @property
    def longer(self) -> int:
        """The length of the longer side, in tokens."""
        return max(len(self.chosen), len(self.rejected))


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """A prompt's token ids, the columns for the reward functions, and the prompt as written."""

    input_ids: list[int]
    columns: dict[str, Any]
    prompt: Text


@dataclass(slots=True)
class EncodingSummary:
    """What became of the records; `str` makes one line of it.

    `tokens`, `shortest` and `longest` are of what was kept; a pair is as long as its longer side.
    """

    unit: str
    read: int
    max_length: int | None
    kept: int = 0
    truncated: int = 0
    too_long: int = 0
    without_loss: int = 0
    identical: int = 0
    tokens: int = 0
    loss_tokens: int = 0
    shortest: int = 0
    longest: int = 0

    def measure(self, lengths: Sequence[int], tokens: int) -> None:
        """Take down the lengths of what was kept."""
        self.kept, self.tokens = len(lengths), tokens
        self.shortest, self.longest = min(lengths, default=0), max(lengths, default=0)

    def __str__(self) -> str:
        limit = f"{self.max_length or 0:,} tokens"
        counts = {
            f"longer than {limit} dropped": self.too_long,
            f"cut to {limit}": self.truncated,
            "with no token that carries loss dropped": self.without_loss,
            "with equal sides, which teach nothing": self.identical,
        }
        notes = [f"{count:,} {what}" for what, count in counts.items() if count]
        sizes = f"{self.tokens:,} tokens, {self.shortest:,} to {self.longest:,} each"
        return "; ".join([f"kept {self.kept:,} of {self.read:,} {self.unit}", *notes, sizes])


def encode_sft(
    records: Sequence[SFTRecord],
    tokenizer: Tokenizer,
    max_length: int | None = 1024,
    completion_only_loss: bool | None = None,
    assistant_only_loss: bool = False,
) -> tuple[list[EncodedSequence], EncodingSummary]:
    """Encode SFT records.

    Loss falls on the completions of records that have a prompt and on the whole of the others;
    `completion_only_loss=False`: on the prompts too; True: every record must have a prompt.
    `assistant_only_loss`: of that, only on what the assistant wrote. A pre-tokenised record's own
    mask or labels always hold. Raises DataError if no sequence is left.
    """
    rows = _sft_rows(records, tokenizer, assistant_only_loss)
    starts = _completion_starts(records, [ids for ids, _ in rows], tokenizer)
    summary = EncodingSummary("sequences", len(records), max_length)
    encoded = []
    for record, (ids, loss_mask), start in zip(records, rows, starts, strict=True):
        if completion_only_loss and record.prompt is None and record.input_ids is None:
            raise DataError(
                f"{record.origin}: completion_only_loss needs 'prompt' and 'completion', found a "
                "text without a prompt"
            )
        loss_mask[: 1 if completion_only_loss is False else max(start, 1)] = False
        sequence = EncodedSequence(ids[:max_length], loss_mask[:max_length])
        if sequence.loss_mask.any():
            encoded.append(sequence)
            summary.truncated += len(sequence.input_ids) < len(ids)
    summary.without_loss = len(records) - len(encoded)
    if not encoded:
        lengths = sorted(len(ids) for ids, _ in rows) or [0]
        raise DataError(
            f"none of the {len(records):,} sequences ({lengths[0]:,} to {lengths[-1]:,} tokens) "
            f"has a token that carries loss within max_length = {max_length}; raise max_length "
            "above the length of the prompts"
        )
    lengths = [len(sequence.input_ids) for sequence in encoded]
    summary.measure(lengths, sum(lengths))
    summary.loss_tokens = sum(int(sequence.loss_mask.sum()) for sequence in encoded)
    logger.info("%s", summary)
    return encoded, summary


def _sft_rows(
    records: Sequence[SFTRecord], tokenizer: Tokenizer, assistant_only: bool
) -> list[tuple[TokenIds, NDArray[np.bool_]]]:
    """Return token ids and mask for each record, before the prompt is taken out of the loss."""
    texts = [
        joined(record.prompt, record.completion) if record.input_ids is None else None
        for record in records
    ]
    if assistant_only:
        nothing = np.empty(0, dtype=np.int32), np.empty(0, dtype=bool)
        rows = [
            nothing if text is None else tokenise_spoken(text, record, tokenizer)
            for text, record in zip(texts, records, strict=True)
        ]
    else:
        wholes = tokenise_wholes(texts, records, tokenizer)
        rows = [(ids, np.ones(len(ids), dtype=bool)) for ids in wholes]
    for index, record in enumerate(records):
        if record.input_ids is not None:
            mask = record.loss_mask or [True] * len(record.input_ids)
            rows[index] = (
                given_ids(record.input_ids, record, tokenizer),
                np.array(mask, dtype=bool),
            )
    return rows


def _completion_starts(
    records: Sequence[SFTRecord], rows: Sequence[TokenIds], tokenizer: Tokenizer
) -> list[int]:
    """Return where each completion begins in its row (0 without a prompt)."""
    with_prompt = [index for index, record in enumerate(records) if record.prompt is not None]
    prompts = tokenise_prompts(
        [records[index].prompt or "" for index in with_prompt],
        [records[index] for index in with_prompt],
        tokenizer,
    )
    starts = [0] * len(records)
    changed = 0
    for index, prompt in zip(with_prompt, prompts, strict=True):
        starts[index] = _common_prefix(prompt, rows[index])
        changed += starts[index] < len(prompt)
    if changed:
        logger.warning(
            "%s of %s prompts end in other tokens once the completion follows: those tokens count "
            "as completion. End prompts on a token boundary (a newline), or use a chat template "
            "that renders them alike in both cases",
            f"{changed:,}",
            f"{len(with_prompt):,}",
        )
    return starts


def _common_prefix(prompt: TokenIds, whole: TokenIds) -> int:
    length = min(len(prompt), len(whole))
    same = prompt[:length] == whole[:length]
    return length if same.all() else int(same.argmin())


def encode_preferences(
    records: Sequence[PreferenceRecord], tokenizer: Tokenizer, max_length: int | None = 1024
) -> tuple[list[EncodedPair], EncodingSummary]:
    """Encode preference pairs, each side as prompt + answer. Raises DataError if none is left."""
    pairs = tokenise_pairs(records, tokenizer)
    kept = [pair for pair in pairs if max_length is None or pair.longer <= max_length]
    if not kept:
        longer = [pair.longer for pair in pairs] or [0]
        raise DataError(
            f"none of the {len(pairs):,} pairs fits into max_length = {max_length}: their longer "
            f"sides have {min(longer):,} to {max(longer):,} tokens; raise max_length"
        )
    summary = EncodingSummary("pairs", len(pairs), max_length)
    summary.too_long = len(pairs) - len(kept)
    summary.identical = sum(np.array_equal(pair.chosen, pair.rejected) for pair in kept)
    tokens = sum(len(pair.chosen) + len(pair.rejected) for pair in kept)
    summary.measure([pair.longer for pair in kept], tokens)
    logger.info("%s", summary)
    return kept, summary


def tokenise_pairs(records: Sequence[PreferenceRecord], tokenizer: Tokenizer) -> list[EncodedPair]:
    """Return both sides of every pair as token ids, whatever their length."""
    sides = []
    for side in ("chosen", "rejected"):
        ready = [getattr(record, f"{side}_ids") for record in records]
        texts = [
            joined(record.prompt, getattr(record, side)) if ids is None else None
            for record, ids in zip(records, ready, strict=True)
        ]
        rows = tokenise_wholes(texts, records, tokenizer)
        sides.append(
            [
                row if ids is None else given_ids(ids, record, tokenizer)
                for ids, row, record in zip(ready, rows, records, strict=True)
            ]
        )
    return [
        EncodedPair(chosen, rejected, record.margin)
        for chosen, rejected, record in zip(*sides, records, strict=True)
    ]


def encode_prompts(
    records: Sequence[PromptRecord], tokenizer: Tokenizer, max_length: int | None = None
) -> tuple[list[EncodedPrompt], EncodingSummary]:
    """Encode prompts. One without tokens, or with more than `max_length`, raises DataError."""
    rows = tokenise_prompts([record.prompt for record in records], records, tokenizer)
    for record, ids in zip(records, rows, strict=True):
        if not len(ids):
            raise DataError(f"{record.origin}: the prompt is empty, there is nothing to continue")
        if max_length is not None and len(ids) > max_length:
            raise DataError(
                f"{record.origin}: the prompt has {len(ids):,} tokens and at most {max_length:,} "
                "are allowed; shorten it or allow more"
            )
    summary = EncodingSummary("prompts", len(records), max_length)
    lengths = [len(ids) for ids in rows]
    summary.measure(lengths, sum(lengths))
    logger.info("%s", summary)
    encoded = [
        EncodedPrompt(ids.tolist(), record.columns, record.prompt)
        for record, ids in zip(records, rows, strict=True)
    ]
    return encoded, summary

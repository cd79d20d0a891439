"""Records through a reward model, as it was trained: tokenised, ended and packed by one rule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastllm.data.encoding import tokenise_pairs
from fastllm.data.errors import DataError
from fastllm.data.packing import pack_pairs, scored_end
from fastllm.data.reader import Record
from fastllm.data.records import preference_records, sft_records
from fastllm.data.tokenise import joined, tokenise_wholes
from fastllm.data.tokenizer import Tokenizer
from fastllm.layout import PackedLayout
from fastllm.model.reward import RewardModel


@torch.no_grad()
def score_pairs(
    model: RewardModel, tokenizer: Tokenizer, records: Sequence[Record], size: int
) -> list[dict[str, float]]:
    """Scores of both sides of preference records, `size` records at a time.

    Raises:
        DataError: a bad record, or one with more tokens than the model has positions.
    """
    pairs = preference_records(records)
    encoded = tokenise_pairs(pairs, tokenizer)
    for pair, ids in zip(pairs, encoded, strict=True):
        _check_length(pair.origin, ids.longer, model)
    rows: list[dict[str, float]] = []
    for first in range(0, len(encoded), size):
        sides = [(pair.chosen, pair.rejected) for pair in encoded[first : first + size]]
        batch = pack_pairs(sides, pad_token_id=_pad(model)).to(_device(model))
        scores = model.score_rows(batch.input_ids, batch.layout, batch.rows)
        rows += [
            {"chosen_score": chosen, "rejected_score": rejected}
            for chosen, rejected in zip(
                scores[batch.chosen].tolist(), scores[batch.rejected].tolist(), strict=True
            )
        ]
    return rows


@torch.no_grad()
def score_texts(
    model: RewardModel, tokenizer: Tokenizer, records: Sequence[Record], size: int
) -> list[dict[str, float]]:
    """The score of each record's whole text, `size` records at a time.

    Raises:
        DataError: a bad record, or one with more tokens than the model has positions.
    """
    texts = sft_records(records)
    wholes = [None if t.input_ids else joined(t.prompt, t.completion) for t in texts]
    tokenised = tokenise_wholes(wholes, texts, tokenizer)
    sequences = [text.input_ids or ids.tolist() for text, ids in zip(texts, tokenised, strict=True)]
    for text, ids in zip(texts, sequences, strict=True):
        _check_length(text.origin, len(ids), model)
    rows: list[dict[str, float]] = []
    for first in range(0, len(sequences), size):
        scores = score_sequences(model, sequences[first : first + size])
        rows += [{"score": value} for value in scores.tolist()]
    return rows


def score_sequences(model: RewardModel, sequences: Sequence[Sequence[int]]) -> Tensor:
    """Scores [B] of token ids, computed as one packed row."""
    pad = model.config.pad_token_id
    read = [list(ids[: scored_end(ids, pad)]) for ids in sequences]
    device = _device(model)
    layout = PackedLayout([len(ids) for ids in read], device=device)
    input_ids = torch.tensor([token for ids in read for token in ids], device=device)
    return model.score_rows(input_ids, layout, layout.starts[1:].long() - 1)


def _check_length(origin: str, length: int, model: RewardModel) -> None:
    longest = model.config.max_position_embeddings
    if length > longest:
        raise DataError(
            f"{origin}: {length:,} tokens, but the model reads at most {longest:,}; nothing is cut"
        )


def _pad(model: RewardModel) -> Any:
    return model.config.pad_token_id


def _device(model: RewardModel) -> torch.device:
    return model.score.weight.device

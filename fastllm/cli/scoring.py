"""Records through a reward model, as it was trained: tokenised, ended and packed by one rule."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch

from fastllm.data.columns import Text
from fastllm.data.encoding import tokenise_pairs
from fastllm.data.errors import DataError
from fastllm.data.packing import common_prefix, pack_pairs
from fastllm.data.reader import Record
from fastllm.data.records import preference_records, sft_records
from fastllm.data.tokenise import joined, tokenise_wholes
from fastllm.data.tokenizer import Tokenizer
from fastllm.model.reward import RewardModel
from fastllm.training.rewards import score_completions


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

    The prompt of neighbours that complete the same one is computed once.

    Raises:
        DataError: a bad record, or one with more tokens than the model has positions.
    """
    texts = sft_records(records)
    wholes = [None if t.input_ids else joined(t.prompt, t.completion) for t in texts]
    tokenised = tokenise_wholes(wholes, texts, tokenizer)
    sequences = [text.input_ids or ids.tolist() for text, ids in zip(texts, tokenised, strict=True)]
    for text, ids in zip(texts, sequences, strict=True):
        _check_length(text.origin, len(ids), model)
    shared = _shared([text.prompt for text in texts], sequences)
    parts = [(ids[:n], ids[n:]) for ids, n in zip(sequences, shared, strict=True)]
    rows: list[dict[str, float]] = []
    for first in range(0, len(parts), size):
        prompts, completions = zip(*parts[first : first + size], strict=True)
        scores = score_completions(model, prompts, completions, _device(model))
        rows += [{"score": value} for value in scores.tolist()]
    return rows


def _shared(prompts: Sequence[Text | None], sequences: Sequence[list[int]]) -> list[int]:
    """How many of its first tokens each sequence shares with all neighbours of the same prompt."""
    counts: list[int] = []
    for _, neighbours in groupby(
        range(len(prompts)), key=lambda i: i if prompts[i] is None else prompts[i]
    ):
        group = [sequences[i] for i in neighbours]
        alike = [common_prefix(group[0], other) for other in group[1:]]
        counts += [min(alike, default=0)] * len(group)
    return counts


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

"""Preference pairs as a dataset, and a collator that makes tensors of them as training does."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fastllm.data.columns import Text
from fastllm.data.encoding import tokenise_pairs
from fastllm.data.errors import DataError
from fastllm.data.records import is_conversational, preference_records
from fastllm.data.tokenise import TokenIds, joined, tokenise_wholes
from fastllm.data.tokenizer import Tokenizer

if TYPE_CHECKING:
    from torch import LongTensor, Tensor

logger = logging.getLogger("fastllm")


class PreferenceDataset:
    """Preference records, checked and of one form; serves as a map-style torch dataset.

    `pairs` is anything that `preference_records` reads. An item is a dict with `prompt` (empty
    where the record has none), `chosen`, `rejected` and, where given, `margin`; a pre-tokenised
    one has `chosen_ids` and `rejected_ids`.
    """

    def __init__(self, pairs: Any) -> None:
        self.records = preference_records(pairs)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self.records[index]
        margin = {} if record.margin is None else {"margin": record.margin}
        if record.chosen_ids is not None:
            return {
                "chosen_ids": record.chosen_ids,
                "rejected_ids": record.rejected_ids,
                **margin,
            }
        no_prompt: Text = [] if is_conversational(record.chosen) else ""
        prompt = no_prompt if record.prompt is None else record.prompt
        return {
            "prompt": prompt,
            "chosen": record.chosen,
            "rejected": record.rejected,
            **margin,
        }


class RewardDataCollator:
    """Makes tensors of preference pairs by the reward trainer's own rule.

    A sequence is prompt + answer + EOS (messages: what the chat template makes of them). A pair
    with a side longer than `block_size` tokens is not used: dropped from a batch and counted in
    `dropped`, an error where a single sequence or pair is asked for. Nothing is ever cut.
    """

    def __init__(self, block_size: int, tokenizer: Tokenizer | None = None) -> None:
        if block_size < 1:
            raise ValueError(f"block_size must be at least 1, found {block_size}")
        if tokenizer is None:
            tokenizer = Tokenizer.bytes()
            logger.info("RewardDataCollator: no tokenizer given, using the %s", tokenizer)
        self.block_size = block_size
        self.tokenizer = tokenizer
        self.dropped = 0

    def encode(self, prompt: Text, response: Text) -> LongTensor:
        """Return the token ids [T <= block_size] of the response after its prompt."""
        record = preference_records(
            [{"prompt": prompt, "chosen": response, "rejected": response}], "sequence"
        )[0]
        ids = tokenise_wholes([joined(record.prompt, record.chosen)], [record], self.tokenizer)[0]
        return _long_tensor(self._fitting(ids, "the sequence"))

    def collate_pair(
        self, prompt: Text, chosen: Text, rejected: Text
    ) -> tuple[LongTensor, LongTensor]:
        """Return the token ids of both answers, each after the prompt, without padding."""
        records = preference_records([{"prompt": prompt, "chosen": chosen, "rejected": rejected}])
        pair = tokenise_pairs(records, self.tokenizer)[0]
        return (
            _long_tensor(self._fitting(pair.chosen, "'chosen'")),
            _long_tensor(self._fitting(pair.rejected, "'rejected'")),
        )

    def __call__(self, pairs: Sequence[Any]) -> dict[str, Tensor]:
        """Return a batch of P pairs padded on the right to their longest side T.

        `chosen_ids`, `rejected_ids` [P, T] int64; `chosen_lengths`, `rejected_lengths` [P] int64;
        `margin` [P] float32 where any pair has one (0 for the others).
        """
        import torch

        encoded = tokenise_pairs(preference_records(pairs), self.tokenizer)
        fitting = [pair for pair in encoded if pair.longer <= self.block_size]
        self.dropped += len(encoded) - len(fitting)
        if not fitting:
            shortest = min(pair.longer for pair in encoded)
            raise DataError(
                f"none of the {len(encoded)} pairs fits into block_size = {self.block_size}: the "
                f"shortest has {shortest:,} tokens"
            )
        width = max(pair.longer for pair in fitting)
        batch = {}
        for side in ("chosen", "rejected"):
            rows = [getattr(pair, side) for pair in fitting]
            batch[f"{side}_ids"] = self._padded(rows, width)
            batch[f"{side}_lengths"] = torch.tensor([len(row) for row in rows])
        if any(pair.margin is not None for pair in fitting):
            batch["margin"] = torch.tensor([pair.margin or 0.0 for pair in fitting])
        return batch

    def _fitting(self, ids: TokenIds, what: str) -> TokenIds:
        if len(ids) > self.block_size:
            raise DataError(
                f"{what} has {len(ids):,} tokens and block_size is {self.block_size:,}; shorten "
                "it or raise block_size"
            )
        return ids

    def _padded(self, rows: list[TokenIds], width: int) -> Tensor:
        pad = self.tokenizer.pad_token_id
        if pad is None:
            pad = 0  # any id will do: the lengths say where a sequence ends
        table = np.full((len(rows), width), pad, dtype=np.int64)
        for row, ids in zip(table, rows, strict=True):
            row[: len(ids)] = ids
        return _long_tensor(table)


def _long_tensor(values: NDArray[Any]) -> LongTensor:
    import torch

    return torch.tensor(values, dtype=torch.int64)  # type: ignore[return-value]

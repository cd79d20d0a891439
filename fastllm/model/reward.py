"""A reward model: the same trunk with a scalar head that runs on scored tokens only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..layout import PackedLayout
from . import weights
from .config import REWARD_MODEL, ModelConfig
from .layers import Linear
from .transformer import PackedAttend, Trunk, initialise, unpad


class RewardModel(nn.Module):
    """Scores a sequence at its last token that is not `pad_token_id`.

    On disk it is Hugging Face's `<Family>ForSequenceClassification` with one label.
    """

    head_name = REWARD_MODEL

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Trunk(config)
        self.score = Linear(config.hidden_size, 1, bias=False)
        initialise(self, config)

    def score_rows(self, input_ids: Tensor, layout: PackedLayout, rows: Tensor) -> Tensor:
        """Scores at packed rows.

        Args:
            input_ids: packed tokens [T].
            layout: their segments.
            rows: packed rows to score [N], ascending and unique, int64.

        Returns:
            [N], fp32.
        """
        return ops.reward_scores(self.hidden(input_ids, layout, rows), self.score.weight)

    def hidden(self, input_ids: Tensor, layout: PackedLayout, rows: Tensor) -> Tensor:
        """Hidden states of packed tokens [T] at the rows to score: [N, C]."""
        return self.model(input_ids, PackedAttend(layout, rows), rows)

    def forward(self, input_ids: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Scores of a right-padded batch.

        Args:
            input_ids: [B, T].
            lengths: tokens of each row to read [B]; when None, up to the last token that is not
                `pad_token_id` (all of them when the config names no pad token).

        Returns:
            [B], fp32.

        Raises:
            ValueError: a row that is all padding.
        """
        if lengths is None:
            lengths = scored_lengths(input_ids, self.config.pad_token_id)
        packed, layout, _ = unpad(input_ids, lengths)
        if min(layout.lengths, default=1) == 0:
            raise ValueError(f"row {layout.lengths.index(0)} has no token to score: all padding")
        return self.score_rows(packed, layout, layout.starts[1:].long() - 1)

    @classmethod
    def from_pretrained(cls, folder: str | Path, **options: Any) -> RewardModel:
        """Load a Hugging Face folder, a run or checkpoint folder, or a `.pt` file."""
        return weights.load_model(folder, cls, **options)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` and `model.safetensors` as Hugging Face does."""
        weights.save_model(self, folder)


def scored_lengths(input_ids: Tensor, pad_token_id: int | None) -> Tensor:
    """Tokens up to the last one that is not padding [B]: the rule of Hugging Face."""
    batch, width = input_ids.shape
    if pad_token_id is None:
        return torch.full((batch,), width, device=input_ids.device)
    ranks = torch.arange(1, width + 1, device=input_ids.device)
    return (ranks * (input_ids != pad_token_id)).amax(dim=1)

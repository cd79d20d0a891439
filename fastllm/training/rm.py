"""Reward models on preference pairs (Bradley-Terry)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from .. import ops
from ..data.encoding import EncodedPair, encode_preferences
from ..data.packing import PairBatch, pack_pairs
from ..data.preference import PreferenceDataset, RewardDataCollator
from ..data.records import PreferenceRecord, preference_records
from ..data.tasks import create_dummy_preference_data
from ..model import weights
from ..model.reward import RewardModel
from .activations import PassSize
from .averages import Metric
from .batches import BatchSource, collated
from .config import RewardConfig
from .loop import Pass, total_steps
from .sft import plain_texts
from .start import Sizes, config_from, finish, starting_point
from .trainer import Trainer, split_by_prompt

__all__ = [
    "PreferenceDataset",
    "RewardDataCollator",
    "RewardTrainer",
    "create_dummy_preference_data",
    "load_reward_model",
    "train_rm",
]


def train_rm(
    pairs: Any,
    out_dir: str | Path,
    steps: int | None = None,
    batch_size: int | None = None,
    block_size: int = 256,
    n_layer: int = 4,
    n_head: int = 4,
    n_kv_head: int = 2,
    n_embd: int = 128,
    lr: float | None = None,
    *,
    model: str | Path | None = None,
    tokenizer: Any = None,
    eval_pairs: Any = None,
    vocab_size: int | None = None,
    save_every: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    seed: int = 42,
    resume: str | Path | bool = "never",
    peft_config: Any = None,
    callbacks: Iterable[Any] | None = None,
    **config: Any,
) -> RewardModel:
    """Train a reward model, from a language model or from nothing.

    Args:
        pairs: a .jsonl(.gz) path, or a list of records with `chosen` and `rejected` (strings or
            messages), optionally `prompt` and `margin`, or (prompt, chosen, rejected) tuples.
        out_dir: run folder; becomes a `<Family>ForSequenceClassification` folder.
        model: what to start from; a language model gets a new scalar head. None builds a model.
        eval_pairs: held-out records, like `pairs`.
        config: any other field of `RewardConfig`.

    The other arguments are those of `train_sft`.

    Returns:
        The trained model.

    Raises:
        DataError: a bad record, named by file and line.
        ValueError, TypeError: settings that do not fit.
    """
    records = preference_records(pairs)
    sizes = Sizes(n_layer, n_head, n_kv_head, n_embd, block_size, vocab_size)
    start, own = starting_point(model, tokenizer, lambda: _texts(records), sizes)
    if model is None:
        config.setdefault("max_length", block_size)
    trainer = RewardTrainer(
        start,
        config_from(
            RewardConfig,
            out_dir,
            steps=steps,
            batch_size=batch_size,
            lr=lr,
            save_every=save_every,
            device=device,
            dtype=dtype,
            seed=seed,
            **config,
        ),
        train_dataset=records,
        eval_dataset=eval_pairs,
        processing_class=own,
        callbacks=callbacks,
        peft_config=peft_config,
    )
    trainer.train(resume)
    finish(trainer, model)
    return trainer.model


def load_reward_model(path: str | Path, device: str = "cpu") -> RewardModel:
    """A reward model from a run folder, a checkpoint, a `.pt` file or a Hugging Face folder."""
    return weights.load_model(path, RewardModel, device=device).eval()


class RewardTrainer(Trainer):
    """TRL's RewardTrainer on packed rows: what the two sides share is computed once."""

    config_class = RewardConfig
    model_class = RewardModel
    description = "reward model"
    shown = ("loss", "accuracy")
    args: RewardConfig
    model: RewardModel

    def __init__(
        self,
        model: Any,
        args: RewardConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        callbacks: Iterable[Any] | None = None,
        peft_config: Any = None,
    ) -> None:
        super().__init__(model, args, processing_class, callbacks, peft_config)
        self._settle_pad_token()
        records, held = preference_records(train_dataset), None
        if eval_dataset is not None:
            held = preference_records(eval_dataset, "eval_pairs")
        elif self.args.eval_fraction:
            records, held = split_by_prompt(
                records, self.args.eval_fraction, self.args.seed, _prompt_key
            )
        self._train = self._encode(records)
        self._held = None if held is None else self._encode(held)
        self._held_passes: list[Pass] | None = None

    def source(self) -> BatchSource:
        return BatchSource(self._train, self._collate, self.args, self.sending)

    def loss(self, model: Any, batch: PairBatch) -> tuple[Tensor, dict[str, Metric]]:
        loss, _, metrics = ops.reward_loss(
            model.hidden(batch.input_ids, batch.layout, batch.rows),
            model.score.weight,
            batch.chosen,
            batch.rejected,
            batch.margin,
            self.args.center_rewards_coefficient or 0.0,
        )
        right, gaps, smallest, means, largest = metrics.unbind()
        count = batch.num_pairs
        return loss * count, {
            "accuracy": (right, count),
            "margin": (gaps, count),
            "min_reward": (smallest, 1),
            "mean_reward": (means, count),
            "max_reward": (largest, 1),
        }

    def evaluation_passes(self) -> list[Pass] | None:
        if self._held is not None and self._held_passes is None:
            size = self.args.per_device_eval_batch_size
            self._held_passes = collated(self._held, size, self._collate, self.placement.send)
        return self._held_passes

    def largest_pass(self, source: BatchSource) -> PassSize:
        steps = total_steps(self.args, source)
        batch = source.largest(steps, lambda pair: len(pair.chosen) + len(pair.rejected))
        return PassSize(batch.input_ids.numel(), batch.rows.numel(), 0)

    def _from_path(self, path: str | Path) -> RewardModel:
        return weights.load_model(path, RewardModel, new_head=True)

    def _settle_pad_token(self) -> None:
        """The config must name a pad token: scores are read at the last token that is not it."""
        config = self.model.config
        if config.pad_token_id is None:
            tokenizer = self.processing_class
            config.pad_token_id = (
                tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
            )

    def _encode(self, records: list[PreferenceRecord]) -> list[EncodedPair]:
        return encode_preferences(records, self.processing_class, self.args.max_length)[0]

    def _collate(self, examples: Sequence[EncodedPair]) -> tuple[PairBatch, float, int]:
        sides = [(e.chosen, e.rejected) for e in examples]
        longest = None if self.args.packing else max(len(ids) for pair in sides for ids in pair)
        batch = pack_pairs(
            sides,
            [e.margin for e in examples],
            share_prefix=self.args.share_prefix,
            pad_to=longest,
            pad_token_id=self.model.config.pad_token_id,
        )
        return batch, batch.num_pairs, sum(len(a) + len(b) for a, b in sides)


def _prompt_key(record: PreferenceRecord) -> str:
    if record.chosen_ids is not None:
        return str(record.chosen_ids)
    return str(record.chosen if record.prompt is None else record.prompt)


def _texts(records: list[PreferenceRecord]) -> Iterable[str]:
    for record in records:
        yield from plain_texts(record.prompt, record.chosen, record.rejected)

"""Supervised fine-tuning: next-token prediction on the tokens that carry loss."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..data.encoding import EncodedSequence, encode_sft
from ..data.packing import TokenBatch, pack_sequences
from ..data.records import SFTRecord, sft_records
from ..model.transformer import Transformer
from .activations import PassSize
from .averages import Metric
from .batches import BatchSource, collated
from .config import SFTConfig
from .loop import Pass, total_steps
from .start import Sizes, config_from, finish, starting_point
from .trainer import Trainer, split_by_prompt


def train_sft(
    items: Any,
    out_dir: str | Path,
    *,
    model: str | Path | None = None,
    tokenizer: Any = None,
    eval_items: Any = None,
    steps: int | None = None,
    batch_size: int | None = None,
    block_size: int = 256,
    n_layer: int = 4,
    n_head: int = 4,
    n_kv_head: int = 2,
    n_embd: int = 128,
    vocab_size: int | None = None,
    lr: float | None = None,
    save_every: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    seed: int = 42,
    resume: str | Path | bool = "never",
    peft_config: Any = None,
    callbacks: Iterable[Any] | None = None,
    **config: Any,
) -> Transformer:
    """Fine-tune a language model, or train a small one from nothing.

    Args:
        items: a .jsonl(.gz) path, or a list of records: `text`, `messages`, `prompt` and
            `completion`, `Example`s or (prompt, response) tuples.
        out_dir: run folder; becomes a Hugging Face folder.
        model: what to start from: run folder, checkpoint, `.pt` file or Hugging Face folder.
            None builds a model of `n_layer`, `n_head`, `n_kv_head`, `n_embd`, `block_size`.
        tokenizer: a Tokenizer, a path, "bytes" or "bpe"; None takes the model's own, else one
            trained on the items where they are large enough, else bytes.
        eval_items: held-out records, like `items`.
        steps, batch_size, lr, save_every: max_steps, per_device_train_batch_size,
            learning_rate and save_steps of `SFTConfig`.
        resume: "auto" continues the newest good checkpoint in out_dir; or a checkpoint folder.
        peft_config: a `LoraConfig` (ours or PEFT's) to train adapters only.
        config: any other field of `SFTConfig`.

    Returns:
        The trained model.

    Raises:
        DataError: a bad record, named by file and line.
        ValueError, TypeError: settings that do not fit.
    """
    records = sft_records(items)
    sizes = Sizes(n_layer, n_head, n_kv_head, n_embd, block_size, vocab_size)
    start, own = starting_point(model, tokenizer, lambda: _texts(records), sizes)
    if model is None:
        config.setdefault("max_length", block_size)
    trainer = SFTTrainer(
        start,
        config_from(
            SFTConfig,
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
        eval_dataset=eval_items,
        processing_class=own,
        callbacks=callbacks,
        peft_config=peft_config,
    )
    trainer.train(resume)
    finish(trainer, model)
    return trainer.model


class SFTTrainer(Trainer):
    """TRL's SFTTrainer on packed rows: sequences of a pass lie in one row without padding."""

    config_class = SFTConfig
    model_class = Transformer
    description = "SFT"
    args: SFTConfig
    model: Transformer

    def __init__(
        self,
        model: Any,
        args: SFTConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        callbacks: Iterable[Any] | None = None,
        peft_config: Any = None,
    ) -> None:
        super().__init__(model, args, processing_class, callbacks, peft_config)
        records, held = sft_records(train_dataset), None
        if eval_dataset is not None:
            held = sft_records(eval_dataset, "eval_items")
        elif self.args.eval_fraction:
            records, held = split_by_prompt(
                records, self.args.eval_fraction, self.args.seed, _prompt_key
            )
        self._train = self._encode(records)
        self._held = None if held is None else self._encode(held)
        self._held_passes: list[Pass] | None = None

    def source(self) -> BatchSource:
        return BatchSource(self._train, self._collate, self.args, self.sending)

    def loss(self, model: Any, batch: TokenBatch) -> tuple[Tensor, dict[str, Metric]]:
        hidden = model.hidden(batch.input_ids, batch.layout, batch.rows)
        weights = batch.token_weights
        loss, _, entropy = ops.linear_cross_entropy(
            batch.of_targets(hidden), model.lm_head.weight, batch.targets, weights
        )
        count: Tensor | float = batch.targets.numel() if weights is None else weights.sum()
        total = entropy.sum() if weights is None else (weights * entropy).sum()
        metrics: dict[str, Metric] = {"entropy": (total, count)}
        if not torch.is_grad_enabled():
            metrics["mean_token_accuracy"] = (_correct(model, hidden, batch), count)
        return loss, metrics

    def evaluation_passes(self) -> list[Pass] | None:
        if self._held is not None and self._held_passes is None:
            size = self.args.per_device_eval_batch_size
            self._held_passes = collated(self._held, size, self._collate, self.placement.send)
        return self._held_passes

    def largest_pass(self, source: BatchSource) -> PassSize:
        steps = total_steps(self.args, source)
        batch = source.largest(steps, lambda example: len(example.input_ids))
        return PassSize(batch.input_ids.numel(), batch.rows.numel(), batch.targets.numel())

    def _encode(self, records: list[SFTRecord]) -> list[EncodedSequence]:
        encoded, _ = encode_sft(
            records,
            self.processing_class,
            self.args.max_length,
            self.args.completion_only_loss,
            self.args.assistant_only_loss,
        )
        return encoded

    def _collate(self, examples: Sequence[EncodedSequence]) -> tuple[TokenBatch, float, int]:
        sequences = [e.input_ids for e in examples]
        longest = None if self.args.packing else max(map(len, sequences))
        batch = pack_sequences(
            sequences,
            [e.loss_mask for e in examples],
            pad_to=longest,
            pad_token_id=self.processing_class.pad_token_id or 0,
        )
        return batch, batch.targets.numel(), sum(map(len, sequences))


def _correct(model: Transformer, hidden: Tensor, batch: TokenBatch) -> Tensor:
    """How many targets are the most likely token."""
    guesses = [model.lm_head(rows).argmax(-1) for rows in hidden.split(512)]
    return (batch.of_targets(torch.cat(guesses)) == batch.targets).sum()


def _prompt_key(record: SFTRecord) -> str:
    if record.input_ids is not None:
        return str(record.input_ids)
    return str(record.completion if record.prompt is None else record.prompt)


def _texts(records: list[SFTRecord]) -> Iterable[str]:
    for record in records:
        yield from plain_texts(record.prompt, record.completion)


def plain_texts(*texts: Any) -> Iterable[str]:
    """The strings of texts that may be messages or missing."""
    for text in texts:
        if isinstance(text, str):
            yield text
        elif text is not None:
            yield from (m["content"] for m in text if isinstance(m.get("content"), str))

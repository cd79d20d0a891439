"""Whole training steps inside this process: ours, and a plain loop over a transformers model.

Both start from the same weights and see one batch again and again, so that their losses can be
compared. For the sections that turn a screw (length, width, threads); the section `steps` runs
the peers themselves, each in its own environment.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastllm import (
    ModelConfig,
    RewardConfig,
    RewardModel,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
    Tokenizer,
    Transformer,
)

from .harness import Block
from .records import OURS

PEER = "transformers"

# The mean loss of a block of steps may differ by this much, relative.
LOSS_TOLERANCE = {"float32": 1e-3, "bfloat16": 2e-2, "float16": 1e-2}
DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}

LEARNING_RATE = 1e-3
# Ids that the tokenizer knows (bytes, above the special tokens), whatever the model's vocabulary.
IDS = (8, 260)


@dataclass(frozen=True)
class Work:
    """A training step: what is trained, on how much."""

    kind: str = "SFT"
    """"SFT" or "RM"."""
    batch: int = 8
    """Sequences, or pairs of them."""
    length: int = 256
    layers: int = 4
    width: int = 128
    heads: int = 4
    key_heads: int = 2
    vocabulary: int = 4096

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.batch * self.length * (2 if self.kind == "RM" else 1)

    @property
    def flops(self) -> float:
        """Matrix products and attention, backward included, of what a plain step computes."""
        config = self.config()
        head = config.hidden_size // config.num_attention_heads
        projections = 2 * config.num_attention_heads + 2 * config.num_key_value_heads
        layer = projections * head * self.width + 3 * self.width * config.intermediate_size
        linear = self.layers * layer + (self.width * self.vocabulary if self.kind == "SFT" else 0)
        seen = self.tokens * (self.length + 1) / 2
        return 6.0 * self.tokens * linear + 14.0 * seen * self.width * self.layers

    def config(self) -> ModelConfig:
        """The model."""
        tokenizer = Tokenizer.bytes()
        return ModelConfig.scratch(
            vocab_size=self.vocabulary,
            n_layer=self.layers,
            n_head=self.heads,
            n_kv_head=self.key_heads,
            n_embd=self.width,
            block_size=self.length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )

    def ids(self) -> Tensor:
        """Token ids [2, B, L] for pairs, else [1, B, L]; sides of a pair share no beginning."""
        generator = torch.Generator().manual_seed(0)
        sides = 2 if self.kind == "RM" else 1
        shape = (sides, self.batch, self.length)
        ids = torch.randint(*IDS, shape, generator=generator)
        ids[:, :, 0] = torch.arange(sides)[:, None] + IDS[0]
        return ids


class Mismatch(Exception):
    """Two programs that should train alike do not."""


def blocks(work: Work, dtype: str, steps: int, device: str, peer: bool = True) -> dict[str, Block]:
    """Blocks of `steps` steps of every contender here, warmed up and compared.

    Each returns the seconds of one step, without the first, which warms up.

    Raises:
        Mismatch: the losses of ours are not those of the plain loop.
    """
    torch.manual_seed(0)
    ours = (RewardModel if work.kind == "RM" else Transformer)(work.config())
    found: dict[str, Callable[[], tuple[float, float]]] = {}
    if peer and has_peer():
        found[PEER] = _plain(work, dtype, steps, device, ours)
    found[OURS] = _trainer(work, dtype, steps, device, ours)
    losses = {name: run()[1] for name, run in found.items()}
    if PEER in losses:
        difference = abs(losses[OURS] / losses[PEER] - 1)
        if not difference <= LOSS_TOLERANCE[dtype]:
            raise Mismatch(f"WRONG, not timed: the loss is off by {difference:.2g}")
    return {name: _seconds_of(run) for name, run in found.items()}


def has_peer() -> bool:
    """Whether transformers is installed beside us."""
    return importlib.util.find_spec("transformers") is not None


def _seconds_of(run: Callable[[], tuple[float, float]]) -> Block:
    return lambda: run()[0]


class _Clock:
    """Stamps of the ends of steps, as a callback."""

    def __init__(self) -> None:
        self.stamps: list[float] = []

    def on_step_end(self, *_: object, **__: object) -> None:
        self.stamps.append(time.perf_counter())

    def seconds(self) -> float:
        return (self.stamps[-1] - self.stamps[0]) / (len(self.stamps) - 1)


def _trainer(
    work: Work, dtype: str, steps: int, device: str, model: nn.Module
) -> Callable[[], tuple[float, float]]:
    """Our trainer as a user runs it: seconds of a step and the mean loss."""
    ids = work.ids().tolist()
    trainer_class: Any = RewardTrainer if work.kind == "RM" else SFTTrainer
    config_class: Any = RewardConfig if work.kind == "RM" else SFTConfig
    records = [
        {"chosen_ids": sides[0], "rejected_ids": sides[1]}
        if work.kind == "RM"
        else {"input_ids": sides[0]}
        for sides in zip(*ids, strict=True)
    ]

    def run() -> tuple[float, float]:
        clock = _Clock()
        with tempfile.TemporaryDirectory() as folder:
            args = config_class(
                output_dir=folder,
                per_device_train_batch_size=work.batch,
                max_steps=steps + 1,
                max_length=work.length,
                learning_rate=LEARNING_RATE,
                lr_scheduler_type="constant",
                save_strategy="no",
                logging_steps=10_000,
                disable_tqdm=True,
                dtype=DTYPES[dtype],
                device=device,
            )
            trainer = trainer_class(
                model,
                args,
                train_dataset=records,
                processing_class=Tokenizer.bytes(),
                callbacks=[clock],
            )
            with contextlib.redirect_stderr(io.StringIO()):  # its progress is not ours
                output = trainer.train()
        return clock.seconds(), output.training_loss

    return run


def _plain(
    work: Work, dtype: str, steps: int, device: str, like: Any
) -> Callable[[], tuple[float, float]]:
    """A loop over a transformers model that does nothing but train."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    name = "SequenceClassification" if work.kind == "RM" else "CausalLM"
    auto = getattr(transformers, f"AutoModelFor{name}")
    with tempfile.TemporaryDirectory() as folder:
        like.save_pretrained(folder)
        model = auto.from_pretrained(folder, dtype=torch.float32).to(device).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True
    )
    ids = work.ids().flatten(0, 1).to(device)
    narrow = getattr(torch, dtype)

    def step() -> Tensor:
        with torch.autocast(device, narrow, enabled=dtype != "float32"):
            loss = _loss(model, ids, work)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def run() -> tuple[float, float]:
        clock, losses = _Clock(), []
        for _ in range(steps + 1):
            losses.append(float(step()))
            clock.on_step_end()
        return clock.seconds(), sum(losses) / len(losses)

    return run


def _loss(model: Any, ids: Tensor, work: Work) -> Tensor:
    if work.kind == "SFT":
        return model(input_ids=ids, labels=ids, use_cache=False).loss
    scores = model(input_ids=ids, use_cache=False).logits.squeeze(-1).float()
    return -F.logsigmoid(scores[: work.batch] - scores[work.batch :]).mean()

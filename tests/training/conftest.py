"""Tiny trainers of each kind, runs in folders, and what is equal about two of them."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from fastllm import (
    GRPOConfig,
    GRPOTrainer,
    ModelConfig,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
    Transformer,
)
from fastllm.data.tokenizer import Tokenizer
from fastllm.model.weights import save_model

# Timings differ from run to run; everything else must not.
TIMINGS = ("tokens_per_second",)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors this small are slower on two threads than on one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.bytes()


@pytest.fixture
def model_config(tokenizer: Tokenizer) -> ModelConfig:
    return ModelConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


@pytest.fixture
def wide_config(model_config: ModelConfig) -> ModelConfig:
    """With heads of a size that models have: for what runs on a GPU, or as if on one."""
    sizes = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 3, "head_dim": 64}
    return replace(model_config, layer_types=None, **sizes)


@pytest.fixture
def base(model_config: ModelConfig, tokenizer: Tokenizer, tmp_path: Path) -> str:
    """Folder of a random language model with its tokenizer."""
    folder = tmp_path / "base"
    save_model(Transformer(replace(model_config, initializer_range=0.3)), folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def items() -> list[dict[str, str]]:
    """Ten demonstrations of very different lengths."""
    return [
        {"prompt": f"{'ab' * (i % 3)}{i}?", "completion": "yes" * (i % 4 + 1)} for i in range(10)
    ]


@pytest.fixture
def pairs() -> list[dict[str, str]]:
    """Ten pairs: a digit is better than a letter."""
    return [
        {"prompt": "q" * (i % 3), "chosen": f"{i}", "rejected": "abcdefghij"[i]} for i in range(10)
    ]


def count_digits(completions: list[str], **_: Any) -> list[float]:
    """A reward for tests: the share of bytes below 'A'."""
    return [sum(c < "A" for c in text) / max(1, len(text)) for text in completions]


@pytest.fixture
def digits() -> Callable[..., list[float]]:
    return count_digits


@pytest.fixture
def make(
    model_config: ModelConfig,
    tokenizer: Tokenizer,
    items: list[dict[str, str]],
    pairs: list[dict[str, str]],
    tmp_path: Path,
) -> Callable[..., Any]:
    """`make(kind, model=None, run="run", callbacks=(), **config)`: a trainer on tiny data."""

    def build(
        kind: str,
        model: Any = None,
        run: str = "run",
        callbacks: Any = (),
        peft_config: Any = None,
        data: Any = None,
        reward_funcs: Any = count_digits,
        eval_dataset: Any = None,
        **config: Any,
    ) -> Any:
        common = {
            "output_dir": str(tmp_path / run),
            "use_cpu": True,
            "per_device_train_batch_size": 4,
            "learning_rate": 0.01,
            "max_steps": 4,
            "logging_steps": 1,
            "save_strategy": "no",
        }
        rest = {
            "processing_class": tokenizer,
            "callbacks": callbacks,
            "peft_config": peft_config,
            "eval_dataset": eval_dataset,
        }
        model = model_config if model is None else model
        if kind == "sft":
            return SFTTrainer(model, SFTConfig(**common | config), data or items, **rest)
        if kind == "rm":
            return RewardTrainer(model, RewardConfig(**common | config), data or pairs, **rest)
        sampling = {"num_generations": 2, "max_completion_length": 5}
        args = GRPOConfig(**common | sampling | config)
        prompts = data or [{"prompt": str(i)} for i in range(5)]
        return GRPOTrainer(model, reward_funcs, args, prompts, **rest)

    return build


@pytest.fixture
def fingerprint() -> Callable[[nn.Module], str]:
    """SHA-256 of every tensor of a model."""

    def digest(model: nn.Module) -> str:
        content = hashlib.sha256()
        for name, tensor in sorted(model.state_dict().items()):
            content.update(name.encode() + tensor.contiguous().numpy().tobytes())
        return content.hexdigest()

    return digest


@pytest.fixture
def metrics() -> Callable[[str | Path], list[dict[str, Any]]]:
    """The lines of a run's metrics.jsonl, without what a clock measured."""

    def read(run: str | Path) -> list[dict[str, Any]]:
        lines = (Path(run) / "metrics.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        return [
            {k: v for k, v in r.items() if k not in TIMINGS and not k.startswith("time/")}
            for r in records
        ]

    return read


@pytest.fixture
def trl_trainer() -> Callable[..., Any]:
    """`trl_trainer(config, logps)`: TRL's GRPOTrainer with nothing but what its loss reads.

    `logps(model, input_ids, attention_mask, logits_to_keep, ...)` takes the place of its forward
    pass: log-probabilities, entropies and no auxiliary loss.
    """
    trl = pytest.importorskip("trl")

    def build(config: GRPOConfig, logps: Callable[..., Any]) -> Any:
        trainer = object.__new__(trl.GRPOTrainer)
        settings = {
            "beta": config.beta,
            "loss_type": config.loss_type,
            "importance_sampling_level": config.importance_sampling_level,
            "epsilon_low": config.epsilon,
            "epsilon_high": config.epsilon if config.epsilon_high is None else config.epsilon_high,
            "max_completion_length": config.max_completion_length,
            "top_entropy_quantile": 1.0,
            "off_policy_mask_threshold": None,
            "aux_loss_enabled": False,
            "use_vllm": False,
            "_entropy_bonus_enabled": False,
            "current_gradient_accumulation_steps": config.gradient_accumulation_steps,
            "model": SimpleNamespace(training=True),
            "args": SimpleNamespace(
                delta=config.delta,
                use_bias_correction_kl=True,
                steps_per_generation=config.passes_per_rollout,
            ),
            "accelerator": SimpleNamespace(
                num_processes=1, gather=lambda t: t, reduce=lambda t, reduction: t
            ),
            "_metrics": {"train": defaultdict(list), "eval": defaultdict(list)},
            "_get_per_token_logps_and_entropies": logps,
        }
        for name, value in settings.items():
            setattr(trainer, name, value)
        return trainer

    return build

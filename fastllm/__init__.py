"""fastllm: a kernel-accelerated engine for LLM post-training (SFT, reward models, GRPO)."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# Public names and where they live. They are imported on first use, so that the command line
# answers `--help` without loading torch.
_HOMES = {
    "BestCompletion": ".training.selection",
    "Completion": ".generation",
    "Engine": ".generation",
    "Example": ".data.examples",
    "GRPOConfig": ".training.config",
    "GRPOTrainer": ".training.grpo",
    "LoraConfig": ".model.lora_config",
    "ModelConfig": ".model.config",
    "PackedLayout": ".layout",
    "PreferenceDataset": ".data.preference",
    "RewardConfig": ".training.config",
    "RewardDataCollator": ".data.preference",
    "RewardModel": ".model.reward",
    "RewardTrainer": ".training.rm",
    "SFTConfig": ".training.config",
    "SFTTrainer": ".training.sft",
    "SamplingParams": ".generation",
    "Tokenizer": ".data.tokenizer",
    "Transformer": ".model.transformer",
    "best_of_n": ".training.selection",
    "format_example": ".data.examples",
    "generate": ".generation",
    "load_reward_model": ".training.rm",
    "train_grpo": ".training.grpo",
    "train_rm": ".training.rm",
    "train_sft": ".training.sft",
}
_MODULES = ("data", "generation", "kernels", "layout", "model", "ops", "training")

__all__ = [*_HOMES, *_MODULES, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f".{name}", __name__)
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)

"""A small language model and a small reward model, in memory and on disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastllm import ModelConfig, RewardModel, Transformer
from fastllm.model.weights import save_model


@pytest.fixture
def sizes() -> dict[str, Any]:
    """A model that is small in every way."""
    return {
        "vocab_size": 40,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }


@pytest.fixture
def model(sizes: dict[str, Any]) -> Transformer:
    return Transformer(ModelConfig(**sizes, eos_token_id=2, pad_token_id=0))


@pytest.fixture
def reward_model(sizes: dict[str, Any]) -> RewardModel:
    return RewardModel(ModelConfig(**sizes, eos_token_id=2, pad_token_id=0))


@pytest.fixture
def folder(model: Transformer, tmp_path: Path) -> Path:
    """A saved language model."""
    save_model(model, tmp_path / "saved")
    return tmp_path / "saved"


@pytest.fixture
def change_config(folder: Path) -> Callable[..., None]:
    """Set keys of the saved config.json; None removes one."""

    def change(**changes: Any) -> None:
        raw = json.loads((folder / "config.json").read_text()) | changes
        raw = {key: value for key, value in raw.items() if value is not None}
        (folder / "config.json").write_text(json.dumps(raw))

    return change


@pytest.fixture
def change_tensors(folder: Path) -> Callable[[Callable[[dict[str, Tensor]], None]], None]:
    """Edit the saved tensors in place."""

    def change(edit: Callable[[dict[str, Tensor]], None]) -> None:
        tensors = load_file(folder / "model.safetensors")
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        edit(tensors)
        save_file(tensors, folder / "model.safetensors")

    return change


@pytest.fixture
def assert_same() -> Callable[[nn.Module, nn.Module], None]:
    """Two models have the same tensors, bit for bit."""

    def check(one: nn.Module, other: nn.Module) -> None:
        expected, found = one.state_dict(), other.state_dict()
        assert expected.keys() == found.keys()
        for name, value in expected.items():
            assert torch.equal(value, found[name]), name

    return check

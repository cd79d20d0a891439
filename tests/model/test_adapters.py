"""Adapters on disk, and the base models that they go on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from fastllm import ModelConfig, RewardModel, Transformer
from fastllm.model.adapters import load_adapter, save_adapter
from fastllm.model.lora import LoraConfig, add_lora, merge_lora
from fastllm.model.weights import load_model, save_model, save_pt

Same = Callable[[nn.Module, nn.Module], None]


def adapted(model: nn.Module, **settings: Any) -> nn.Module:
    add_lora(model, LoraConfig(**{"r": 3, "target_modules": ["q_proj", "up_proj"]} | settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    return model.eval()


def test_adapter_round_trip(folder: Path, tmp_path: Path, assert_same: Same) -> None:
    model = adapted(load_model(folder, Transformer), lora_alpha=7, use_rslora=True)
    save_adapter(model, tmp_path / "adapter", folder)
    again = load_model(tmp_path / "adapter", Transformer)
    assert_same(model, again)
    assert again.lora_config.scaling == model.lora_config.scaling
    keys = load_file(tmp_path / "adapter/adapter_model.safetensors").keys()
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in keys
    assert len(keys) == 8
    stored = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert stored["base_model_name_or_path"] == str(folder)
    assert (stored["task_type"], stored["modules_to_save"]) == ("CAUSAL_LM", None)


def test_adapters_are_not_in_the_weights(folder: Path, tmp_path: Path, assert_same: Same) -> None:
    model = adapted(load_model(folder, Transformer))
    save_model(model, tmp_path / "again")
    assert_same(load_model(tmp_path / "again", Transformer), load_model(folder, Transformer))
    save_pt(model, tmp_path / "x.pt")
    assert_same(load_model(tmp_path / "x.pt", Transformer), load_model(folder, Transformer))


def test_adapter_on_an_adapter(folder: Path, tmp_path: Path, assert_same: Same) -> None:
    """The first one is merged into the base of the second one."""
    first = adapted(load_model(folder, Transformer))
    save_adapter(first, tmp_path / "first", folder)
    merge_lora(first)
    second = adapted(first, target_modules=["down_proj"])
    save_adapter(second, tmp_path / "second", tmp_path / "first")
    assert_same(second, load_model(tmp_path / "second", Transformer))


def test_base_of_an_adapter(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, assert_same: Same
) -> None:
    model = adapted(load_model(folder, Transformer))
    save_adapter(model, tmp_path / "adapter", folder)
    path = tmp_path / "adapter/adapter_config.json"
    raw = json.loads(path.read_text())
    path.write_text(json.dumps(raw | {"base_model_name_or_path": "somebody/model"}))
    with pytest.raises(ValueError, match="its base model 'somebody/model' is not on this machine"):
        load_model(tmp_path / "adapter", Transformer)
    assert_same(model, load_model(tmp_path / "adapter", Transformer, base=folder))
    path.write_text(json.dumps(raw | {"base_model_name_or_path": "../saved"}))
    assert_same(model, load_model(tmp_path / "adapter", Transformer))


def test_reward_adapter_onto_a_reward_model(
    reward_model: RewardModel, tmp_path: Path, assert_same: Same
) -> None:
    reward_model.save_pretrained(tmp_path / "base")
    model = adapted(load_model(tmp_path / "base", RewardModel))
    with torch.no_grad():
        model.score.weight.add_(1.0)
    save_adapter(model, tmp_path / "adapter", tmp_path / "base")
    assert_same(model, load_model(tmp_path / "adapter", RewardModel))
    stored = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert (stored["task_type"], stored["modules_to_save"]) == ("SEQ_CLS", ["score"])
    with pytest.raises(ValueError, match="expected a language model, found a reward model"):
        load_model(tmp_path / "adapter", Transformer)


def test_reward_adapter_brings_pad_token_and_head(
    tmp_path: Path, sizes: dict[str, Any], assert_same: Same
) -> None:
    Transformer(ModelConfig(**sizes)).save_pretrained(tmp_path / "base")
    model = load_model(tmp_path / "base", RewardModel, new_head=True)
    model.config.pad_token_id = 7
    save_adapter(adapted(model), tmp_path / "adapter", tmp_path / "base")
    again = load_model(tmp_path / "adapter", RewardModel)
    assert again.config.pad_token_id == 7
    assert_same(model, again)


def test_adapter_where_a_whole_model_is(folder: Path) -> None:
    model = adapted(load_model(folder, Transformer))
    with pytest.raises(ValueError, match="expected a folder without a whole model"):
        save_adapter(model, folder, folder)
    with pytest.raises(ValueError, match="the model has no adapters"):
        save_adapter(load_model(folder, Transformer), folder, folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3' is not supported"),
        ({"use_dora": True}, "use_dora True is not supported"),
        ({"bias": "all"}, "bias 'all' is not supported"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save \['lm_head'\] is not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa' is not supported"),
        ({"r": "4"}, "expected numbers for r and lora_alpha"),
        ({"target_modules": ".*proj"}, "expected a list of names or 'all-linear', found '.*proj'"),
        ({"target_modules": ["lm_head"]}, "target_modules"),
        ({"r": 2}, r"lora_A\.weight: expected shape \[2, 16\], found \[3, 16\]"),
        ({"target_modules": ["q_proj", "k_proj", "up_proj"]}, r"the adapter misses .*k_proj"),
        ({"target_modules": ["q_proj"]}, r"has unexpected .*up_proj"),
    ],
)
def test_adapters_that_are_refused(
    changes: dict[str, Any], message: str, folder: Path, tmp_path: Path
) -> None:
    model = adapted(load_model(folder, Transformer))
    save_adapter(model, tmp_path / "adapter", folder)
    path = tmp_path / "adapter/adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError, match=message):
        load_adapter(load_model(folder, Transformer), tmp_path / "adapter")

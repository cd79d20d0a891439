"""Folders that hold no model of ours are refused, each with one line that says why."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fastllm import ModelConfig, RewardModel, Transformer
from fastllm.model.weights import load_model, save_model

Same = Callable[[nn.Module, nn.Module], None]


def test_language_model_as_reward_model(folder: Path, assert_same: Same) -> None:
    with pytest.raises(ValueError, match=r"expected a reward model, found a language model.*new_h"):
        load_model(folder, RewardModel)
    torch.manual_seed(3)
    first = load_model(folder, RewardModel, new_head=True)
    second = load_model(folder, RewardModel, new_head=True)
    assert first.score.weight.shape == (1, 16)
    assert 0.005 < first.score.weight.std() < 0.05
    assert not torch.equal(first.score.weight, second.score.weight)
    torch.manual_seed(3)
    assert_same(first, load_model(folder, RewardModel, new_head=True))
    assert_same(first.model, load_model(folder, Transformer).model)


def test_tied_language_model_as_reward_model(
    tmp_path: Path, sizes: dict[str, Any], assert_same: Same
) -> None:
    model = Transformer(ModelConfig(**sizes, tie_word_embeddings=True))
    model.save_pretrained(tmp_path)
    assert_same(load_model(tmp_path, RewardModel, new_head=True).model, model.model)


def test_reward_model_as_language_model(
    reward_model: RewardModel, tmp_path: Path, assert_same: Same
) -> None:
    reward_model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="expected a language model, found a reward model"):
        load_model(tmp_path, Transformer)
    again = load_model(tmp_path, RewardModel, new_head=True)
    assert_same(again, reward_model)  # it has a head already, and keeps it


def test_kind_without_architectures(
    folder: Path, change_config: Callable[..., None], model: Transformer, assert_same: Same
) -> None:
    change_config(architectures=None)
    assert_same(model, load_model(folder, Transformer))
    with pytest.raises(ValueError, match="expected a reward model"):
        load_model(folder, RewardModel)


@pytest.mark.parametrize(
    ("name", "kept"),
    [("LlamaModel", "found 'LlamaModel'"), ("Qwen2ForCausalLM", "found 'Qwen2ForCausalLM'")],
)
def test_other_architectures(
    name: str, kept: str, folder: Path, change_config: Callable[..., None]
) -> None:
    change_config(architectures=[name])
    with pytest.raises(ValueError, match="LlamaForCausalLM or LlamaForSequenceClass") as error:
        load_model(folder, Transformer)
    assert kept in str(error.value)


@pytest.mark.parametrize("labels", [{"num_labels": 2}, {"id2label": {"0": "a", "1": "b"}}])
def test_two_labels(labels: dict[str, Any], reward_model: RewardModel, tmp_path: Path) -> None:
    reward_model.save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    del raw["num_labels"], raw["id2label"]
    (tmp_path / "config.json").write_text(json.dumps(raw | labels))
    with pytest.raises(ValueError, match="a reward model has num_labels 1, found 2"):
        load_model(tmp_path, RewardModel)


def test_two_scores(reward_model: RewardModel, tmp_path: Path) -> None:
    reward_model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["score.weight"] = torch.zeros(2, 16)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"score.weight: expected shape \[1, 16\], found \[2, 16"):
        load_model(tmp_path, RewardModel)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "model_type must be one of llama, mistral, qwen2, qwen3, found"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_type.*found 'yarn'"),
        ({"rope_parameters": {"rope_type": "linear"}}, "needs a number for 'factor'"),
        ({"rope_parameters": {"rope_type": ["linear"]}}, "rope_type must be text"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is not"),
        ({"rope_parameters": [1]}, "rotary settings must be an object"),
        ({"hidden_act": "gelu"}, "hidden_act must be 'silu', found 'gelu'"),
        ({"hidden_size": None}, "missing hidden_size"),
        ({"hidden_size": "16"}, "hidden_size must be a positive whole number, found '16'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be a positive whole number"),
        ({"num_attention_heads": True}, "num_attention_heads must be a positive whole number"),
        ({"num_key_value_heads": 3}, "no multiple"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps must be a positive number"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is not supported"),
        ({"num_experts": 8}, "num_experts is not supported"),
    ],
)
def test_configs_that_are_refused(
    changes: dict[str, Any], message: str, folder: Path, change_config: Callable[..., None]
) -> None:
    change_config(**changes)
    with pytest.raises(ValueError, match=message) as error:
        load_model(folder, Transformer)
    assert str(folder / "config.json") in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[1]", "[" * 100_000, '"x"'])
def test_config_that_is_no_json_object(text: str, folder: Path) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json: (not JSON|expected a JSON object)"):
        load_model(folder, Transformer)


def test_layer_types_that_are_refused(sizes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="layer_types: chunked_attention is not supported"):
        ModelConfig(**sizes, layer_types=["full_attention", "chunked_attention"])


def test_missing_and_unexpected_tensors(folder: Path, change_tensors: Callable[..., None]) -> None:
    change_tensors(lambda tensors: tensors.update({"model.extra": torch.zeros(1)}))
    with pytest.raises(ValueError, match=r"the checkpoint has unexpected model\.extra$"):
        load_model(folder, Transformer)
    change_tensors(lambda t: [t.pop("model.norm.weight"), t.pop("lm_head.weight")])
    with pytest.raises(ValueError, match=r"misses lm_head\.weight, model\.norm\.weight$"):
        load_model(folder, Transformer)


def test_missing_tensors_are_counted(folder: Path, change_tensors: Callable[..., None]) -> None:
    change_tensors(lambda t: [t.pop(name) for name in list(t) if "layers.1" in name])
    with pytest.raises(ValueError, match=r"layers\.1\.input_layernorm\.weight, .* and 4 more"):
        load_model(folder, Transformer)


def test_head_of_a_tied_model(
    folder: Path, change_config: Callable[..., None], change_tensors: Callable[..., None]
) -> None:
    change_config(tie_word_embeddings=True)
    with pytest.raises(ValueError, match=r"lm_head\.weight is not the embedding table"):
        load_model(folder, Transformer)
    change_tensors(lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    load_model(folder, Transformer)  # spelled out, and the same
    change_tensors(lambda t: t.pop("lm_head.weight"))
    load_model(folder, Transformer)
    change_config(tie_word_embeddings=False)
    with pytest.raises(ValueError, match=r"misses lm_head\.weight"):
        load_model(folder, Transformer)


def test_wrong_shape(folder: Path, change_tensors: Callable[..., None]) -> None:
    name = "model.layers.0.self_attn.k_proj.weight"
    change_tensors(lambda tensors: tensors.update({name: torch.zeros(4, 16)}))
    with pytest.raises(ValueError, match=r"k_proj\.weight: expected shape \[8, 16\], found \[4, 1"):
        load_model(folder, Transformer)


def test_old_rotary_buffers_are_ignored(
    folder: Path, change_tensors: Callable[..., None], model: Transformer, assert_same: Same
) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    change_tensors(lambda tensors: tensors.update({name: torch.ones(2)}))
    assert_same(model, load_model(folder, Transformer))


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_cut_safetensors(keep: int, folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:keep])
    with pytest.raises(ValueError, match=r"model\.safetensors: not a whole safetensors file"):
        load_model(folder, Transformer)


@pytest.mark.parametrize(
    "shard",
    ["../victim/x.safetensors", "/etc/x.safetensors", "a\\x.safetensors", "x.bin", 3, "", ".."],
)
def test_shards_elsewhere_are_refused(shard: object, model: Transformer, tmp_path: Path) -> None:
    save_model(model, tmp_path / "victim")
    (tmp_path / "victim/model.safetensors").rename(tmp_path / "victim/x.safetensors")
    save_model(model, tmp_path / "model", max_shard_size=2000)
    path = tmp_path / "model/model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] = {name: shard for name in index["weight_map"]}
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"must be a \.safetensors file beside the index"):
        load_model(tmp_path / "model", Transformer)


def test_index_and_shards_that_disagree(model: Transformer, tmp_path: Path) -> None:
    save_model(model, tmp_path, max_shard_size=2000)
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    first = index["weight_map"]["lm_head.weight"]
    (tmp_path / first).rename(tmp_path / "gone")
    with pytest.raises(ValueError, match=f"its shard {first} is not there"):
        load_model(tmp_path, Transformer)
    (tmp_path / "gone").rename(tmp_path / first)
    index["weight_map"]["model.more.weight"] = first
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"no shard holds model\.more\.weight"):
        load_model(tmp_path, Transformer)
    path.write_text("{}")
    with pytest.raises(ValueError, match="expected an object 'weight_map'"):
        load_model(tmp_path, Transformer)

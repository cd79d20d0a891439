"""Models on disk: what is written, what is accepted, and what is refused with which words."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastllm import ModelConfig, RewardModel, Transformer
from fastllm.model import weights
from fastllm.model.adapters import load_adapter, save_adapter
from fastllm.model.lora import LoraConfig, add_lora, merge_lora
from fastllm.model.weights import load_model, resolve, save_model, save_pt, tokenizer_in

SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.fixture
def model() -> Transformer:
    return Transformer(ModelConfig(**SIZES, eos_token_id=2, pad_token_id=0))


@pytest.fixture
def reward_model() -> RewardModel:
    return RewardModel(ModelConfig(**SIZES, eos_token_id=2, pad_token_id=0))


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


def assert_same(one: nn.Module, other: nn.Module) -> None:
    expected, found = one.state_dict(), other.state_dict()
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(value, found[name]), name


# -- writing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_round_trip(tied: bool, tmp_path: Path) -> None:
    model = Transformer(ModelConfig(**SIZES, tie_word_embeddings=tied))
    model.save_pretrained(tmp_path)
    again = Transformer.from_pretrained(tmp_path)
    assert_same(model, again)
    assert (again.lm_head.weight is again.model.embed_tokens.weight) is tied
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) is not tied
    assert all(p.requires_grad and p.is_leaf for p in again.parameters())
    assert not again.training


def test_reward_model_round_trip(reward_model: RewardModel, tmp_path: Path) -> None:
    reward_model.save_pretrained(tmp_path)
    again = RewardModel.from_pretrained(tmp_path)
    assert_same(reward_model, again)
    assert again.config == RewardModel.from_pretrained(tmp_path).config
    ids = torch.tensor([[5, 6, 7, 0], [8, 0, 0, 0]])
    assert torch.equal(again(ids), reward_model.eval()(ids))


def test_keys_of_others_are_written_back_but_not_code(
    folder: Path, change_config: Callable[..., None], tmp_path: Path
) -> None:
    change_config(use_cache=True, auto_map={"AutoModel": "evil.Model"}, _name_or_path="x")
    load_model(folder, Transformer).save_pretrained(tmp_path / "again")
    raw = json.loads((tmp_path / "again/config.json").read_text())
    assert raw["use_cache"] is True
    assert not {"auto_map", "_name_or_path"} & raw.keys()


def test_a_language_model_forgets_the_head_of_a_reward_model(
    reward_model: RewardModel, tmp_path: Path
) -> None:
    reward_model.save_pretrained(tmp_path / "reward")
    config = RewardModel.from_pretrained(tmp_path / "reward").config
    Transformer(config).save_pretrained(tmp_path / "policy")
    raw = json.loads((tmp_path / "policy/config.json").read_text())
    assert not {"num_labels", "id2label", "sbert_ce_default_activation_function"} & raw.keys()


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_files_have_normal_permissions(model: Transformer, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        save_model(model, tmp_path / "shards", max_shard_size=2000)
        save_pt(model, tmp_path / "model_final.pt")
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 4
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o640}


def test_safetensors_metadata(folder: Path) -> None:
    with safe_open(str(folder / "model.safetensors"), framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_shards(model: Transformer, tmp_path: Path) -> None:
    save_model(model, tmp_path, max_shard_size=2000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    total = sum(t.nbytes for t in model.state_dict().values())
    assert index["metadata"]["total_size"] == total
    shards = sorted(set(index["weight_map"].values()))
    assert shards == sorted(path.name for path in tmp_path.glob("model-*"))
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    for shard in shards:  # one tensor may be larger than a shard
        tensors = load_file(tmp_path / shard)
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= 2000
    assert_same(model, load_model(tmp_path, Transformer))


def test_saving_again_leaves_nothing_of_the_old_model(model: Transformer, tmp_path: Path) -> None:
    save_model(model, tmp_path, max_shard_size=2000)
    other = Transformer(model.config)
    save_model(other, tmp_path)
    assert [path.name for path in tmp_path.glob("model*")] == ["model.safetensors"]
    assert_same(other, load_model(tmp_path, Transformer))
    save_model(model, tmp_path, max_shard_size=9000)
    assert not (tmp_path / "model.safetensors").exists()
    assert_same(model, load_model(tmp_path, Transformer))
    assert not list(tmp_path.glob(".*")), "temporary files are left"


def test_saving_over_the_folder_it_came_from(folder: Path, model: Transformer) -> None:
    loaded = load_model(folder, Transformer)
    with torch.no_grad():
        loaded.lm_head.weight.add_(1.0)
    expected = {name: value.clone() for name, value in loaded.state_dict().items()}
    save_model(loaded, folder)
    for name, value in load_model(folder, Transformer).state_dict().items():
        assert torch.equal(value, expected[name]), name
        assert torch.equal(loaded.state_dict()[name], expected[name]), name


def test_a_failed_save_keeps_the_old_file(
    folder: Path, model: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fastllm.model.tensors.save_file", fail)
    with pytest.raises(OSError, match="No space"):
        save_model(Transformer(model.config), folder)
    assert_same(model, load_model(folder, Transformer))


def test_a_model_without_random_numbers(folder: Path) -> None:
    """Loading draws none, so it neither takes time nor changes what comes after."""
    before = torch.get_rng_state()
    load_model(folder, Transformer)
    assert torch.equal(torch.get_rng_state(), before)


# -- dtypes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(stored: torch.dtype, model: Transformer, tmp_path: Path) -> None:
    model.to(stored).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == str(stored)[6:]
    for asked, expected in (
        (None, stored),
        ("auto", stored),
        ("float32", torch.float32),
        (torch.bfloat16, torch.bfloat16),
    ):
        found = load_model(tmp_path, Transformer, dtype=asked)
        assert {p.dtype for p in found.parameters()} == {expected}


def test_mixed_dtypes_become_the_widest(
    folder: Path, change_tensors: Callable[..., None], model: Transformer
) -> None:
    def edit(tensors: dict[str, Tensor]) -> None:
        for name in tensors:
            if "norm" not in name:
                tensors[name] = tensors[name].bfloat16()

    change_tensors(edit)
    found = load_model(folder, Transformer)
    assert {p.dtype for p in found.parameters()} == {torch.float32}


def test_dtypes_that_are_refused(folder: Path, change_tensors: Callable[..., None]) -> None:
    with pytest.raises(ValueError, match=r"expected 'auto' or a float dtype.*'int8'"):
        load_model(folder, Transformer, dtype="int8")
    change_tensors(lambda t: t.update({"lm_head.weight": t["lm_head.weight"].to(torch.int8)}))
    with pytest.raises(ValueError, match=r"lm_head.weight is torch.int8"):
        load_model(folder, Transformer)


# -- where a model is ------------------------------------------------------------------------------


def test_resolve(model: Transformer, folder: Path, tmp_path: Path) -> None:
    assert resolve(str(folder)) == folder
    run = tmp_path / "run"
    save_pt(model, run / "model_last.pt")
    assert resolve(run) == run / "model_last.pt"
    save_pt(model, run / "model_final.pt")
    assert resolve(run) == run / "model_final.pt"
    assert resolve(run / "model_last.pt") == run / "model_last.pt"
    save_model(model, run)
    assert resolve(run) == run
    save_model(model, run / "checkpoint-20")
    assert resolve(run / "checkpoint-20") == run / "checkpoint-20"


def _touch(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


@pytest.mark.parametrize(
    ("names", "found"),
    [
        ([], "found nothing there"),
        (["folder/"], "found an empty folder"),
        (["notes.txt", "data.jsonl"], "found data.jsonl, notes.txt"),
        (["config.json"], "found config.json"),
        (["pytorch_model.bin", "config.json"], "which is a pickle and not read"),
        (["checkpoint-9/config.json", "checkpoint-10/config.json"], "checkpoint-10"),
        ([f"f{i}" for i in range(8)], "and 3 more"),
    ],
)
def test_no_model_there(names: list[str], found: str, tmp_path: Path) -> None:
    place = tmp_path / "place"
    for name in names:
        if name.endswith("/"):
            place.mkdir()
        else:
            _touch(place / name)
    with pytest.raises(ValueError, match="expected a run folder, a checkpoint-N folder") as error:
        load_model(place, Transformer)
    assert str(place) in str(error.value)
    assert found in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_is_no_model(folder: Path) -> None:
    with pytest.raises(ValueError, match="found a file of another kind"):
        load_model(folder / "model.safetensors", Transformer)


# -- what does not fit -----------------------------------------------------------------------------


def test_language_model_as_reward_model(folder: Path) -> None:
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


def test_tied_language_model_as_reward_model(tmp_path: Path) -> None:
    model = Transformer(ModelConfig(**SIZES, tie_word_embeddings=True))
    model.save_pretrained(tmp_path)
    assert_same(load_model(tmp_path, RewardModel, new_head=True).model, model.model)


def test_reward_model_as_language_model(reward_model: RewardModel, tmp_path: Path) -> None:
    reward_model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="expected a language model, found a reward model"):
        load_model(tmp_path, Transformer)
    again = load_model(tmp_path, RewardModel, new_head=True)
    assert_same(again, reward_model)  # it has a head already, and keeps it


def test_kind_without_architectures(
    folder: Path, change_config: Callable[..., None], model: Transformer
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


def test_layer_types_that_are_refused() -> None:
    with pytest.raises(ValueError, match="layer_types: chunked_attention is not supported"):
        ModelConfig(**SIZES, layer_types=["full_attention", "chunked_attention"])


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
    folder: Path, change_tensors: Callable[..., None], model: Transformer
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


# -- .pt files -------------------------------------------------------------------------------------


def test_pt_round_trip(model: Transformer, reward_model: RewardModel, tmp_path: Path) -> None:
    save_pt(model, tmp_path / "model_last.pt", tokenizer_json='{"a": 1}')
    save_pt(reward_model, tmp_path / "model_final.pt")
    assert_same(model, Transformer.from_pretrained(tmp_path / "model_last.pt"))
    assert_same(reward_model, RewardModel.from_pretrained(tmp_path / "model_final.pt"))
    assert tokenizer_in(tmp_path / "model_last.pt") == '{"a": 1}'
    assert tokenizer_in(tmp_path / "model_final.pt") is None
    content = torch.load(tmp_path / "model_last.pt", weights_only=True)
    assert content.keys() == {"format", "kind", "config", "model", "tokenizer"}
    assert content["kind"] == "transformer"
    assert content["config"]["architectures"] == ["LlamaForCausalLM"]


def test_tied_pt(tmp_path: Path) -> None:
    model = Transformer(ModelConfig(**SIZES, tie_word_embeddings=True))
    save_pt(model, tmp_path / "x.pt")
    again = load_model(tmp_path / "x.pt", Transformer)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert_same(model, again)


def test_pt_of_the_other_kind(
    model: Transformer, reward_model: RewardModel, tmp_path: Path
) -> None:
    save_pt(model, tmp_path / "policy.pt")
    save_pt(reward_model, tmp_path / "reward.pt")
    with pytest.raises(ValueError, match="expected a reward model, found a language model"):
        load_model(tmp_path / "policy.pt", RewardModel)
    with pytest.raises(ValueError, match="expected a language model, found a reward model"):
        load_model(tmp_path / "reward.pt", Transformer)
    started = load_model(tmp_path / "policy.pt", RewardModel, new_head=True)
    assert_same(started.model, model.model)


class Malicious:
    """What a hostile pickle would run."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("pwned",)


@pytest.mark.parametrize(
    "content",
    [
        {"model": {}, "optimizer": {}},
        {"format": 2, "kind": "transformer"},
        {"format": 1, "kind": "gpt", "config": {}, "model": {}, "tokenizer": None},
        {"format": 1, "kind": "reward", "config": {}, "model": {"a": 1}, "tokenizer": None},
        [1, 2],
        torch.zeros(2),
        Malicious(),
    ],
    ids=["foreign", "format", "kind", "state", "list", "tensor", "malicious"],
)
def test_pt_that_is_not_ours(
    content: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"x\.pt: expected a model file of fastllm") as error:
        load_model(tmp_path / "x.pt", Transformer)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "pwned").exists()


def test_damaged_pt(model: Transformer, tmp_path: Path) -> None:
    save_pt(model, tmp_path / "x.pt")
    content = (tmp_path / "x.pt").read_bytes()
    for keep in (0, 10, len(content) // 2, len(content) - 5):
        (tmp_path / "x.pt").write_bytes(content[:keep])
        with pytest.raises(ValueError, match="expected a model file of fastllm"):
            load_model(tmp_path / "x.pt", Transformer)


# -- adapters --------------------------------------------------------------------------------------


def adapted(model: nn.Module, **settings: Any) -> nn.Module:
    add_lora(model, LoraConfig(**{"r": 3, "target_modules": ["q_proj", "up_proj"]} | settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    return model.eval()


def test_adapter_round_trip(folder: Path, tmp_path: Path) -> None:
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


def test_adapters_are_not_in_the_weights(folder: Path, tmp_path: Path) -> None:
    model = adapted(load_model(folder, Transformer))
    save_model(model, tmp_path / "again")
    assert_same(load_model(tmp_path / "again", Transformer), load_model(folder, Transformer))
    save_pt(model, tmp_path / "x.pt")
    assert_same(load_model(tmp_path / "x.pt", Transformer), load_model(folder, Transformer))


def test_adapter_on_an_adapter(folder: Path, tmp_path: Path) -> None:
    """The first one is merged into the base of the second one."""
    first = adapted(load_model(folder, Transformer))
    save_adapter(first, tmp_path / "first", folder)
    merge_lora(first)
    second = adapted(first, target_modules=["down_proj"])
    save_adapter(second, tmp_path / "second", tmp_path / "first")
    assert_same(second, load_model(tmp_path / "second", Transformer))


def test_base_of_an_adapter(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_reward_adapter_onto_a_reward_model(reward_model: RewardModel, tmp_path: Path) -> None:
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


def test_reward_adapter_brings_pad_token_and_head(tmp_path: Path) -> None:
    Transformer(ModelConfig(**SIZES)).save_pretrained(tmp_path / "base")
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


def test_one_place_reads_pickles() -> None:
    """Only our own .pt files, and only with weights_only."""
    package = Path(weights.__file__).parents[1]
    for path in package.rglob("*.py"):
        for line in path.read_text(encoding="utf-8").splitlines():
            if "torch.load(" in line or "import pickle" in line or "weights_only=False" in line:
                assert path.name == "pt_file.py", f"{path}: {line}"
                assert "weights_only=True" in line

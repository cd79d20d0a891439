"""Models on disk: what is written, and where one is found."""

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
from safetensors.torch import load_file
from torch import Tensor, nn

from fastllm import ModelConfig, RewardModel, Transformer
from fastllm.model.weights import load_model, resolve, save_model, save_pt

Same = Callable[[nn.Module, nn.Module], None]


# -- writing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_round_trip(tied: bool, tmp_path: Path, sizes: dict[str, Any], assert_same: Same) -> None:
    model = Transformer(ModelConfig(**sizes, tie_word_embeddings=tied))
    model.save_pretrained(tmp_path)
    again = Transformer.from_pretrained(tmp_path)
    assert_same(model, again)
    assert (again.lm_head.weight is again.model.embed_tokens.weight) is tied
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) is not tied
    assert all(p.requires_grad and p.is_leaf for p in again.parameters())
    assert not again.training


def test_reward_model_round_trip(
    reward_model: RewardModel, tmp_path: Path, assert_same: Same
) -> None:
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


def test_shards(model: Transformer, tmp_path: Path, assert_same: Same) -> None:
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


def test_saving_again_leaves_nothing_of_the_old_model(
    model: Transformer, tmp_path: Path, assert_same: Same
) -> None:
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
    folder: Path, model: Transformer, monkeypatch: pytest.MonkeyPatch, assert_same: Same
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

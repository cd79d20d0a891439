"""A model in one `.pt` file, and what else is in files of that name."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fastllm import ModelConfig, RewardModel, Transformer
from fastllm.model import weights
from fastllm.model.weights import load_model, save_pt, tokenizer_in

Same = Callable[[nn.Module, nn.Module], None]


def test_pt_round_trip(
    model: Transformer, reward_model: RewardModel, tmp_path: Path, assert_same: Same
) -> None:
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


def test_tied_pt(tmp_path: Path, sizes: dict[str, Any], assert_same: Same) -> None:
    model = Transformer(ModelConfig(**sizes, tie_word_embeddings=True))
    save_pt(model, tmp_path / "x.pt")
    again = load_model(tmp_path / "x.pt", Transformer)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert_same(model, again)


def test_pt_of_the_other_kind(
    model: Transformer, reward_model: RewardModel, tmp_path: Path, assert_same: Same
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


def test_one_place_reads_pickles() -> None:
    """Only our own .pt files, and only with weights_only."""
    package = Path(weights.__file__).parents[1]
    for path in package.rglob("*.py"):
        for line in path.read_text(encoding="utf-8").splitlines():
            if "torch.load(" in line or "import pickle" in line or "weights_only=False" in line:
                assert path.name == "pt_file.py", f"{path}: {line}"
                assert "weights_only=True" in line

"""The sampler's log-probabilities against the trainer's, for every token that is trained on."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fastllm import Transformer, ops
from fastllm.model.lora import LoraConfig
from fastllm.model.weights import save_model

FAMILIES = {
    "llama": {"tie_word_embeddings": True},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 16},
    # A window that the prompts pass, and the completions slide over.
    "mistral": {"model_type": "mistral", "sliding_window": 6, "layer_types": None},
}
WAYS = {
    "plain": {},
    "unshared": {"share_prefix": False},
    "temperature": {"temperature": 0.6},
    "filtered": {"top_k": 40, "top_p": 0.8, "temperature": 1.3},
    "penalised": {"repetition_penalty": 1.3, "min_p": 0.02},
    "by-tokens": {"max_tokens_per_pass": 40, "num_iterations": 2},
    "early": {"reward_batch_size": 1, "dynamic_sampling_rounds": 1},
}
DATA = [{"prompt": text} for text in ("a", "question: 12+30=", "abcdefg", "xyz " * 5)]


def varied(completion_ids, **_):
    """Hardly two completions have the same: every one is trained on."""
    return [float(sum((i + 3) * token for i, token in enumerate(ids))) for ids in completion_ids]


@pytest.fixture
def build(make, model_config):
    """`build(family, **config)`: a trainer of a random model whose biases are random too."""

    def with_family(family, **config):
        model = Transformer(replace(model_config, initializer_range=0.3, **FAMILIES[family]))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn(parameter.shape)
        options = {
            "data": DATA, "reward_funcs": varied, "per_device_train_batch_size": 16,
            "num_generations": 4, "max_completion_length": 12, "max_steps": 2,
        }  # fmt: skip
        return make("grpo", model, **options | config)

    return with_family


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", FAMILIES)
def test_they_agree_in_fp32(build, metrics, tmp_path, family, way):
    build(family, **WAYS[way]).train()
    for line in metrics(tmp_path / "run"):
        assert line["sampling/sampling_logp_difference/max"] <= 1e-5
        assert 0 <= line["sampling/sampling_logp_difference/mean"] <= 1e-6
        ratios = [line[f"sampling/importance_sampling_ratio/{x}"] for x in ("min", "mean", "max")]
        assert 1 - 1.1e-5 <= ratios[0] <= ratios[1] <= ratios[2] <= 1 + 1.1e-5


@pytest.mark.parametrize("way", WAYS)
def test_they_agree_with_adapters(make, base, metrics, tmp_path, way):
    options = {
        "data": DATA, "reward_funcs": varied, "per_device_train_batch_size": 16,
        "num_generations": 4, "max_completion_length": 12, "max_steps": 3,
    }  # fmt: skip
    trainer = make("grpo", base, peft_config=LoraConfig(r=4), **options | WAYS[way])
    trainer.train()
    for line in metrics(tmp_path / "run"):
        assert line["sampling/sampling_logp_difference/max"] <= 1e-5


def test_int8_weights_show(cpp_kernels, build, metrics, tmp_path):
    build("llama", generation_kwargs={"weights": "int8"}).train()
    for line in metrics(tmp_path / "run"):
        assert 1e-5 < line["sampling/sampling_logp_difference/max"] < 0.5


# -- bit for bit --------------------------------------------------------------------------------


@pytest.fixture
def same_order():
    """Skips where nothing sums in one order."""
    try:
        with ops.same_order():
            pass
    except ValueError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("way", ["plain", "temperature", "filtered", "penalised", "by-tokens"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_in_one_order_they_are_equal(same_order, build, metrics, tmp_path, family, way):
    build(family, deterministic=True, max_steps=4, **WAYS[way]).train()
    lines = metrics(tmp_path / "run")
    assert len(lines) == 4
    for line in lines:
        assert line["sampling/sampling_logp_difference/max"] == 0
        assert line["sampling/importance_sampling_ratio/min"] == 1
        assert line["sampling/importance_sampling_ratio/max"] == 1


def test_in_one_order_they_are_equal_over_many_blocks(
    same_order, make, model_config, metrics, tmp_path
):
    """Prompts and completions longer than a block of the cache, depths longer than a vector."""
    sizes = {"hidden_size": 96, "intermediate_size": 200, "num_attention_heads": 4, "head_dim": 24}
    config = replace(model_config, **sizes, max_position_embeddings=256, initializer_range=0.2)
    data = [
        {"prompt": "long" * 33},
        {"prompt": "x" * 64},
        {"prompt": "short"},
        {"prompt": "y" * 65},
    ]
    make(
        "grpo", Transformer(config), data=data, reward_funcs=varied, per_device_train_batch_size=16,
        num_generations=4, max_completion_length=100, max_steps=2, deterministic=True,
        temperature=0.9, reward_batch_size=4, generation_kwargs={"min_new_tokens": 70},
    ).train()  # fmt: skip
    for line in metrics(tmp_path / "run"):
        assert line["completions/min_length"] >= 70
        assert line["sampling/sampling_logp_difference/max"] == 0


def test_what_is_not_summed_alike_is_refused(build, make, base, model_config, tmp_path):
    with pytest.raises(ValueError, match=r"without sliding windows, found one"):
        build("mistral", deterministic=True)
    with pytest.raises(ValueError, match=r"without adapters \(LoRA\), found one"):
        make("grpo", base, peft_config=LoraConfig(r=2), deterministic=True)
    save_model(Transformer(model_config), tmp_path / "other")
    with pytest.raises(ValueError, match="expected share_prefix True"):
        make("grpo", str(tmp_path / "other"), deterministic=True, share_prefix=False)

"""Adapters: they start as nothing, train alone, switch off, and merge with one rounding."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fastllm.model.lora import (
    LoraConfig,
    LoRALinear,
    adapters,
    add_lora,
    disable_lora,
    merge_lora,
)
from fastllm.model.lora_config import ALL_LINEAR
from fastllm.model.transformer import Linear


@pytest.fixture
def tokens():
    return torch.randint(3, 40, (2, 7))


def trained(model, seed=1):
    """As if the adapters had been trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for adapter in adapters(model):
            weight = adapter.lora_B.weight
            weight.copy_(0.2 * torch.randn(weight.shape, generator=generator))
    return model


def test_a_new_adapter_changes_nothing(model, tokens):
    before = model(tokens)
    add_lora(model, LoraConfig(r=4))
    assert torch.equal(model(tokens), before)
    assert len(adapters(model)) == 14
    assert not torch.allclose(trained(model)(tokens), before, atol=1e-3)


def test_only_adapters_train(model, tokens):
    add_lora(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trainable) == 8 and all("lora_" in name for name in trainable)
    trained(model)(tokens).sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == trainable
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


def test_a_reward_models_head_trains_too(reward_model):
    add_lora(reward_model, LoraConfig(r=4))
    assert reward_model.score.weight.requires_grad
    assert not isinstance(reward_model.score, LoRALinear)


@pytest.mark.parametrize(("settings", "scaling"), [({}, 2.0), ({"use_rslora": True}, 4.0)])
def test_the_update_is_scaled_as_in_the_paper(settings, scaling):
    base = Linear(5, 3)
    config = LoraConfig(r=4, lora_alpha=8, **settings)
    layer = LoRALinear(base, config)
    nn.init.normal_(layer.lora_B.weight)
    x = torch.randn(6, 5)
    update = layer.lora_B.weight @ layer.lora_A.weight * scaling
    expected = x @ (base.weight + update).t() + base.bias
    torch.testing.assert_close(layer(x), expected)


def test_dropout_acts_in_training_only(model, tokens):
    add_lora(model, LoraConfig(r=4, lora_dropout=0.5))
    trained(model).eval()
    assert torch.equal(model(tokens), model(tokens))
    model.train()
    assert not torch.equal(model(tokens), model(tokens))


def test_switched_off_it_is_the_base(model, tokens):
    before = model(tokens)
    add_lora(model, LoraConfig(r=4, lora_dropout=0.5))
    adapted = trained(model).eval()(tokens)
    with disable_lora(model):
        assert torch.equal(model(tokens), before)
        with disable_lora(model):
            assert torch.equal(model(tokens), before)
        assert torch.equal(model(tokens), before)
    assert torch.equal(model(tokens), adapted)
    with pytest.raises(RuntimeError), disable_lora(model):
        raise RuntimeError
    assert torch.equal(model(tokens), adapted)


def test_merging_gives_the_same_model_without_adapters(model, tokens):
    names = set(model.state_dict())
    add_lora(model, LoraConfig(r=4))
    adapted = trained(model)(tokens)
    merge_lora(model)
    assert not adapters(model) and not hasattr(model, "lora_config")
    assert set(model.state_dict()) == names
    assert type(model.model.layers[0].mlp.up_proj) is Linear
    torch.testing.assert_close(model(tokens), adapted, rtol=1e-5, atol=1e-5)


def test_merging_into_bf16_rounds_once():
    """C11: at most 0.001 % of the weights are not the nearest to the exact sum."""
    width = 512
    model = nn.ModuleDict({"q_proj": Linear(width, width, bias=False)}).to(torch.bfloat16)
    add_lora(model, LoraConfig(r=16, target_modules=["q_proj"]))
    trained(model)
    adapter = copy.deepcopy(model.q_proj)
    update = adapter.lora_B.weight.double() @ adapter.lora_A.weight.double()
    exact = adapter.weight.double() + adapter.scaling * update
    merge_lora(model)
    merged = model.q_proj.weight
    assert merged.dtype == torch.bfloat16
    wrong = (merged != exact.to(torch.bfloat16)).double().mean()
    assert wrong <= 1e-5
    two_roundings = adapter.weight + (adapter.scaling * update).to(torch.bfloat16)
    assert (two_roundings != exact.to(torch.bfloat16)).double().mean() > 1e-2


# -- settings ---------------------------------------------------------------------------------


def test_settings_of_peft_become_ours():
    peft = pytest.importorskip("peft")
    theirs = peft.LoraConfig(
        r=8, lora_alpha=24, lora_dropout=0.1, target_modules=["v_proj", "q_proj"]
    )
    ours = LoraConfig.from_peft(theirs)
    assert (ours.r, ours.lora_alpha, ours.lora_dropout) == (8, 24, 0.1)
    assert sorted(ours.target_modules) == ["q_proj", "v_proj"] and ours.scaling == 3
    every = LoraConfig.from_peft(peft.LoraConfig(target_modules="all-linear"))
    assert tuple(every.target_modules) == ALL_LINEAR
    assert LoraConfig.from_peft(ours) is ours


@pytest.mark.parametrize(
    "setting",
    [
        {"use_dora": True},
        {"bias": "all"},
        {"rank_pattern": {"q_proj": 4}},
        {"alpha_pattern": {"q_proj": 4}},
        {"layers_to_transform": [1]},
        {"target_modules": ["lm_head"]},
        {"target_modules": ".*_proj"},
    ],
    ids=lambda setting: next(iter(setting)),
)
def test_settings_that_we_do_not_have_are_refused(setting):
    peft = pytest.importorskip("peft")
    with pytest.raises(ValueError, match=next(iter(setting))):
        LoraConfig.from_peft(peft.LoraConfig(**{"target_modules": ["q_proj"], **setting}))


def test_settings_of_our_own_are_checked():
    with pytest.raises(ValueError, match="r must be at least 1"):
        LoraConfig(r=0)
    with pytest.raises(ValueError, match=r"expected names among q_proj.*found wq"):
        LoraConfig(target_modules=["wq"])

"""Layers whose activations are computed again: any number of them, always the same gradients."""

from __future__ import annotations

import pytest
import torch

from fastllm import ModelConfig, Transformer
from fastllm.data.packing import pack_sequences
from fastllm.model.lora import add_lora
from fastllm.model.lora_config import LoraConfig


def gradients(model, batch):
    torch.manual_seed(3)  # of dropout
    hidden = model.hidden(batch.input_ids, batch.layout, batch.rows)
    hidden.float().square().sum().backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    for parameter in model.parameters():
        parameter.grad = None
    return found


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "dropout"])
def test_gradients_are_those_of_what_is_kept(kind):
    config = ModelConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        model_type=kind if kind.startswith("qwen") else "llama",
    )
    model = Transformer(config)
    if kind == "dropout":
        add_lora(model, LoraConfig(r=2, lora_dropout=0.5))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)
    batch = pack_sequences([list(range(1, 20)), list(range(9))], [[1] * 19, [1] * 9])
    expected = gradients(model, batch)
    model.model.gradient_checkpointing = True
    for layers in (0, 1, 3, 4, 9, None):
        model.model.recomputed_layers = layers
        found = gradients(model, batch)
        assert found.keys() == expected.keys()
        for name, gradient in found.items():
            assert torch.equal(gradient, expected[name]), (layers, name)


def test_the_first_layers_are_recomputed(monkeypatch):
    from fastllm.model import transformer

    asked = []

    def noted(layer, *inputs, **options):
        asked.append(layer.self_attn.layer)
        return layer(*inputs)

    monkeypatch.setattr(transformer, "checkpoint", noted)
    config = ModelConfig(
        vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=4, num_attention_heads=1
    )
    model = Transformer(config)
    model.model.gradient_checkpointing, model.model.recomputed_layers = True, 2
    batch = pack_sequences([[1, 2, 3]], [[1, 1, 1]])
    model.hidden(batch.input_ids, batch.layout, batch.rows)
    assert asked == [0, 1]
    with torch.no_grad():
        model.hidden(batch.input_ids, batch.layout, batch.rows)
    assert asked == [0, 1]


@pytest.mark.parametrize("kind", ["sft", "rm"])
def test_a_run_is_the_same(make, kind, metrics, fingerprint, tmp_path):
    plain = make(kind, run="plain")
    plain.train()
    some = make(kind, run="some", gradient_checkpointing=True, gradient_checkpointing_layers=1)
    some.train()
    assert fingerprint(plain.model) == fingerprint(some.model)
    assert metrics(tmp_path / "plain") == metrics(tmp_path / "some")


def test_a_number_of_layers_needs_the_switch(make):
    with pytest.raises(ValueError, match="layers is 2, but gradient_checkpointing is off"):
        make("sft", gradient_checkpointing_layers=2)
    with pytest.raises(ValueError, match=r"a number of layers, -1 or None; found -2"):
        make("sft", gradient_checkpointing=True, gradient_checkpointing_layers=-2)

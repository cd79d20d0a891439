"""A model that reads working copies computes what it computes without them, bit for bit."""

from __future__ import annotations

import copy

import pytest
import torch

from fastllm import ModelConfig, PackedLayout, Transformer
from fastllm.model.lora import LoraConfig, add_lora
from fastllm.ops import use_backend
from fastllm.ops.working import keep_copies, narrow_frozen

BF16 = torch.bfloat16
CONFIG = ModelConfig(
    vocab_size=260,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=64,
)


@pytest.fixture(params=["all", "adapter"])
def model(request):
    made = Transformer(CONFIG).to(BF16).float()
    if request.param == "adapter":
        add_lora(made, LoraConfig(r=2))
        for name, parameter in made.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    made.model.compute_dtype = BF16
    return made.train()


def result(model):
    hidden = model.hidden(torch.arange(17), PackedLayout([10, 7], [-1, -1]))
    hidden.float().square().sum().backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"hidden": hidden.detach(), **gradients}


@pytest.mark.parametrize("serving", ["auto", "torch"])
@pytest.mark.parametrize("recomputed", [False, True])
def test_copies_change_no_bit(model, serving, recomputed):
    model.model.gradient_checkpointing = recomputed
    reading = copy.deepcopy(model)
    narrow_frozen(reading.parameters(), BF16)
    keep_copies(reading.parameters(), BF16)
    with use_backend(serving):
        expected, found = result(model), result(reading)
    assert found.keys() == expected.keys() and len(found) > 10
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name

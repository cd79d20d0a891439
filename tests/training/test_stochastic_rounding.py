"""Runs whose weights are bf16 themselves: what they save, and what resuming makes of it."""

from __future__ import annotations

import json

import pytest
import torch

from fastllm.model.lora import LoraConfig
from fastllm.model.tensors import read_file

ROUNDED = {"stochastic_rounding": True, "dtype": "bf16"}
NARROW = ROUNDED | {"optim_state_dtype": "bf16"}
RUN = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "learning_rate": 1e-3}


@pytest.mark.parametrize("options", [ROUNDED, NARROW], ids=["bf16", "bf16 state"])
@pytest.mark.parametrize("kind", ["sft", "rm", "grpo"])
def test_a_run_is_resumed_bit_for_bit(make, tmp_path, kind, options):
    options = RUN | options
    if kind == "grpo":
        options |= {"per_device_train_batch_size": 4}
    whole = make(kind, run="whole", **options)
    whole.train()
    config = json.loads((tmp_path / "whole" / "config.json").read_text())
    assert config["torch_dtype"] == config["dtype"] == "bfloat16"
    saved = read_file(tmp_path / "whole" / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}
    again = make(kind, run="again", **options)
    again.train(tmp_path / "whole" / "checkpoint-3")
    found, expected = again.model.state_dict(), whole.model.state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_an_adapter_is_resumed_on_a_base_that_is_rounded_again(make, base, tmp_path):
    options = RUN | NARROW | {"peft_config": LoraConfig(r=2)}
    whole = make("sft", base, run="whole", **options)
    whole.train()
    again = make("sft", base, run="again", **options)
    again.train(tmp_path / "whole" / "checkpoint-3")
    found, expected = again.model.state_dict(), whole.model.state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_weights_learn_what_nearest_rounding_would_lose(make, tmp_path):
    """A step of a ten-thousandth is below half a bit of most weights."""
    trainer = make("sft", run="run", **RUN | ROUNDED | {"learning_rate": 1e-4})
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    after = trainer.model.named_parameters()
    changed = [float((p != before[name]).float().mean()) for name, p in after]
    assert 0.02 < sum(changed) / len(changed) < 0.9


def test_a_checkpoint_of_another_mode(make, tmp_path):
    make("sft", run="wide", **RUN).train()
    make("sft", run="narrow", **RUN | NARROW).train()
    refused = make("sft", run="other", **RUN | NARROW)
    with pytest.raises(ValueError, match=r"cannot hold.*stochastic_rounding"):
        refused.train(tmp_path / "wide" / "checkpoint-3")
    widened = make("sft", run="another", **RUN)
    widened.train(tmp_path / "narrow" / "checkpoint-3")
    assert {p.dtype for p in widened.model.parameters()} == {torch.float32}
    half = make("sft", run="half", **RUN | {"optim_state_dtype": "bf16"})
    with pytest.raises(ValueError, match=r"optimizer state.*cannot hold.*optim_state_dtype"):
        half.train(tmp_path / "wide" / "checkpoint-3")


def test_fp32_arithmetic_has_nothing_to_round(make):
    with pytest.raises(ValueError, match=r"stochastic_rounding: expected dtype bf16, found .*cpu"):
        make("sft", run="run", stochastic_rounding=True)

"""AdamW as in transformers: groups, clipping, loss scaling; and never a step on a bad number.

Each test runs for the step that decides on the host and for the one that decides on the device,
which on the CPU is the reference of what Triton does.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastllm import SFTConfig
from fastllm.ops import working
from fastllm.training import optimizer as module
from fastllm.training.device_adamw import DeviceAdamW
from fastllm.training.optimizer import Optimizer

FINE = torch.tensor(1.0)


@pytest.fixture(params=["host", "device"], autouse=True)
def decided(request, monkeypatch):
    """Where it is decided whether a step is taken."""
    if request.param == "device":
        monkeypatch.setattr(module, "_decides_on_device", lambda *_: True)
    return request.param


@pytest.fixture
def model():
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 1))


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_matrices_decay_and_vectors_do_not(model):
    optimizer = Optimizer(
        model, SFTConfig(weight_decay=0.1, adam_beta1=0.8, adam_beta2=0.95), False
    )
    decayed, others = optimizer.adamw.param_groups
    assert [p.dim() for p in decayed["params"]] == [2, 2] and decayed["weight_decay"] == 0.1
    assert {p.dim() for p in others["params"]} == {1} and others["weight_decay"] == 0
    assert decayed["betas"] == others["betas"] == (0.8, 0.95)


@pytest.mark.parametrize("limit", [0.0, 0.5, 1e6])
def test_steps_are_those_of_torch(model, limit):
    twin = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 1))
    twin.load_state_dict(model.state_dict())
    ours = Optimizer(model, SFTConfig(max_grad_norm=limit), False)
    theirs = torch.optim.AdamW(twin.parameters(), weight_decay=0)
    for _ in range(3):
        x = torch.randn(5, 3)
        ours.backward(model(x).square().sum())
        twin(x).square().sum().backward()
        norm = nn.utils.clip_grad_norm_(twin.parameters(), limit or float("inf"))
        theirs.param_groups[0]["lr"] = 0.01
        theirs.step()
        theirs.zero_grad()
        assert float(ours.step(0.01, FINE)) == pytest.approx(float(norm))
        torch.testing.assert_close(weights(model), weights(twin))
    assert all(p.grad is None for p in model.parameters())


def test_frozen_parameters_are_left_alone(model):
    model[0].requires_grad_(False)
    frozen = model[0].weight.clone()
    optimizer = Optimizer(model, SFTConfig(), False)
    optimizer.backward(model(torch.randn(5, 3)).sum())
    optimizer.step(0.1, FINE)
    assert torch.equal(model[0].weight, frozen)
    with pytest.raises(ValueError, match="no trainable parameter"):
        Optimizer(model.requires_grad_(False), SFTConfig(), False)


@pytest.mark.parametrize("scale_loss", [False, True])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(model, bad, scale_loss, decided):
    optimizer = Optimizer(model, SFTConfig(), scale_loss)
    before = weights(model)
    optimizer.backward(model(torch.randn(5, 3)).sum())
    model[2].weight.grad[0, 1] = bad
    assert not optimizer.step(0.1, FINE).isfinite()
    assert torch.equal(weights(model), before)
    moments = [m for state in optimizer.adamw.state.values() for m in state.values()]
    assert not any(m.any() for m in moments), "moments were updated"
    assert optimizer.failed() is (decided == "device" and not scale_loss)
    if optimizer.failed():
        optimizer.backward(model(torch.randn(5, 3)).sum())
        assert optimizer.step(0.1, FINE).isfinite()
        assert torch.equal(weights(model), before), "a later step was taken"
        optimizer.adamw.op.clear_failure()
    optimizer.backward(model(torch.randn(5, 3)).sum())
    assert optimizer.step(0.1, FINE).isfinite()
    assert weights(model).isfinite().all() and not torch.equal(weights(model), before)


def test_a_loss_that_is_not_finite_changes_nothing_though_its_gradients_are(model):
    optimizer = Optimizer(model, SFTConfig(), False)
    before = weights(model)
    loss = model(torch.randn(5, 3)).sum() + float("nan")
    optimizer.backward(loss)
    assert optimizer.step(0.1, loss.detach()).isfinite()
    assert torch.equal(weights(model), before)


def test_the_loss_scale_falls_with_an_overflow_and_does_not_change_the_step(model):
    twin = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 1))
    twin.load_state_dict(model.state_dict())
    scaled, plain = Optimizer(model, SFTConfig(), True), Optimizer(twin, SFTConfig(), False)
    start = scaled.scaler.get_scale()
    x = torch.randn(5, 3)
    scaled.backward(model(x).sum())
    plain.backward(twin(x).sum())
    norms = scaled.step(0.01, FINE), plain.step(0.01, FINE)
    torch.testing.assert_close(*norms)
    torch.testing.assert_close(weights(model), weights(twin))
    scaled.backward(model(x).sum() * float("inf"))
    scaled.step(0.01, FINE)
    assert scaled.scaler.get_scale() == start / 2


def test_the_scaler_goes_on_from_a_checkpoint(model):
    optimizer = Optimizer(model, SFTConfig(), True)
    for factor in (1.0, float("inf"), 1.0, 1.0):
        optimizer.backward(model(torch.randn(5, 3)).sum() * factor)
        optimizer.step(0.01, FINE)
    state = optimizer.scaler.state_dict()
    assert state["scale"] == 2.0**15 and state["_growth_tracker"] == 2
    again = Optimizer(model, SFTConfig(), True)
    again.backward(model(torch.randn(5, 3)).sum())
    again.scaler.load_state_dict(state)
    assert again.scaler.state_dict() == state


def test_working_copies_follow(model):
    working.keep_copies(model.parameters(), torch.bfloat16)
    optimizer = Optimizer(model, SFTConfig(), False)
    for _ in range(2):
        optimizer.backward(model(torch.randn(5, 3)).sum())
        optimizer.step(0.1, FINE)
        for parameter in model.parameters():
            assert torch.equal(working.copy_of(parameter), parameter.to(torch.bfloat16))


def test_other_state_is_decided_on_the_device(model, decided):
    if decided == "device":
        return
    for config in (
        SFTConfig(optim_state_dtype="bf16"),
        SFTConfig(stochastic_rounding=True, dtype="bf16", optim_state_dtype="bf16"),
    ):
        dtype = torch.bfloat16 if config.stochastic_rounding else torch.float32
        model.to(dtype)
        optimizer = Optimizer(model, config, False)
        assert isinstance(optimizer.adamw, DeviceAdamW)
        before = weights(model)
        optimizer.backward(model(torch.randn(5, 3, dtype=dtype)).sum())
        optimizer.step(0.1, FINE)
        assert not torch.equal(weights(model), before)
        state = optimizer.adamw.state[model[0].weight]
        assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.bfloat16
        assert weights(model).dtype == dtype and state["step"] == 1


def test_weights_have_the_dtype_that_the_config_says(model):
    with pytest.raises(ValueError, match=r"0.weight: expected weights in bfloat16"):
        Optimizer(model, SFTConfig(stochastic_rounding=True, dtype="bf16"), False)
    with pytest.raises(ValueError, match=r"expected weights in float32, found torch.bfloat16"):
        Optimizer(model.to(torch.bfloat16), SFTConfig(), False)


def test_stochastic_rounding_is_for_bf16(decided):
    for options in ({"dtype": "fp32"}, {"fp16": True}, {"dtype": "fp16"}):
        with pytest.raises(ValueError, match="stochastic_rounding: expected dtype bf16, found fp"):
            SFTConfig(stochastic_rounding=True, **options)
    with pytest.raises(ValueError, match="optim_state_dtype: expected one of fp32, bf16"):
        SFTConfig(optim_state_dtype="int8")

"""Optimizer and random state go to disk and back: resumed training is the same bit for bit."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastllm import SFTConfig
from fastllm.model import tensors as tensor_files
from fastllm.training import optimizer as optimizer_module
from fastllm.training.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from fastllm.training.optimizer import Optimizer
from fastllm.training.snapshot import (
    optimizer_tensors,
    random_state,
    restore_optimizer,
    restore_random_state,
    restore_weights,
)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 2)
        self.unused = nn.Parameter(torch.ones(3))
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.dropout(torch.relu(self.first(x)))).square().mean()


def _train(net: Net, optimizer: torch.optim.Optimizer, steps: int) -> list[str]:
    losses = []
    for _ in range(steps):
        loss = net(torch.randn(5, 4) * random.random())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item().hex())
    return losses


@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"fused": True}], ids=str)
def test_resumed_training_is_the_same_bit_for_bit(options: dict[str, Any], tmp_path: Path) -> None:
    def start() -> tuple[Net, torch.optim.Optimizer]:
        net = Net()
        return net, torch.optim.AdamW(net.parameters(), lr=0.05, **options)

    net, optimizer = start()
    _train(net, optimizer, 3)
    own_tensors, own_state = random_state()
    save_checkpoint(
        tmp_path,
        3,
        lambda folder: tensor_files.write_file(folder / "model.safetensors", net.state_dict()),
        optimizer_tensors(optimizer, net.named_parameters()),
        {"step": 3},
        rank_tensors=own_tensors,
        rank_state=own_state,
    )
    expected = _train(net, optimizer, 4)

    torch.manual_seed(99)
    random.seed(99)
    again, other = start()
    _train(again, other, 1)  # state that has to go
    newest = latest_checkpoint(tmp_path)
    assert newest is not None
    again.load_state_dict(tensor_files.read_file(newest / "model.safetensors"))
    tensors, state = load_checkpoint(newest, check=False)
    restore_optimizer(other, again.named_parameters(), tensors)
    restore_random_state(tensors, state)
    assert _train(again, other, 4) == expected
    for name, value in net.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    for name, value in optimizer_tensors(optimizer, net.named_parameters()).items():
        assert torch.equal(optimizer_tensors(other, again.named_parameters())[name], value), name


def _train_on_device(net: Net, optimizer: Optimizer, steps: int) -> None:
    for _ in range(steps):
        optimizer.backward(net(torch.randn(5, 4, dtype=net.first.weight.dtype)))
        optimizer.step(0.01, torch.tensor(1.0))


MODES = {
    "fp32": {},
    "bf16 moments": {"optim_state_dtype": "bf16"},
    "bf16": {"optim_state_dtype": "bf16", "stochastic_rounding": True, "dtype": "bf16"},
}


@pytest.mark.parametrize("mode", MODES)
def test_what_is_decided_on_the_device_resumes_bit_for_bit(
    mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimizer_module, "_decides_on_device", lambda *_: True)
    config = SFTConfig(**MODES[mode])
    dtype = torch.bfloat16 if config.stochastic_rounding else torch.float32

    def start() -> tuple[Net, Optimizer]:
        net = Net().to(dtype)
        return net, Optimizer(net, config, False)

    net, optimizer = start()
    _train_on_device(net, optimizer, 3)
    state = optimizer_tensors(optimizer.adamw, optimizer.named_parameters)
    tensor_files.write_file(tmp_path / "state.safetensors", state)
    weights = {name: value.clone() for name, value in net.state_dict().items()}
    random_tensors, random_values = random_state()
    _train_on_device(net, optimizer, 3)

    again, other = start()
    _train_on_device(again, other, 2)  # state that has to go
    restore_weights(again, weights)
    saved = tensor_files.read_file(tmp_path / "state.safetensors")
    restore_optimizer(other.adamw, other.named_parameters, saved)
    restore_random_state(random_tensors, random_values)
    _train_on_device(again, other, 3)
    for name, value in net.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    expected = optimizer_tensors(optimizer.adamw, optimizer.named_parameters)
    for name, value in optimizer_tensors(other.adamw, other.named_parameters).items():
        assert torch.equal(value, expected[name]), name
        assert not name.endswith("weight/step") or value == 6


def test_state_goes_from_narrow_to_wide_and_not_back() -> None:
    net = Net()
    narrow = Optimizer(net, SFTConfig(optim_state_dtype="bf16"), False)
    wide = Optimizer(net, SFTConfig(), False)
    _train_on_device(net, narrow, 2)
    tensors = optimizer_tensors(narrow.adamw, narrow.named_parameters)
    restore_optimizer(wide.adamw, wide.named_parameters, tensors)
    key = "optimizer/first.weight/exp_avg_sq"
    restored = optimizer_tensors(wide.adamw, wide.named_parameters)
    assert restored[key].dtype == torch.float32
    assert torch.equal(restored[key], tensors[key].float())
    restore_optimizer(narrow.adamw, narrow.named_parameters, restored)  # no bit too many
    _train_on_device(net, wide, 1)
    tensors = optimizer_tensors(wide.adamw, wide.named_parameters)
    with pytest.raises(ValueError, match=r"exp_avg.* of .*bfloat16 cannot hold.*optim_state_dtype"):
        restore_optimizer(narrow.adamw, narrow.named_parameters, tensors)


def test_state_of_the_host_goes_on_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net()
    host = Optimizer(net, SFTConfig(), False)
    monkeypatch.setattr(optimizer_module, "_decides_on_device", lambda *_: True)
    device = Optimizer(net, SFTConfig(), False)
    _train_on_device(net, host, 2)
    tensors = optimizer_tensors(host.adamw, host.named_parameters)
    restore_optimizer(device.adamw, device.named_parameters, tensors)
    _train_on_device(net, device, 1)
    tensors = optimizer_tensors(device.adamw, device.named_parameters)
    assert tensors["optimizer/first.weight/step"] == 3
    restore_optimizer(host.adamw, host.named_parameters, tensors)
    _train_on_device(net, host, 1)
    assert optimizer_tensors(host.adamw, host.named_parameters)["optimizer/first.bias/step"] == 4


def test_weights_that_a_narrower_dtype_cannot_hold_are_refused() -> None:
    net, narrow = Net(), Net().to(torch.bfloat16)
    restore_weights(net, narrow.state_dict())
    restore_weights(narrow, net.state_dict())
    assert torch.equal(net.first.weight, narrow.first.weight.float())
    with pytest.raises(ValueError, match=r"first.weight: .*cannot hold.*stochastic_rounding"):
        restore_weights(narrow, Net().state_dict())


def test_optimizer_state_by_name() -> None:
    net = Net()
    optimizer = torch.optim.AdamW(reversed(list(net.parameters())))
    _train(net, optimizer, 1)
    names = optimizer_tensors(optimizer, net.named_parameters()).keys()
    assert "optimizer/first.weight/exp_avg_sq" in names
    assert len(names) == 4 * 3  # the parameter without a gradient has no state


def test_optimizer_state_of_another_model() -> None:
    net = Net()
    optimizer = torch.optim.AdamW(net.parameters())
    _train(net, optimizer, 1)
    tensors = optimizer_tensors(optimizer, net.named_parameters())
    wider = dict(tensors) | {"optimizer/first.bias/exp_avg": torch.zeros(9)}
    with pytest.raises(ValueError, match=r"exp_avg of first.bias: expected shape \[8\], found \[9"):
        restore_optimizer(optimizer, net.named_parameters(), wider)
    more = dict(tensors) | {"optimizer/third.weight/exp_avg": torch.zeros(9)}
    with pytest.raises(ValueError, match=r"'third\.weight', which the model does not train"):
        restore_optimizer(optimizer, net.named_parameters(), more)


def test_random_state_of_numpy() -> None:
    numpy = pytest.importorskip("numpy")
    tensors, state = random_state()
    state = json.loads(json.dumps(state))
    expected = numpy.random.normal(size=3).tolist(), random.gauss(0, 1), torch.rand(2)
    restore_random_state(tensors, state)
    assert numpy.random.normal(size=3).tolist() == expected[0]
    assert random.gauss(0, 1) == expected[1]
    assert torch.equal(torch.rand(2), expected[2])


@pytest.mark.cuda
def test_random_state_of_cuda() -> None:
    tensors, state = random_state("cuda")
    expected = torch.rand(4, device="cuda")
    restore_random_state(tensors, state, "cuda")
    assert torch.equal(torch.rand(4, device="cuda"), expected)

"""Optimizer and random state go to disk and back: resumed training is the same bit for bit."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastllm.model import tensors as tensor_files
from fastllm.training.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from fastllm.training.snapshot import (
    optimizer_tensors,
    random_state,
    restore_optimizer,
    restore_random_state,
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

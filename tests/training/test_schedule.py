"""The learning rate at every step, against transformers' schedulers."""

from __future__ import annotations

import pytest
import torch

from fastllm import SFTConfig
from fastllm.training.schedule import learning_rate, warmup_steps

PEAK = 3e-4


def ours(total, **config):
    args = SFTConfig(**config)
    return [learning_rate(args, PEAK, step, total) for step in range(total)]


@pytest.mark.parametrize("name", ["linear", "cosine", "constant_with_warmup"])
@pytest.mark.parametrize(("warmup", "total"), [(0, 10), (3, 10), (1, 2), (10, 10)])
def test_the_values_of_transformers(name, warmup, total):
    get_scheduler = pytest.importorskip("transformers").get_scheduler
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=PEAK)
    theirs = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=total)
    expected = []
    for _ in range(total):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()
    found = ours(total, lr_scheduler_type=name, warmup_steps=warmup)
    assert found == pytest.approx(expected, rel=1e-12)


def test_constant_is_constant_after_any_warmup_that_was_asked_for():
    assert ours(4, lr_scheduler_type="constant") == [PEAK] * 4
    assert ours(4, lr_scheduler_type="constant", warmup_steps=2) == [0, PEAK / 2, PEAK, PEAK]


@pytest.mark.parametrize(
    ("setting", "total", "steps"), [(0, 100, 0), (0.1, 25, 3), (1, 10, 1), (7, 10, 7)]
)
def test_a_warmup_below_one_is_a_fraction_rounded_up(setting, total, steps):
    assert warmup_steps(SFTConfig(warmup_steps=setting), total) == steps

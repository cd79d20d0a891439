"""Means of metrics: their order, their precision, what a checkpoint keeps of them."""

from __future__ import annotations

import random

import pytest
import torch

from fastllm.training import averages
from fastllm.training.averages import Averages, on_host


def test_means_by_weight() -> None:
    means = Averages()
    means.add({"loss": (torch.tensor(6.0), 2), "never": (torch.tensor(0.0), 0)})
    means.add({"loss": (1.0, torch.tensor(1)), "once": (5, 1)})
    assert means.pop() == {"loss": 7 / 3, "once": 5.0}
    assert means.pop() == {}


def test_a_checkpoint_in_between_changes_nothing() -> None:
    """Sums of floats depend on their order: it is that of the steps, read early or late."""
    generator = random.Random(0)
    values = [generator.uniform(-1e8, 1e8) for _ in range(50)]
    kinds = [torch.tensor(v) if generator.random() < 0.5 else v for v in values]
    whole, early = Averages(), Averages()
    for index, value in enumerate(kinds):
        whole.add({"x": (value, 1)})
        early.add({"x": (value, 1)})
        if index % 7 == 0:
            kept, early = early.state(), Averages()
            early.restore(kept)
    assert whole.pop() == early.pop()


def test_what_waits_is_bounded_and_holds_no_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(averages, "_UNREAD", 10)
    means = Averages()
    weight = torch.ones(3, requires_grad=True)
    for _ in range(100):
        means.add({"x": (weight.sum(), 1)})
        assert len(means._unread) <= 10
        assert not any(x.requires_grad for x in means._unread if isinstance(x, torch.Tensor))
    assert means.pop() == {"x": 3.0}


def test_scalars_on_the_host() -> None:
    assert on_host([]) == []
    assert on_host([1, 2.5, torch.tensor(3), torch.tensor(True)]) == [1.0, 2.5, 3.0, 1.0]

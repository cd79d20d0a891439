"""Timing by graph replay, and its fall-backs: what only a GPU can show."""

from __future__ import annotations

import time

import pytest
import torch

from bench.cuda import worker
from bench.cuda.device import Gpu
from bench.cuda.protocol import Order, unpacked
from bench.records import OURS

pytestmark = pytest.mark.cuda


@pytest.fixture
def gpu():
    device = Gpu()
    with device.working():
        yield device


def test_calls_are_replayed_from_a_graph(gpu):
    x = torch.randn(1 << 26, device="cuda")
    timed = gpu.timed([lambda: x + 1, lambda: x * 2])
    assert timed.how == "by graph"
    rate = 2 * x.nbytes / timed.block()
    assert 1e11 < rate < 2e13


def test_a_backward_pass_is_captured_by_itself(gpu):
    x = torch.randn(1024, 1024, device="cuda", requires_grad=True)
    out = torch.tanh(x)
    gradient = torch.randn_like(out)
    timed = gpu.timed([lambda: torch.autograd.grad(out, x, gradient, retain_graph=True)])
    assert timed.how == "by graph" and timed.block() > 0


def test_what_waits_for_the_device_is_timed_between_events(gpu):
    x = torch.randn(8, device="cuda")
    timed = gpu.timed([lambda: x.sum().item()])
    assert timed.how.startswith("by events") and timed.block() > 0
    assert gpu.alive()
    assert gpu.timed([lambda: x + 1]).how == "by graph"  # the failed capture left nothing behind


def test_peaks_are_above_what_was_there(gpu):
    x = torch.randn(1 << 20, device="cuda")
    peak = gpu.peak(lambda: (x + 1).sum())
    assert x.nbytes <= peak < 1.1 * x.nbytes


@pytest.mark.parametrize("section", ["check", "ceilings", "ops", "attention", "head", "optimizer"])
def test_sections_at_tiny_sizes(section):
    found = []

    def say(kind, **what):
        if kind == "record":
            found.append(unpacked(what["record"]))

    order = Order(section, "tiny", 2, 5, time.time() + 300, compile=False)
    assert worker.run(order, Gpu(), say)
    notes = [f"{r.name} {r.case}: {r.note}" for r in found if r.contender == OURS]
    assert not [note for note in notes if "WRONG" in note or "ERROR" in note]

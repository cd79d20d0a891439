"""What a run asks of its device before it starts."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest
import torch

from fastllm.ops import cpp
from fastllm.training.devices import exact_sums, keep_memory

CPU = torch.device("cpu")

# Pages that tensors of 64 MB have to be given, once their places have settled.
COUNT_FAULTS = """
import resource, torch
from fastllm.ops import cpp
kept = {keep} and cpp.keep_memory()
for _ in range(10):
    torch.ones(1 << 24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(1 << 24)
print(kept, (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // 10)
"""


def faults(keep: bool) -> tuple[bool, int]:
    code = COUNT_FAULTS.format(keep=keep)
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    return found[0] == "True", int(found[1])


@pytest.mark.skipif(not cpp.available(), reason=cpp.reason())
def test_freed_memory_is_kept_for_the_next_allocation():
    kept, with_it = faults(keep=True)
    if not kept:
        pytest.skip("this C library cannot keep memory")
    assert with_it < 2000
    assert faults(keep=False)[1] > 10_000, "nobody asked for it"


@pytest.mark.parametrize(("value", "asked"), [(None, 1), ("1", 1), ("0", 0)])
def test_keeping_memory_is_logged_and_can_be_refused(monkeypatch, caplog, value, asked):
    calls: list[None] = []
    monkeypatch.setattr(cpp, "keep_memory", lambda: calls.append(None) or True)
    monkeypatch.delenv("FASTLLM_KEEP_MEMORY", raising=False)
    if value is not None:
        monkeypatch.setenv("FASTLLM_KEEP_MEMORY", value)
    caplog.set_level(logging.INFO, logger="fastllm")
    keep_memory(CPU)
    assert len(calls) == len(caplog.records) == asked
    keep_memory(torch.device("cuda"))
    assert len(calls) == asked


@pytest.mark.parametrize(("kind", "allowed"), [("cpu", True), ("cuda", False)])
def test_sums_of_products_are_exact_on_a_gpu(monkeypatch, kind, allowed):
    settings = type("Settings", (), {})()
    names = [f"allow_{t}_reduced_precision_reduction" for t in ("bf16", "fp16")]
    for name in names:
        setattr(settings, name, True)
    monkeypatch.setattr(torch.backends.cuda, "matmul", settings)
    exact_sums(torch.device(kind))
    assert [getattr(settings, name) for name in names] == [allowed, allowed]

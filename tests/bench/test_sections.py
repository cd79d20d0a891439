"""What the sections measure: work counted right, points where they should be, memory seen."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import growth, machine, memory, optimizer_step, roofline, threads
from bench.options import Options
from bench.records import OURS
from bench.training_steps import PEER, Mismatch, Work, blocks, has_peer

ROOT = Path(__file__).parents[2]

SMALL = Work("SFT", batch=2, length=8, layers=1, width=16, heads=2, key_heads=1, vocabulary=260)


def test_the_work_of_a_step_is_counted() -> None:
    """Against the parameters of the model itself, and attention by hand."""
    from fastllm import Transformer

    model = Transformer(SMALL.config())
    weights = sum(p.numel() for n, p in model.named_parameters() if p.dim() == 2)
    weights -= model.model.embed_tokens.weight.numel()
    visible = 2 * (8 * 9 / 2)
    assert SMALL.flops == 6 * SMALL.tokens * weights + 3.5 * 4 * visible * SMALL.width


@pytest.mark.parametrize("kind", ["SFT", "RM"])
def test_steps_train_like_the_peer(kind: str) -> None:
    work = Work(kind, 2, 8, layers=1, width=16, heads=2, key_heads=1, vocabulary=260)
    found = blocks(work, "float32", 2, "cpu")
    assert list(found) == [PEER, OURS] if has_peer() else [OURS]
    assert all(block() > 0 for block in found.values())


@pytest.mark.skipif(not has_peer(), reason="needs transformers")
def test_a_step_with_another_loss_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    from bench import training_steps

    monkeypatch.setattr(training_steps, "_plain", lambda *_: lambda: (1.0, 1.0))
    with pytest.raises(Mismatch, match="WRONG"):
        blocks(SMALL, "float32", 1, "cpu")


def test_points_of_the_curves() -> None:
    assert threads.counts(1, quick=False) == [1]
    assert threads.counts(2, quick=False) == [1, 2]
    assert threads.counts(12, quick=False) == [1, 2, 3, 4, 8, 12]
    assert threads.counts(12, quick=True) == [1, 12]
    lengths = growth.curves(quick=False)["length"]
    assert list(lengths) == [256, 512, 1024, 2048, 4096, 8192, 16384, 32768]
    assert {work.tokens for work in lengths.values()} == {8192, 16384, 32768}
    assert all(len(points) == 1 for points in growth.curves(quick=True).values())


def test_expected_times_follow_the_arithmetic() -> None:
    options = Options(quick=True, dtypes=("float32",))
    points = {2: SMALL, 4: Work(**vars(SMALL) | {"batch": 4})}
    records = list(growth.curve("batch", points, "float32", options))
    ours = [record for record in records if record.contender == OURS]
    assert ours[0].expected is None
    assert ours[1].expected == pytest.approx(2 * ours[0].seconds)
    assert [record.x for record in ours] == [2, 4]


def test_the_share_of_the_roofline() -> None:
    options = Options(quick=True, dtypes=("float32",))
    rate = max(r.work / min(r.rounds) for r in roofline._products("float32", options))
    shares = roofline.fractions({OURS: (2.0, 1.0, 3.0)}, rate, "FLOP", "float32", options)
    assert shares == {OURS: pytest.approx(0.5)}
    copies = [r for r in roofline.run(options) if r.name == "copy"]
    assert {"torch.copy_", "memmove"} == {record.contender for record in copies}


def test_reads_are_measured_by_footprint() -> None:
    options = Options(quick=True, dtypes=("float32",))
    reads = [r for r in roofline.run(options) if r.name == "read"]
    assert {"torch.sum", "memchr", "memcmp"} == {record.contender for record in reads}
    largest = [r for r in reads if r.x == max(read.x for read in reads)]
    best = max(record.work / min(record.rounds) for record in largest)
    assert roofline.read_rate(largest[0].work * 1.1, options) == best


def test_a_read_that_stops_early_is_no_read() -> None:
    values = torch.ones(64)
    roofline._search(values.data_ptr(), values.nbytes)
    roofline._compare(values.data_ptr(), values.nbytes)
    values.view(torch.uint8)[161] = 1
    with pytest.raises(AssertionError, match="memchr"):
        roofline._search(values.data_ptr(), values.nbytes)
    with pytest.raises(AssertionError, match="memcmp"):
        roofline._compare(values.data_ptr(), values.nbytes)


def test_memmove_copies_every_slice() -> None:
    from concurrent.futures import ThreadPoolExecutor

    source, target = torch.arange(1001, dtype=torch.uint8), torch.zeros(1001, dtype=torch.uint8)
    with ThreadPoolExecutor(3) as pool:
        roofline._memmove(target, source, 3, pool)()
    assert torch.equal(source, target)


def test_the_optimizer_step_is_checked() -> None:
    makers = optimizer_step.contenders()
    assert optimizer_step._wrong(makers[optimizer_step.WITH], "cpu") == ""
    assert optimizer_step._wrong(makers[OURS], "cpu") == ""
    assert "WRONG" in optimizer_step._wrong(lambda parameters: lambda gradients: None, "cpu")


@pytest.mark.skipif(memory.resident() is None, reason="no /proc/self/status here")
def test_memory_at_most_is_seen() -> None:
    """In a process of its own: here, freed memory may be kept, and be taken again."""
    code = """
from bench import memory
first = bytes(range(256)) * (1 << 18)
del first
known = memory.forget_peak()
before = memory.resident()[0]
second = bytes(range(256)) * (1 << 17)
print(known, memory.resident()[1] - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    known, seen = done.stdout.split()
    if known == "False":
        pytest.skip("this system does not let the peak be forgotten")
    assert 0.9 * (1 << 25) <= int(seen) <= 1.2 * (1 << 25)


def test_the_machine_is_described() -> None:
    facts = machine.describe(Options(malloc="default"))
    assert facts["threads"] == torch.get_num_threads()
    assert facts["allocator"] == "default"
    assert facts["versions"]["torch"] in machine.line(facts)
    assert machine.slug("AMD EPYC 9B45, 2 GHz") == "amd-epyc-9b45-2-ghz"

"""The tuner: what it tries, what it writes, and how it ranks without a GPU."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")

from bench import tune  # noqa: E402
from bench.cuda.device import Host, Timed  # noqa: E402
from bench.cuda.exact import Wrong  # noqa: E402
from bench.tuning import constants, problems, resources, tables  # noqa: E402
from bench.tuning.constants import Place  # noqa: E402
from bench.tuning.problems import Problem  # noqa: E402
from bench.tuning.resources import Compiled  # noqa: E402

NOW = {"BLOCK": 1024, "num_warps": 4, "num_stages": 2}
PLACE = Place("some_kernel", 2, 4096)

COMPILING = pytest.mark.skipif(
    triton.knobs.runtime.interpret, reason="the interpreter compiles nothing"
)


def test_candidates_are_all_combinations_and_those_of_now_first():
    found = constants.candidates(NOW, {"BLOCK": (512, 1024), "num_warps": (4, 8)})
    assert found[0] == NOW and len(found) == 4
    assert {"BLOCK": 512, "num_warps": 8, "num_stages": 2} in found
    unusual = {**NOW, "BLOCK": 777}
    assert len(constants.candidates(unusual, {"BLOCK": (512, 1024)})) == 3


# -- tables ----------------------------------------------------------------------------------------

TABLE = {
    "sm_80": {"some_kernel": {"2": {"1024": {"BLOCK": 1}, "8192": NOW}, "4": {"8192": NOW}}},
    "gfx942": {"some_kernel": {"2": {"8192": {"BLOCK": 9}}}},
}


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "op.json"
    path.write_text(json.dumps(TABLE, indent=1) + "\n")
    return path


def test_a_class_is_replaced_and_nothing_else(table):
    tables.put(table, "sm_80", PLACE, {"num_stages": 3, "num_warps": 8, "BLOCK": 2048})
    text = table.read_text()
    found = json.loads(text)
    assert found["sm_80"]["some_kernel"]["2"]["8192"] == {
        "BLOCK": 2048,
        "num_warps": 8,
        "num_stages": 3,
    }
    assert list(found["sm_80"]["some_kernel"]["2"]["8192"]) == ["BLOCK", "num_warps", "num_stages"]
    found["sm_80"]["some_kernel"]["2"]["8192"] = NOW
    assert found == TABLE
    assert text.splitlines()[1].startswith(' "sm_80"') and text.endswith("}\n")


def test_an_architecture_without_a_table_starts_from_the_one_that_served_it(table):
    tables.put(table, "sm_90", Place("some_kernel", 2, 100), {"BLOCK": 5})
    found = json.loads(table.read_text())
    assert found["sm_90"]["some_kernel"]["2"] == {"1024": {"BLOCK": 5}, "8192": NOW}
    assert found["sm_80"] == TABLE["sm_80"] and found["gfx942"] == TABLE["gfx942"]


def test_sizes_beyond_the_last_class_are_its_own():
    assert tables.class_of({"64": {}, "256": {}}, 65) == "256"
    assert tables.class_of({"64": {}, "256": {}}, 1000) == "256"
    assert tables.class_of({"64": {}, "256": {}}, 3) == "64"


def test_every_tunable_kernel_is_in_a_table():
    for problem in problems.PROBLEMS:
        __import__(f"fastllm.kernels.{problem.op}")
    for kernel in constants.spaces():
        assert tables.file_of(kernel).exists()


# -- ranking ---------------------------------------------------------------------------------------


def test_what_spills_or_does_not_fit_is_behind():
    good = Compiled(NOW, registers=64, shared=32 << 10)
    spills = Compiled(NOW, registers=255, spilled=8)
    large = Compiled(NOW, registers=32, shared=228 << 10)
    failed = Compiled(NOW, failed="no")
    found = sorted([failed, large, spills, good], key=lambda one: one.rank("sm_90"))
    assert found[0] is good and good.fits("sm_90")
    assert not any(one.fits("sm_90") for one in (spills, large, failed))
    assert not Compiled(NOW, registers=64, shared=100 << 10).fits("sm_86")


def test_warps_on_a_processor():
    assert Compiled(NOW, registers=32).warps("sm_90") == 64
    assert Compiled(NOW, registers=65).warps("sm_90") == 4 * (65536 // (72 * 128))
    assert Compiled(NOW, registers=32, shared=100 << 10).warps("sm_90") == 8
    assert Compiled(NOW, registers=32).warps("sm_86") == 48


@COMPILING
def test_a_dry_run_compiles_and_ranks(monkeypatch, capsys):
    space = {"swiglu_forward_kernel": {"num_warps": (4, 8)}}
    monkeypatch.setattr(constants, "spaces", lambda: space)
    arguments = ["swiglu", "--only", "4864 bfloat16", "--dry-run", "--arch", "sm_90"]
    assert tune.main([*arguments, "--processes", "1"]) == 0
    out = capsys.readouterr().out
    assert "swiglu_forward_kernel for swiglu 8192x4864 bfloat16, sm_90: 2 candidates" in out
    assert out.count("registers, 0 spilled") == 2 and " * {" in out


def test_without_a_gpu_only_a_dry_run_is_possible(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        tune.main(["swiglu"])
    assert "there is no GPU here" in capsys.readouterr().err


@COMPILING
def test_constants_are_replaced_for_a_while():
    problem = next(p for p in problems.PROBLEMS if p.op == "swiglu" and "4864" in p.label)
    before = tune.looked_up(problem, "sm_90")
    place = next(p for p in before if p.kernel == "swiglu_forward_kernel")
    other = {**before[place], "num_warps": 2}
    with constants.replaced(place, other):
        assert tune.looked_up(problem, "sm_90")[place] == other
    assert tune.looked_up(problem, "sm_90") == before


@COMPILING
@pytest.mark.parametrize("op", sorted({problem.op for problem in problems.PROBLEMS}))
def test_every_problem_asks_for_constants(op, monkeypatch):
    """With the kernels as they are; the compiler itself is left out."""
    from fastllm.kernels import launch

    monkeypatch.setattr(launch, "_run", lambda *_, **__: None)
    for problem in problems.PROBLEMS:
        if problem.op == op:
            found = tune.looked_up(problem, "sm_90")
            assert set(constants.spaces()) & {place.kernel for place in found}, str(problem)


# -- on a GPU, or what stands for it ---------------------------------------------------------------


class FakeGpu(Host):
    """Calls take as long as the constants say."""

    seconds: float = 1.0

    def timed(self, calls, graph=True):
        calls[0]()
        return Timed(lambda: self.seconds, "by graph")


@pytest.fixture
def task(monkeypatch, table):
    def build(raw, normal, place):
        x = normal(4)
        return lambda: (x * FACTOR["now"],)

    problem = Problem("swiglu", "made up", torch.float32, build)
    monkeypatch.setattr(problems, "PROBLEMS", [problem])
    monkeypatch.setattr(tables, "file_of", lambda _: table)
    every = constants.candidates(NOW, {"BLOCK": (512, 1024, 2048), "num_warps": (4, 8)})
    return tune.Task(0, PLACE, NOW, every)


FACTOR = {"now": 2.0}
OPTIONS = argparse.Namespace(processes=1, keep=False)


def run(task, monkeypatch, seconds, factor=lambda _: 2.0):
    """Tune with times and results that depend on the constants."""
    device = FakeGpu()
    replaced = constants.replaced

    def watching(place, chosen):
        device.seconds, FACTOR["now"] = seconds(chosen), factor(chosen)
        return replaced(place, chosen)

    monkeypatch.setattr(constants, "replaced", watching)
    monkeypatch.setattr(
        resources, "compiled", lambda n, p, every, a, w: (Compiled(one, 32) for one in every)
    )
    FACTOR["now"] = 2.0
    return tune.tune(task, "sm_80", device, OPTIONS, deadline=float("inf"))


def test_the_winner_is_written(task, monkeypatch, table, capsys):
    best = {**NOW, "BLOCK": 2048, "num_warps": 8}
    found = run(task, monkeypatch, lambda chosen: 0.5 if chosen == best else 1.0)
    assert found == best
    assert json.loads(table.read_text())["sm_80"]["some_kernel"]["2"]["8192"] == best
    assert "500 ms with" in capsys.readouterr().out


def test_a_small_saving_changes_nothing(task, monkeypatch, table):
    before = table.read_text()
    assert run(task, monkeypatch, lambda chosen: 1.0 - 0.01 * (chosen != NOW)) == NOW
    assert table.read_text() == before


def test_a_candidate_with_another_result_cannot_win(task, monkeypatch):
    found = run(
        task,
        monkeypatch,
        lambda chosen: {512: 0.1, 1024: 1.0, 2048: 0.5}[chosen["BLOCK"]],
        lambda chosen: 3.0 if chosen["BLOCK"] == 512 else 2.0,
    )
    assert found["BLOCK"] == 2048


def test_a_wrong_candidate_is_named(task, monkeypatch, capsys):
    run(task, monkeypatch, lambda _: 1.0, lambda c: 3.0 if c["num_warps"] == 8 else 2.0)
    assert "Wrong: result is off" in capsys.readouterr().out
    assert issubclass(Wrong, Exception)

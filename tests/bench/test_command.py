"""The command: help at once, mistakes named, and one short run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.options import SECTIONS, parse
from bench.records import OURS, Document
from bench.sections import MODULES

ROOT = Path(__file__).parents[2]


def run(*arguments: str, module: str = "bench") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"TRITON_INTERPRET": "0"},
    )


def test_a_short_run_measures_checks_and_writes(tmp_path: Path) -> None:
    files = ["--json", str(tmp_path / "r.json"), "--html", str(tmp_path / "r.html")]
    done = run("ops", "--quick", "--only", "pairwise", "--device", "cpu", "--threads", "1", *files)
    assert done.returncode == 0, done.stderr
    assert "pairwise_loss forward+backward  8  float32" in done.stdout
    document = Document.read(tmp_path / "r.json")
    assert {record.dtype for record in document.records} == {"float32", "bfloat16"}
    assert {"eager", "F.logsigmoid"} <= {record.contender for record in document.records}
    assert document.machine["threads"] == 1
    assert document.machine["versions"]["torch"]
    if document.machine["isa"]:
        assert OURS in {record.contender for record in document.records}
    assert "</html>" in (tmp_path / "r.html").read_text()


def test_fastllm_bench_is_the_same_command() -> None:
    done = run("bench", "--help", module="fastllm")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: fastllm bench")
    assert all(section in done.stdout for section in SECTIONS)


def test_an_unknown_section_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["opps"])
    assert "unknown section opps" in capsys.readouterr().err


def test_a_section_for_every_name() -> None:
    assert len(MODULES) == len(SECTIONS)

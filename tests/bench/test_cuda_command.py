"""The command line of the suite on a GPU, its summary and its page."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import __main__, merge, page, table
from bench.cuda import setting, summary
from bench.options import CUDA_SECTIONS, SECTIONS, parse
from bench.records import OURS, Document, Record


def test_sections_belong_to_a_device(capsys):
    assert parse(["check", "ops", "--device", "cuda"]).sections == ["check", "ops"]
    assert parse(["ops", "growth", "--device", "cpu"]).sections == ["ops", "growth"]
    for wrong in (["growth", "--device", "cuda"], ["check", "--device", "cpu"]):
        with pytest.raises(SystemExit):
            parse(wrong)
        assert f"unknown section {wrong[0]}" in capsys.readouterr().err


def test_auto_takes_the_sections_of_the_device_that_is_there(monkeypatch):
    monkeypatch.setattr(__main__.sys, "exit", _raise)
    with pytest.raises(ValueError, match="no section check on cpu"):
        _options(monkeypatch, False, "check")
    assert _options(monkeypatch, False).sections == SECTIONS
    options = _options(monkeypatch, True, "ops", "check", "--quick", "--seed", "7")
    assert options.sections == ("check", "ops")  # in the suite's order
    assert (options.device, options.scale, options.seed) == ("cuda", "quick", 7)
    assert _options(monkeypatch, True).sections == CUDA_SECTIONS
    assert _options(monkeypatch, True).seed != _options(monkeypatch, True).seed


def test_a_gpu_that_is_not_there_is_said(monkeypatch):
    monkeypatch.setattr(__main__.sys, "exit", _raise)
    with pytest.raises(ValueError, match="finds no CUDA"):
        _options(monkeypatch, False, "--device", "cuda")


def _raise(message):
    raise ValueError(message)


def _options(monkeypatch, gpu: bool, *arguments: str):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("MKL_NUM_THREADS", "1")
    return __main__._options(parse(list(arguments)))


@pytest.fixture
def records() -> list[Record]:
    what = "head", "linear + cross-entropy forward+backward", "4096x4096x128256", "bfloat16"
    goal = {"goal": "<= 17 ms, 1.2 GB extra", "met": True}
    return [
        Record("check", "rope", "9x4", "bfloat16", OURS, note="ok, off by 0.002"),
        Record("check", "swiglu", "9x4", "bfloat16", OURS, note="WRONG: output is off"),
        Record(*what, OURS, (16e-3, 17e-3), 1e13, "FLOP", 0.9, 1e9, **goal),
        Record(*what, "Liger", (0.14, 0.15), 1e13, "FLOP", 0.1),
        Record(*what, "compile", note="left out: the section's time is over"),
        Record(*what, "whole", (0.001, 0.001), note="not the same result"),
        Record("steps", "RM step against peers", "64", "", OURS, (1.0,), goal=">= 4x", met=None),
    ]


def test_the_summary_says_what_was_reached_and_what_is_missing(records):
    text = summary.text(records)
    assert "1 checks passed" in text
    line = next(line for line in text.splitlines() if line.startswith("met"))
    assert "<= 17 ms, 1.2 GB extra" in line and "1 GB extra" in line and "90.0%" in line
    assert "against Liger" in line and "whole" not in line
    assert "swiglu  9x4  bfloat16: WRONG: output is off" in text
    assert "compile: left out: the section's time is over" in text
    assert "unknown  RM step against peers" in text


def test_the_table_shows_goals(records, capsys):
    list(table.as_they_come(records))
    out = capsys.readouterr().out
    assert "goal <= 17 ms, 1.2 GB extra: met" in out and "goal >= 4x: not known" in out


def test_records_of_a_gpu_are_kept_merged_and_drawn(records, tmp_path: Path):
    machine = {
        "device": "NVIDIA Testing",
        "seed": 1,
        "commit": "0123456789",
        "versions": {"torch": "2.11.0"},
        "gpu_peers": {"trl": None},
    }
    document = Document(machine, records)
    document.write(tmp_path / "a.json")
    read = Document.read(tmp_path / "a.json")
    assert read.records == records
    other = Document({**machine, "seed": 2}, records[:1])
    other.write(tmp_path / "b.json")
    assert merge.main([str(tmp_path / "a.json"), str(tmp_path / "b.json")], tmp_path) == 0
    merged = Document.read(tmp_path / "nvidia-testing.json")
    assert merged.machine["seed"] == "1, 2" and len(merged.records) == len(records)
    page.write(merged, tmp_path / "a.html")
    assert "linear + cross-entropy" in (tmp_path / "a.html").read_text()


def test_the_extension_is_built_only_where_it_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(setting.cpp, "available", lambda: True)
    monkeypatch.setattr(setting.subprocess, "run", lambda *_, **__: pytest.fail("built again"))
    setting.prepare()
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(setting.cpp, "available", lambda: False)
    monkeypatch.setattr(setting.shutil, "which", lambda _: None)
    setting.prepare()
    assert "there is no compiler" in capsys.readouterr().out

"""Metrics for machines and progress for people."""

from __future__ import annotations

import errno
import json
import logging
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fastllm.training import logging as run_logging
from fastllm.training.logging import (
    MetricsLog,
    Progress,
    check_report_to,
    configure_logging,
    read_metrics,
)


def test_a_line_does_not_wait_for_the_end(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "new/run")
    log.log(1, {"loss": 0.5, "name": "a"})
    log.flush()
    lines = (tmp_path / "new/run/metrics.jsonl").read_text().splitlines()  # not closed yet
    assert [json.loads(line) for line in lines] == [{"step": 1, "loss": 0.5, "name": "a"}]
    log.close()


def test_numbers_that_json_lacks_are_null(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log:
        log.log(
            1, {"loss": float("nan"), "more": [float("inf"), 1.0], "deep": {"x": -float("inf")}}
        )
    text = (tmp_path / "metrics.jsonl").read_text()
    record = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} in {text}"))
    assert record == {"step": 1, "loss": None, "more": [None, 1.0], "deep": {"x": None}}


def test_resuming_reads_like_one_run(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log:
        for step in (10, 20, 30):
            log.log(step, {"loss": step / 10})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 20, "lo')  # killed in the middle of a line
    with MetricsLog(tmp_path, resumed_step=20) as log:
        log.log(30, {"loss": 9.0})
    assert [(line["step"], line["loss"]) for line in read_metrics(tmp_path)] == [
        (10, 1.0),
        (20, 2.0),
        (30, 9.0),
    ]


def test_a_new_run_starts_a_new_file(tmp_path: Path) -> None:
    for _ in range(2):
        with MetricsLog(tmp_path) as log:
            log.log(1, {"loss": 1.0})
    assert len(read_metrics(tmp_path)) == 1
    with MetricsLog(tmp_path / "empty", resumed_step=3):
        pass
    assert read_metrics(tmp_path / "empty") == []


def test_report_to(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    check_report_to("none")
    check_report_to([])
    with pytest.raises(ValueError, match="expected one of none, tensorboard; found 'wandb'"):
        check_report_to(["none", "wandb"])
    monkeypatch.setitem(sys.modules, "tensorboard", None)  # as if it were not installed
    with pytest.raises(ValueError, match="pip install tensorboard"):
        MetricsLog(tmp_path / "run", report_to="tensorboard")
    assert not (tmp_path / "run").exists()


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with MetricsLog(tmp_path, report_to="tensorboard") as log:
        for step in (1, 2, 3):
            log.log(step, {"loss": float(step), "note": "text"})
    with MetricsLog(tmp_path, report_to=["tensorboard"], resumed_step=2) as log:
        log.log(3, {"loss": 30.0})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 1.0), (2, 2.0), (3, 30.0)]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time in seconds, to be set."""
    now = [100.0]
    monkeypatch.setattr(run_logging.time, "monotonic", lambda: now[0])
    return now


def test_plain_lines(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(200, "SFT") as progress:
        for step in range(1, 21):
            clock[0] += 0.25
            progress.update(step, 3000, **({"loss": 0.6123} if step % 10 == 0 else {}))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "SFT step 10/200  loss 0.612  12,000 tokens/s  0:48 left",
        "SFT step 20/200  loss 0.612  12,000 tokens/s  0:45 left",
    ]


def test_steps_of_an_earlier_process_do_not_count(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with Progress(10_000, start=9_000) as progress:
        clock[0] += 100.0
        progress.update(9_010, 50, reward=1234.5)
    assert capsys.readouterr().err == "step 9010/10000  reward 1,234  0 tokens/s  2:45:00 left\n"


class Terminal:
    """A stderr that is a terminal."""

    encoding = "utf-8"

    def __init__(self) -> None:
        self.written: list[str] = []

    def write(self, text: str) -> int:
        self.written.append(text)
        return len(text)

    def flush(self) -> None:
        pass

    def isatty(self) -> bool:
        return True


@pytest.fixture
def attach(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Terminal]:
    """Make stderr a terminal; called in the test, because pytest sets stderr before it."""

    def attach() -> Terminal:
        terminal = Terminal()
        monkeypatch.setattr(sys, "stderr", terminal)
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setenv("COLUMNS", "120")
        return terminal

    return attach


def test_bar_on_a_terminal(attach: Callable[[], Terminal]) -> None:
    pytest.importorskip("rich")
    terminal = attach()
    with Progress(4, "Reward model") as progress:
        for step in range(1, 5):
            progress.update(step, 10, loss=0.25)
    text = "".join(terminal.written)
    assert "Reward model" in text
    assert "4/4" in text
    assert "loss 0.25" in text
    assert "\x1b[" in text


def test_lines_on_a_terminal_when_asked_or_without_rich(
    attach: Callable[[], Terminal], monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = attach()
    with Progress(4, "SFT", bar=False) as progress:
        progress.update(1, loss=0.5)
    monkeypatch.setitem(sys.modules, "rich.progress", None)
    with Progress(4, "SFT") as progress:
        progress.update(2, loss=0.25)
    text = "".join(terminal.written)
    assert "SFT step 1/4  loss 0.5" in text
    assert "SFT step 2/4  loss 0.25" in text
    assert "\x1b[" not in text


@pytest.fixture
def fastllm_logger() -> Iterator[logging.Logger]:
    logger = logging.getLogger("fastllm")
    before = list(logger.handlers), logger.level, logger.propagate
    yield logger
    logger.handlers[:], logger.level, logger.propagate = before


def test_messages_on_stderr(
    fastllm_logger: logging.Logger, capsys: pytest.CaptureFixture[str]
) -> None:
    configure_logging()
    configure_logging()  # not twice
    fastllm_logger.info("12 pairs dropped")
    fastllm_logger.warning("no %s", "kernel")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "12 pairs dropped\nwarning: no kernel\n"


def slowly(log: MetricsLog, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Lines wait at the disk until the event is set."""
    disk, write = threading.Event(), log._write

    def late(*line: Any) -> None:
        assert disk.wait(10)
        write(*line)

    monkeypatch.setattr(log, "_write", late)
    return disk


def test_a_slow_disk_holds_nobody_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with MetricsLog(tmp_path) as log:
        disk = slowly(log, monkeypatch)
        metrics = {"loss": 1.0}
        for step in range(3):
            log.log(step, metrics)
        metrics["loss"] = 2.0  # the caller's own business again
        assert read_metrics(tmp_path) == []
        disk.set()
    lines = read_metrics(tmp_path)
    assert [(line["step"], line["loss"]) for line in lines] == [(0, 1.0), (1, 1.0), (2, 1.0)]
    assert not [t for t in threading.enumerate() if t.name.startswith("fastllm-metrics")]


def test_a_crash_loses_no_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="crash"), MetricsLog(tmp_path) as log:
        disk = slowly(log, monkeypatch)
        log.log(1, {"loss": 1.0})
        disk.set()
        raise RuntimeError("crash")
    assert len(read_metrics(tmp_path)) == 1


@pytest.mark.parametrize("when", ["log", "flush", "close"])
def test_a_disk_that_is_full_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    log = MetricsLog(tmp_path)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(log, "_write", full)
    log.log(1, {"loss": 1.0})
    log._unwritten[0].exception(10)
    with pytest.raises(OSError, match="No space left"):
        log.log(2, {}) if when == "log" else getattr(log, when)()
    log.close()

"""What a run says: metrics for machines, progress for people."""

from __future__ import annotations

import json
import logging
import math
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Protocol

from ..model.files import replacing

METRICS = "metrics.jsonl"
_LOGGER = "fastllm"
_SINKS = ("none", "tensorboard")
_REFRESH = 0.1
"""Seconds between two states of a progress bar; steps may be much shorter."""


class MetricsLog:
    """Metrics of a run: `metrics.jsonl`, one JSON object a line, and TensorBoard when asked.

    A thread writes them, line after line, so that a slow disk does not hold up training; `flush`
    and `close` wait for it. A number that JSON does not have (NaN, infinity) is written as null.

    Args:
        run_dir: the run folder.
        report_to: "none" or "tensorboard", or a list of them.
        resumed_step: the step that the run goes on from. Lines of later steps and a last line
            that was cut short are dropped, so that the file reads like one uninterrupted run.
            None starts a new file.

    Raises:
        ValueError: an unknown sink, or TensorBoard without its package.
    """

    def __init__(
        self,
        run_dir: str | Path,
        report_to: str | Sequence[str] = "none",
        resumed_step: int | None = None,
    ) -> None:
        check_report_to(report_to)
        self.path = Path(run_dir) / METRICS
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = [] if resumed_step is None else _lines_until(self.path, resumed_step)
        with replacing(self.path) as beside:
            beside.write_text("".join(kept), encoding="utf-8")
        self._file: IO[str] = self.path.open("a", encoding="utf-8")
        self._board = None
        if "tensorboard" in _names(report_to):
            purge = None if resumed_step is None else resumed_step + 1
            writer = import_module("torch.utils.tensorboard").SummaryWriter
            self._board = writer(str(self.path.parent / "tensorboard"), purge_step=purge)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="fastllm-metrics")
        self._unwritten: deque[Future[None]] = deque()

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Have {"step": step, **metrics} written as soon as the lines before it are.

        Raises:
            OSError: an earlier line could not be written.
        """
        while self._unwritten and self._unwritten[0].done():
            self._unwritten.popleft().result()
        self._unwritten.append(self._thread.submit(self._write, step, dict(metrics)))

    def flush(self) -> None:
        """Return once every line is in the file.

        Raises:
            OSError: a line could not be written.
        """
        while self._unwritten:
            self._unwritten.popleft().result()

    def _write(self, step: int, metrics: dict[str, Any]) -> None:
        line = json.dumps(_finite({"step": step, **metrics}), allow_nan=False)
        self._file.write(line + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in metrics.items():
                if isinstance(value, int | float):
                    self._board.add_scalar(name, value, step)
            self._board.flush()

    def close(self) -> None:
        """Write what is left and end the thread.

        Raises:
            OSError: a line could not be written.
        """
        try:
            self.flush()
        finally:
            self._thread.shutdown()
            self._file.close()
            if self._board is not None:
                self._board.close()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def check_report_to(report_to: str | Sequence[str]) -> None:
    """Refuse a sink that is unknown or not installed, before any work is done.

    Raises:
        ValueError: with the names that there are, or the package to install.
    """
    for name in _names(report_to):
        if name not in _SINKS:
            raise ValueError(f"report_to: expected one of {', '.join(_SINKS)}; found {name!r}")
        if name == "tensorboard":
            try:
                import_module("tensorboard")
            except ModuleNotFoundError as error:
                raise ValueError(
                    "report_to='tensorboard' needs a package: pip install tensorboard"
                ) from error


def read_metrics(run_dir: str | Path) -> list[dict[str, Any]]:
    """Every line of a run's `metrics.jsonl`."""
    lines = (Path(run_dir) / METRICS).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def _names(report_to: str | Sequence[str]) -> list[str]:
    return [report_to] if isinstance(report_to, str) else list(report_to)


def _lines_until(path: Path, step: int) -> list[str]:
    if not path.exists():
        return []
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:  # the process was killed while it wrote this line
            continue
        if record["step"] <= step:
            kept.append(line + "\n")
    return kept


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return value


class _Display(Protocol):
    """Where progress is shown."""

    def show(self, step: int, text: Callable[[int], str], log: bool) -> None: ...

    def close(self) -> None: ...


class Progress:
    """Steps done, the loss, tokens per second and the time left.

    On a terminal this is a bar (with `rich`, where that is installed), elsewhere a line for each
    step that comes with metrics. It is a context manager.

    Args:
        total_steps: steps of the whole run.
        description: what is going on, for example "SFT".
        start: steps that an earlier process has done; they do not count into the speed.
        bar: False for lines on a terminal too.
    """

    def __init__(
        self, total_steps: int, description: str = "", start: int = 0, bar: bool = True
    ) -> None:
        self.total, self.start = total_steps, start
        self._tokens = 0
        self._shown: dict[str, float] = {}
        self._display: _Display | None = None
        self._description, self._bar = description, bar

    def __enter__(self) -> Progress:
        self._began = time.monotonic()
        self._display = _open_display(self._description, self.total, self.start, self._bar)
        return self

    def update(self, step: int, tokens: int = 0, **metrics: float) -> None:
        """Step `step` is done and read `tokens` more tokens; with metrics it is worth a line."""
        self._tokens += tokens
        self._shown |= metrics
        if self._display is not None:
            self._display.show(step, self._text, log=bool(metrics))

    @property
    def tokens_per_second(self) -> float:
        """Tokens of this process over its time so far."""
        return self._tokens / max(time.monotonic() - self._began, 1e-9)

    def _text(self, step: int) -> str:
        parts = [f"{name} {_brief(value)}" for name, value in self._shown.items()]
        if self._tokens:
            parts.append(f"{self.tokens_per_second:,.0f} tokens/s")
        done = step - self.start
        if done > 0:
            seconds = (time.monotonic() - self._began) / done * (self.total - step)
            parts.append(f"{_clock(seconds)} left")
        return "  ".join(parts)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._display is not None:
            self._display.close()


def _open_display(description: str, total: int, start: int, bar: bool) -> _Display:
    if bar and sys.stderr.isatty():
        try:
            return _Bar(description, total, start)
        except ModuleNotFoundError as error:
            if error.name is None or error.name.partition(".")[0] != "rich":
                raise
    return _Lines(description, total)


class _Bar:
    """A bar at the bottom of the terminal; messages scroll above it."""

    def __init__(self, description: str, total: int, start: int) -> None:
        rich = import_module("rich.progress")
        console = import_module("rich.console").Console(stderr=True)
        self._progress = rich.Progress(
            rich.TextColumn("{task.description}"),
            rich.BarColumn(bar_width=30),
            rich.MofNCompleteColumn(),
            rich.TextColumn("{task.fields[text]}"),
            console=console,
        )
        self._task = self._progress.add_task(description, total=total, completed=start, text="")
        self._last: tuple[int, Callable[[int], str]] | None = None
        self._shown = 0.0
        self._progress.start()

    def show(self, step: int, text: Callable[[int], str], log: bool) -> None:
        self._last = step, text
        if log or time.monotonic() - self._shown > _REFRESH:
            self._update(step, text)

    def _update(self, step: int, text: Callable[[int], str]) -> None:
        self._progress.update(self._task, completed=step, text=text(step))
        self._shown = time.monotonic()

    def close(self) -> None:
        if self._last is not None:
            self._update(*self._last)
        self._progress.stop()


class _Lines:
    """One line on stderr for each step that is worth it."""

    def __init__(self, description: str, total: int) -> None:
        self._head, self._total = f"{description} " if description else "", total

    def show(self, step: int, text: Callable[[int], str], log: bool) -> None:
        if log:
            line = f"{self._head}step {step}/{self._total}  {text(step)}"
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        pass


def _brief(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class _StandardError(logging.StreamHandler):
    """Writes to what `sys.stderr` is at that moment: a progress bar puts itself there."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> IO[str]:
        return sys.stderr


class _Format(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        message = super().format(record)
        if record.levelno >= logging.WARNING:
            return f"{record.levelname.lower()}: {message}"
        return message


def configure_logging(level: int = logging.INFO) -> None:
    """Send fastllm's messages to stderr: for the command line, not for libraries."""
    logger = logging.getLogger(_LOGGER)
    logger.setLevel(level)
    if not any(isinstance(handler, _StandardError) for handler in logger.handlers):
        handler = _StandardError()
        handler.setFormatter(_Format("%(message)s"))
        logger.addHandler(handler)
        logger.propagate = False

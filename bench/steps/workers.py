"""The parent's side: contenders as processes that sleep until it is their turn."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..allocator import KEEP

ROOT = Path(__file__).resolve().parents[2]
OURS, PEER = "bench.steps.ours", "bench.peers.worker"


class Failed(RuntimeError):
    """A worker ended before its time; the message is the end of what it printed."""


@dataclass(frozen=True)
class Contender:
    """A way to do a case's work."""

    name: str
    module: str
    settings: dict[str, Any] = field(default_factory=dict)
    keep_memory: bool = True
    tolerance: float | None = None
    """How far its results may be from the reference's; None: as the case says."""
    compared: int | None = None
    """How many of its results are compared; None: all."""
    backend: str = ""
    """FASTLLM_BACKEND of the process."""
    package: str = ""
    """A package of the peers' environment that is not in every one."""

    def command(self, folder: Path, python: Path) -> list[str]:
        interpreter = sys.executable if self.module == OURS else str(python)
        return [interpreter, "-m", self.module, str(folder), json.dumps(self.settings)]

    def environment(self, threads: int, keep_memory: bool) -> dict[str, str]:
        """What the process starts with: the same threads for all, the allocator as chosen."""
        own = {k: v for k, v in os.environ.items() if k not in KEEP}
        own |= {
            "OMP_NUM_THREADS": str(threads),
            "MKL_NUM_THREADS": str(threads),
            "PYTHONPATH": str(ROOT),
        }
        if self.backend:
            own["FASTLLM_BACKEND"] = self.backend
        return own | KEEP if keep_memory else own


class Worker:
    """A running contender."""

    def __init__(self, command: list[str], environment: dict[str, str], log: Path) -> None:
        self.checks: list[list[float]] = []
        """What each block gave that can be compared."""
        self._log = log
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )

    @property
    def curve(self) -> list[float]:
        """The first result of each block: of a trainer, the mean loss."""
        return [check[0] for check in self.checks]

    def wait_ready(self) -> None:
        """Until everything is loaded."""
        self._answer()

    def block(self, count: int) -> dict[str, Any]:
        """Run a block of steps: {"seconds", "steps", "check", "tokens"}.

        Raises:
            Failed: the process ended.
        """
        answer = self._ask(f"block {count}")
        self.checks.append(answer["check"])
        return answer

    def end(self) -> float:
        """Ask it to end; its peak memory in bytes."""
        peak = self._ask("end")["peak_mb"] * 1e6
        self.kill()
        return peak

    def kill(self) -> None:
        """End the process if it still runs."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            # What it was never told, because it ended, cannot be written any more.
            with contextlib.suppress(BrokenPipeError):
                pipe.close()

    def _ask(self, command: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(command + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended: its last words are more use than this
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            last = [text for text in self._log.read_text().splitlines() if text.strip()][-1:]
            raise Failed(f"ended with status {status}: {' '.join(last) or 'said nothing'}")
        return json.loads(line)

"""Starts workers, hands them sections, and passes their records on as they come.

A worker that dies, or says nothing for too long, costs the case that it was at: that is recorded,
and a new worker goes on with the next case.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import queue
import select
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..options import Options
from ..records import OURS, Record
from . import protocol
from .protocol import Order
from .sections import WHOLE_SECONDS, Budget

ROOT = Path(__file__).parents[2]

# A worker that is silent for so long hangs. Compilation of the largest contender takes less.
SILENCE_SECONDS = 75.0
# Beyond its deadline a section may finish what it is at, for so long.
GRACE_SECONDS = 20.0

# Workers that check at a time: most of that time is compilation, on the host.
CHECKERS = 6


def run(options: Options) -> Iterator[Record]:
    """All records of the sections, in the order in which they come."""
    sections, seed = options.sections, options.seed or 0
    budget = Budget(time.time() + (options.minutes * 60 if options.minutes else WHOLE_SECONDS))
    command = sys.executable, "-m", "bench.cuda.worker", options.device
    crew, rates = Crew(command), dict[str, float]()
    try:
        for number, name in enumerate(sections):
            order = Order(
                name,
                options.scale,
                {"full": 5, "quick": 3, "tiny": 2}[options.scale],
                seed,
                budget.deadline(time.time(), name, sections[number + 1 :]),
                compile=options.compile,
                only=options.only,
                parts=CHECKERS if name == "check" and options.device == "cuda" else 1,
            )
            yield from _in_parts(order, crew, rates)
            crew.shrink(1)
    finally:
        crew.shrink()


def _in_parts(order: Order, crew: Crew, rates: dict[str, float]) -> Iterator[Record]:
    """The records of all workers of a section, as they come."""
    records: queue.Queue[Record | BaseException | None] = queue.Queue()

    def drive(part: int) -> None:
        try:
            for record in section(dataclasses.replace(order, part=part), crew, rates):
                records.put(record)
        except BaseException as error:
            records.put(error)
        finally:
            records.put(None)

    threads = [
        threading.Thread(target=drive, args=(part,), daemon=True) for part in range(order.parts)
    ]
    for thread in threads:
        thread.start()
    running = len(threads)
    while running:
        found = records.get()
        if found is None:
            running -= 1
        elif isinstance(found, BaseException):
            raise found
        else:
            yield found


def section(order: Order, crew: Crew, rates: dict[str, float]) -> Iterator[Record]:
    """The records of one worker, and of those that take its place."""
    done: list[str] = list(order.done)
    if time.time() >= order.deadline:
        note = "left out: there was no time for it"
        yield Record(order.section, order.section, "", "", OURS, note=note)
        return
    begun = "at the start"
    while begun and time.time() < order.deadline:
        order = dataclasses.replace(order, done=tuple(done), rates=dict(rates))
        doing = begun = ""
        worker = crew.take()
        worker.tell(order)
        for found in worker.messages(order.deadline + GRACE_SECONDS):
            match found["kind"]:
                case "record":
                    yield protocol.unpacked(found["record"])
                case "rates":
                    rates |= found["rates"]
                case "begin":
                    begun = doing = found["case"]
                case "doing":
                    doing = found["what"]
                case "ended":
                    done.append(found["case"])
                    begun = ""
                case "finished":
                    crew.give(worker)
                    return
        worker.dismiss()
        yield _lost(order, begun, doing, worker.why)
        done.append(begun)
    yield _lost(order, "", "", "the cases after this one were left out")


def _lost(order: Order, begun: str, doing: str, why: str) -> Record:
    """What is known of a case whose worker did not live to tell."""
    name, label, dtype = begun.split(" | ") if begun else (order.section, "", "")
    at = f" at {doing}" if doing and doing != begun else ""
    return Record(order.section, name, label, dtype, OURS, note=f"ERROR: {why}{at}")


class Crew:
    """Workers that wait for another section: to start one takes seconds."""

    def __init__(self, command: Sequence[str]) -> None:
        self._command = tuple(command)
        self._idle: list[_Worker] = []

    def take(self) -> _Worker:
        """One that waits, or a new one."""
        try:
            return self._idle.pop()
        except IndexError:
            return _Worker(self._command)

    def give(self, worker: _Worker) -> None:
        """It has finished a section."""
        self._idle.append(worker)

    def shrink(self, size: int = 0) -> None:
        """Dismiss all but so many of those that wait."""
        while len(self._idle) > size:
            self._idle.pop().dismiss()


class _Worker:
    """A worker process, and the pipe on which it answers."""

    def __init__(self, command: Sequence[str]) -> None:
        self.why = ""
        self._end, theirs = os.pipe()
        self._process = subprocess.Popen(
            [*command, str(theirs)],
            stdin=subprocess.PIPE,
            stdout=sys.stderr,
            pass_fds=(theirs,),
            cwd=ROOT,
            text=True,
        )
        os.close(theirs)

    def dismiss(self) -> None:
        """End it, which it does by itself when there are no more orders."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(2.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._end)

    def tell(self, order: Order) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died; `messages` will say so
            self._process.stdin.write(order.line())
            self._process.stdin.flush()

    def messages(self, until: float) -> Iterator[dict[str, Any]]:
        """What it says; ends when it finishes, dies, is silent or late, and `why` says which."""
        rest = b""
        while True:
            patience = min(SILENCE_SECONDS, until - time.time())
            ready = patience > 0 and select.select([self._end], [], [], patience)[0]
            if not ready:
                late = time.time() >= until
                self.why = "the section's time is over" if late else "hangs: nothing was heard"
                self._process.kill()
                return
            heard = os.read(self._end, 1 << 16)
            if not heard:
                self.why = f"its process ended with status {self._process.wait()}"
                return
            *lines, rest = (rest + heard).split(b"\n")
            yield from map(json.loads, lines)

"""SIGTERM, as schedulers send it before they take the machine away: finish the step, then go."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

EXIT_CODE = 128 + signal.SIGTERM


class Terminated(SystemExit):
    """The run was asked to end and did, with its state saved; the process ends with code 143."""

    def __init__(self, message: str) -> None:
        super().__init__(EXIT_CODE)
        self.message = message

    def __str__(self) -> str:
        return self.message


class Request:
    """Whether the process was asked to end."""

    def __init__(self) -> None:
        self.made = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.made = True
        signal.signal(number, signal.SIG_DFL)  # asked a second time, it ends at once


@contextmanager
def watching() -> Iterator[Request]:
    """Notice SIGTERM instead of dying of it.

    A handler that is there already stays in charge, and threads other than the main one cannot
    have any: then no request is ever made.
    """
    request = Request()
    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield request
        return
    signal.signal(signal.SIGTERM, request)
    try:
        yield request
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

"""What comes next, prepared beside the step in progress."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Ahead(Generic[Item]):
    """Item `number` of a sequence, with the ones after it on their way.

    Items arrive in the order of their numbers, whichever thread was faster. An exception of a
    thread is raised where its item is asked for, with its own traceback.

    Args:
        task: gives the work for an item; called in the caller's thread, in order, so that it may
            remember things.
        workers: threads that do that work; 0: the caller does it itself, when it is asked.
        depth: items on their way beyond the one that is asked for.
    """

    def __init__(self, task: Callable[[int], Callable[[], Item]], workers: int, depth: int) -> None:
        self._task, self._workers, self._depth = task, workers, depth
        self._pool: ThreadPoolExecutor | None = None
        self._coming: deque[Future[Item]] = deque()
        self._first = 0

    def get(self, number: int) -> Item:
        """The item `number`. Asking for another one than the next begins anew there."""
        if not self._workers:
            return self._task(number)()
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._workers, thread_name_prefix="fastllm-ahead")
        if number != self._first:
            self._forget()
            self._first = number
        while len(self._coming) <= self._depth:
            work = self._task(self._first + len(self._coming))
            self._coming.append(self._pool.submit(work))
        self._first += 1
        return self._coming.popleft().result()

    def close(self) -> None:
        """Leave no thread behind."""
        self._forget()
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None

    def _forget(self) -> None:
        for future in self._coming:
            future.cancel()
        self._coming.clear()

"""The parts of TRL's GRPO step, timed by wrapping the trainer's own methods."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any


class Stopwatch:
    """Seconds in the methods of a trainer since `parts` was last asked.

    Prefill is the first forward call of each `generate`, decoding the rest of it. Training is all
    that is not preparing a batch: forward, backward, optimizer, logging. What remains is
    preparation that is neither generation nor scoring.
    """

    def __init__(self) -> None:
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._waiting_for_prefill = False

    def follow(self, trainer: Any) -> None:
        """Wrap the methods of this trainer and its model."""
        generate, forward = trainer.model.generate, trainer.model.forward

        def first_forward(*inputs: Any, **more: Any) -> Any:
            if not self._waiting_for_prefill:
                return forward(*inputs, **more)
            self._waiting_for_prefill = False
            return self._timed("prefill", forward)(*inputs, **more)

        def generate_and_wait(*inputs: Any, **more: Any) -> Any:
            self._waiting_for_prefill = True
            return generate(*inputs, **more)

        trainer.model.forward = first_forward
        trainer.model.generate = self._timed("generate", generate_and_wait)
        for name in ("_calculate_rewards", "_prepare_inputs"):
            setattr(trainer, name, self._timed(name, getattr(trainer, name)))

    def parts(self, log: dict[str, Any], steps: int, seconds: float) -> dict[str, float]:
        """Seconds of each part of a block that took so many."""
        taken, self._seconds = self._seconds, defaultdict(float)
        generation, scoring = taken["generate"], taken["_calculate_rewards"]
        return {
            "prefill": taken["prefill"],
            "decoding": generation - taken["prefill"],
            "scoring": scoring,
            "training": seconds - taken["_prepare_inputs"],
            "rest": taken["_prepare_inputs"] - generation - scoring,
        }

    def _timed(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*inputs: Any, **more: Any) -> Any:
            started = time.perf_counter()
            try:
                return method(*inputs, **more)
            finally:
                self._seconds[name] += time.perf_counter() - started

        return timed

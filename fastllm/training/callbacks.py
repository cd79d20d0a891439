"""Callbacks with the events and arguments of `transformers.TrainerCallback`.

An object needs only the methods it cares about, so TrainerCallback's subclasses work and
nothing has to be imported from transformers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any


@dataclass
class TrainerState:
    """Where a run is; the fields are those of `transformers.TrainerState`."""

    global_step: int = 0
    max_steps: int = 0
    epoch: float = 0.0
    num_input_tokens_seen: int = 0
    log_history: list[dict[str, Any]] = field(default_factory=list)
    is_world_process_zero: bool = True


@dataclass
class TrainerControl:
    """What a callback can ask the loop to do after the current step."""

    should_training_stop: bool = False
    should_save: bool = False
    should_evaluate: bool = False
    should_log: bool = False


class Callbacks:
    """Calls every callback that has a method for the event."""

    def __init__(self, callbacks: Iterable[Any] | None, args: Any) -> None:
        self._callbacks = [c() if isinstance(c, type) else c for c in callbacks or ()]
        self._args = args

    def add(self, callback: Any) -> None:
        self._callbacks.append(callback() if isinstance(callback, type) else callback)

    def call(self, event: str, state: TrainerState, control: TrainerControl, **extra: Any) -> None:
        """Call `event` ("on_step_end", ...) as `callback.event(args, state, control, **extra)`."""
        for callback in self._callbacks:
            method = getattr(callback, event, None)
            if method is not None:
                method(self._args, state, control, **extra)

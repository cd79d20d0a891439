"""What came of a step: read from the device while the next step runs, never waited for."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .averages import Averages, on_host
from .callbacks import TrainerState
from .device_adamw import DeviceAdamW
from .optimizer import Optimizer

_log = logging.getLogger("fastllm")


class NumericError(RuntimeError):
    """The loss or a gradient is not finite; the weights are those before the bad step.

    On a GPU the numbers of a step are read while the next one is computed: callbacks may have
    heard of the bad step's end by then. It changed no weight, nor did the one after it.
    """


class Numbers:
    """Scalars on their way to the host. From a GPU they travel behind the work that makes them."""

    def __init__(self, scalars: Sequence[Tensor]) -> None:
        self._event: torch.cuda.Event | None = None
        if scalars[0].device.type == "cuda":
            self._host, self._event = _sent(scalars)
        else:
            self._values = on_host(scalars)

    def read(self) -> list[float]:
        """Their values; waits for the work before them, not for what was asked for since."""
        if self._event is not None:
            self._event.synchronize()
            self._values, self._event = self._host.tolist(), None
        return self._values


def _sent(scalars: Sequence[Tensor]) -> tuple[Tensor, torch.cuda.Event]:
    values = torch.stack([x.detach().double() for x in scalars])
    host = torch.empty(len(scalars), dtype=torch.float64, pin_memory=True)
    host.copy_(values, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return host, event


@dataclass(frozen=True)
class _Unread:
    step: int
    numbers: Numbers
    before: dict[str, float]
    """The trainer's state when the step began."""


class Outcomes:
    """Loss and gradient norm of each step, looked at in their order.

    Args:
        averages: where finite ones go.
        state: of the trainer; it goes back to before a bad step.
        scaled: fp16: an overflow of the gradients is no error, its step was skipped.
        lag: steps that may be unread when the next one begins: 1 on a GPU, which so never runs
            dry while the host looks, else 0.
    """

    def __init__(self, averages: Averages, state: TrainerState, scaled: bool, lag: int) -> None:
        self._averages, self._state, self._scaled, self._lag = averages, state, scaled, lag
        self._unread: deque[_Unread] = deque()
        self.loss_sum = 0.0

    def add(self, norm: Tensor, loss: Tensor) -> None:
        """The step `state.global_step` is under way; the state does not know of it yet."""
        before = {name: getattr(self._state, name) for name in _STATE}
        self._unread.append(_Unread(self._state.global_step, Numbers([norm, loss]), before))

    def look(self) -> None:
        """At all but the newest `lag` steps.

        Raises:
            NumericError: see there.
        """
        self._read(self._lag)

    def settle(self) -> None:
        """Look at every step: before what was computed is written down anywhere.

        Raises:
            NumericError: see there.
        """
        self._read(0)

    def _read(self, keep: int) -> None:
        while len(self._unread) > keep:
            one = self._unread.popleft()
            norm, loss = one.numbers.read()
            self._check(one, norm, loss)
            self._averages.add({"loss": (loss, 1)})
            if math.isfinite(norm):
                self._averages.add({"grad_norm": (norm, 1)})
            self.loss_sum += loss

    def _check(self, one: _Unread, norm: float, loss: float) -> None:
        if math.isfinite(norm) and math.isfinite(loss):
            return
        number = one.step + 1
        if self._scaled and math.isfinite(loss):
            _log.info("step %d: fp16 gradients overflowed, step skipped, scale lowered", number)
            return
        vars(self._state).update(one.before)
        raise NumericError(
            f"step {number}: loss {loss}, gradient norm {norm}. The weights were not changed and "
            "nothing was saved; try a lower learning rate or dtype fp32"
        )


_STATE = ("global_step", "epoch", "num_input_tokens_seen")


def lag_of(optimizer: Optimizer) -> int:
    """Steps that the host may be behind: where a device decides by itself that a step is bad, and
    leaves out those after it."""
    device = optimizer.named_parameters[0][1].device
    return int(device.type == "cuda" and isinstance(optimizer.adamw, DeviceAdamW))

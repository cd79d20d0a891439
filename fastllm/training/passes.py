"""One forward and backward pass: what it is made of, and how it is computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from .averages import Metric
from .optimizer import Optimizer

# (model, batch) -> (sum of the loss over the batch, metrics)
LossFn = Callable[[Any, Any], tuple[Tensor, dict[str, Metric]]]


@dataclass(frozen=True)
class Pass:
    """One forward and backward pass: a micro-batch and what it counts for."""

    batch: Any
    """What the loss function takes."""
    weight: float
    """Its part of the step's normaliser: loss tokens, pairs, or as the loss defines it."""
    tokens: int
    """Tokens of its sequences, shared prefixes counted for each sequence, padding not."""


class Passes(Protocol):
    """How the passes of a step are computed."""

    def begin(self) -> None:
        """A step begins: no parameter has a gradient yet."""

    def __call__(self, one: Pass, normaliser: float) -> tuple[Tensor, dict[str, Metric]]:
        """The loss of a pass over `normaliser` and its metrics; adds its gradients."""


class OpByOp:
    """Each op by itself, whatever the sizes."""

    def __init__(self, model: nn.Module, loss_fn: LossFn, optimizer: Optimizer) -> None:
        self._model, self._loss_fn, self._optimizer = model, loss_fn, optimizer

    def begin(self) -> None:
        pass

    def __call__(self, one: Pass, normaliser: float) -> tuple[Tensor, dict[str, Metric]]:
        loss, metrics = self._loss_fn(self._model, one.batch)
        # Dividing by the global count before summing makes the gradient that of the mean
        # over the whole step, however it was cut into passes and ranks.
        loss = loss / normaliser
        self._optimizer.backward(loss)
        return loss.detach(), metrics

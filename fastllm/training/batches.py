"""Examples into the passes of each optimizer step: the source that SFT and reward models share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from . import distributed
from .ahead import Ahead
from .averages import Metric
from .config import TrainingConfig
from .passes import Pass
from .sampler import EpochSampler

# Examples of one pass -> (batch, its part of the normaliser, its tokens).
Collate = Callable[[Sequence[Any]], tuple[Any, float, int]]
# A packed batch -> what gives it once it is where it is computed; see prefetch.py.
Send = Callable[[Any], Callable[[], Any]]
Coming = Callable[[], Pass]

_LOOKED_AT = 1 << 20
"""Examples whose lengths are added up in the search for the largest pass."""


class BatchSource:
    """Shuffled epochs over encoded examples, packed while the step before is computed.

    Args:
        examples: encoded examples.
        collate: packs the examples of one pass; it draws no random numbers and starts no threads.
        config: batch sizes, seed, threads.
        send: begins to put a packed batch where it is computed, in any thread; what it gives is
            called by the computing thread for the batch.
    """

    def __init__(
        self,
        examples: Sequence[Any],
        collate: Collate,
        config: TrainingConfig,
        send: Send,
    ) -> None:
        self._examples, self._collate, self._send = examples, collate, send
        self._per_pass = config.per_device_train_batch_size
        per_rank = self._per_pass * config.gradient_accumulation_steps
        per_step = per_rank * distributed.world_size()
        self._sampler = EpochSampler(len(examples), per_step, config.seed)
        self.steps_per_epoch = self._sampler.steps_per_epoch
        workers = config.dataloader_num_workers
        self._ahead = Ahead(self._packing, workers, workers * config.dataloader_prefetch_factor)

    def passes(self, step: int) -> list[Pass]:
        return [arrived() for arrived in self._ahead.get(step)]

    def _packing(self, step: int) -> Callable[[], list[Coming]]:
        rank, world = distributed.rank(), distributed.world_size()
        chosen = [self._examples[i] for i in self._sampler.indices(step, rank, world)]
        return partial(_sent, chosen, self._per_pass, self._collate, self._send)

    def largest(self, steps: int, length: Callable[[Any], int]) -> Any:
        """The batch of the pass with the most tokens of this rank's first steps, on the CPU.

        Args:
            steps: of the run; of a very long one, the beginning stands for the rest.
            length: tokens of an example.
        """
        rank, world = distributed.rank(), distributed.world_size()
        lengths = [length(example) for example in self._examples]
        most, chosen = -1, [0]
        for step in range(min(steps, max(1, _LOOKED_AT // self._sampler.per_step))):
            indices = self._sampler.indices(step, rank, world)
            for first in range(0, len(indices), self._per_pass):
                own = indices[first : first + self._per_pass]
                tokens = sum(lengths[i] for i in own)
                if tokens > most:
                    most, chosen = tokens, own
        return self._collate([self._examples[i] for i in chosen])[0]

    def metrics(self) -> dict[str, Metric]:
        return {}

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {}, {}

    def restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """The step number says it all."""

    def close(self) -> None:
        self._ahead.close()


def collated(examples: Sequence[Any], size: int, collate: Collate, send: Send) -> list[Pass]:
    """Examples in their order, `size` to a pass, where they are computed."""
    return [arrived() for arrived in _sent(examples, size, collate, send)]


def _sent(examples: Sequence[Any], size: int, collate: Collate, send: Send) -> list[Coming]:
    coming: list[Coming] = []
    for first in range(0, len(examples), size):
        batch, weight, tokens = collate(examples[first : first + size])
        coming.append(partial(_arrived, send(batch), weight, tokens))
    return coming


def _arrived(batch: Callable[[], Any], weight: float, tokens: int) -> Pass:
    return Pass(batch(), weight, tokens)

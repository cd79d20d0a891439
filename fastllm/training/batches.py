"""Examples into the passes of each optimizer step: the source that SFT and reward models share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import distributed
from .ahead import Ahead
from .averages import Metric
from .config import TrainingConfig
from .loop import Pass
from .sampler import EpochSampler

# Examples of one pass -> (batch, its part of the normaliser, its tokens).
Collate = Callable[[Sequence[Any]], tuple[Any, float, int]]


class BatchSource:
    """Shuffled epochs over encoded examples, packed while the step before is computed.

    Args:
        examples: encoded examples.
        collate: packs the examples of one pass; it draws no random numbers and starts no threads.
        config: batch sizes, seed, threads.
        device: where batches go.
    """

    def __init__(
        self,
        examples: Sequence[Any],
        collate: Collate,
        config: TrainingConfig,
        device: torch.device,
    ) -> None:
        self._examples, self._collate, self._device = examples, collate, device
        self._per_pass = config.per_device_train_batch_size
        per_rank = self._per_pass * config.gradient_accumulation_steps
        per_step = per_rank * distributed.world_size()
        self._sampler = EpochSampler(len(examples), per_step, config.seed)
        self.steps_per_epoch = self._sampler.steps_per_epoch
        workers = config.dataloader_num_workers
        self._ahead = Ahead(self._packing, workers, workers * config.dataloader_prefetch_factor)

    def passes(self, step: int) -> list[Pass]:
        return self._ahead.get(step)

    def _packing(self, step: int) -> Callable[[], list[Pass]]:
        rank, world = distributed.rank(), distributed.world_size()
        chosen = [self._examples[i] for i in self._sampler.indices(step, rank, world)]
        return partial(collated, chosen, self._per_pass, self._collate, self._device)

    def metrics(self) -> dict[str, Metric]:
        return {}

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {}, {}

    def restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """The step number says it all."""

    def close(self) -> None:
        self._ahead.close()


def collated(
    examples: Sequence[Any], size: int, collate: Collate, device: torch.device
) -> list[Pass]:
    """Examples in their order, `size` to a pass, on `device`."""
    passes = []
    for first in range(0, len(examples), size):
        batch, weight, tokens = collate(examples[first : first + size])
        passes.append(Pass(batch.to(device), weight, tokens))
    return passes

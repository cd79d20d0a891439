"""Which examples a step trains on: a pure function of seed, epoch and step.

Nothing advances, so nothing has to be saved: a resumed run asks for step k and gets step k.
"""

from __future__ import annotations

import math

import torch


class EpochSampler:
    """Shuffled epochs over `size` examples, cut into steps and ranks.

    Args:
        size: number of examples.
        per_step: examples of one optimizer step, over all ranks. The last step of an epoch
            takes what is left.
        seed: of the permutations.
        shuffle: False keeps the order of the data.
    """

    def __init__(self, size: int, per_step: int, seed: int, shuffle: bool = True) -> None:
        self.size, self.per_step = size, per_step
        self.steps_per_epoch = math.ceil(size / per_step)
        self._seed, self._shuffle = seed, shuffle
        self._epoch = -1
        self._order: list[int] = []

    def indices(self, step: int, rank: int = 0, world_size: int = 1) -> list[int]:
        """Examples of `step` for one rank; ranks take every world_size-th one."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._permutation(epoch)
        first = position * self.per_step
        return self._order[first : first + self.per_step][rank::world_size]

    def _permutation(self, epoch: int) -> list[int]:
        if not self._shuffle:
            return list(range(self.size))
        generator = torch.Generator().manual_seed((self._seed << 20) + epoch)
        return torch.randperm(self.size, generator=generator).tolist()

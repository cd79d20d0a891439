"""Which examples a step trains on: a pure function of seed, epoch and step.

Nothing advances, so nothing has to be saved: a resumed run asks for step k and gets step k.
"""

from __future__ import annotations

import itertools
import math

import torch

_REPLACEMENTS = 1 << 62
"""Far from the seeds of the epochs."""


class EpochSampler:
    """Shuffled epochs over `size` examples, cut into steps and ranks.

    Args:
        size: number of examples.
        per_step: examples of one optimizer step, over all ranks. The last step of an epoch
            takes what is left.
        seed: of the permutations.
        shuffle: False keeps the order of the data.
        fill: complete the last step of an epoch with examples from the epoch's beginning.
    """

    def __init__(
        self, size: int, per_step: int, seed: int, shuffle: bool = True, fill: bool = False
    ) -> None:
        self.size, self.per_step = size, per_step
        self.steps_per_epoch = math.ceil(size / per_step)
        self._seed, self._shuffle, self._fill = seed, shuffle, fill
        self._epoch = -1
        self._order: list[int] = []

    def indices(self, step: int, rank: int = 0, world_size: int = 1) -> list[int]:
        """Examples of `step` for one rank; ranks take every world_size-th one."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._permutation(epoch)
            if self._fill:
                whole = self.steps_per_epoch * self.per_step
                self._order = list(itertools.islice(itertools.cycle(self._order), whole))
        first = position * self.per_step
        return self._order[first : first + self.per_step][rank::world_size]

    def others(self, step: int, rank: int = 0, world_size: int = 1) -> list[int]:
        """Examples that `step` has on no rank, in the order in which they may replace its own.

        Without shuffling these are the ones that come next; else each step has an order of its
        own.
        """
        taken = self.indices(step)
        if self._shuffle:
            seed = _REPLACEMENTS + (self._seed << 20) + step
            order = torch.randperm(self.size, generator=torch.Generator().manual_seed(seed))
            every = order.tolist()
        else:
            after = taken[-1] + 1
            every = [*range(after, self.size), *range(after)]
        used = set(taken)
        return [i for i in every if i not in used][rank::world_size]

    def _permutation(self, epoch: int) -> list[int]:
        if not self._shuffle:
            return list(range(self.size))
        generator = torch.Generator().manual_seed((self._seed << 20) + epoch)
        return torch.randperm(self.size, generator=generator).tolist()

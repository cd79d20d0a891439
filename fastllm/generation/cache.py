"""The KV cache of a rollout: a prefix plus tails.

The keys and values of all prompts lie packed in one row, stored once however many completions
continue a prompt; each running sequence has a *tail* for the tokens that it generated. A tail is
named by its row, so that a sequence that ends gives its row back and no other one moves.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import ops
from ..layout import PackedLayout

# Tails start this long at most and double when they are full: most completions are short.
_FIRST_TAIL = 128


class KVCache:
    """Keys and values of every layer for the prompts and the running sequences.

    Args:
        rows: how many sequences may run at a time (R).
        max_tail: the longest tail that any sequence can need, in tokens.
    """

    def __init__(self, rows: int, max_tail: int) -> None:
        self.prefix: list[tuple[Tensor, Tensor]] = []
        """Keys and values of the prompts, for each layer [Tp, K, D]."""
        self.prefix_starts = torch.zeros(1, dtype=torch.int32)
        """First row of each prompt, and Tp at the end [G + 1], int32."""
        self.tails: list[tuple[Tensor, Tensor]] = []
        """Keys and values of the generated tokens, for each layer [R, M, K, D]."""
        self._rows, self._max_tail = rows, max_tail
        self._free = list(range(rows))

    @property
    def num_prompts(self) -> int:
        return self.prefix_starts.numel() - 1

    @property
    def free_rows(self) -> int:
        """How many more sequences may run."""
        return len(self._free)

    @property
    def tail_capacity(self) -> int:
        """Tokens that fit into a tail (M)."""
        return self.tails[0][0].shape[1] if self.tails else 0

    @property
    def num_bytes(self) -> int:
        """Memory of all keys and values."""
        return sum(t.nbytes for pair in (*self.prefix, *self.tails) for t in pair)

    # -- prompts -------------------------------------------------------------------------------

    def append(self, prompts: Sequence[tuple[Tensor, Tensor]], starts: Tensor) -> None:
        """Add prompts after those that are here.

        Args:
            prompts: keys and values of every layer [T, K, D], as a packed prefill computed them.
            starts: first row of each new prompt, and T at the end [G + 1], int32.
        """
        if not self.prefix:
            self.prefix, self.prefix_starts = list(prompts), starts
            return
        self.prefix = [
            (torch.cat((k, new_k)), torch.cat((v, new_v)))
            for (k, v), (new_k, new_v) in zip(self.prefix, prompts, strict=True)
        ]
        shifted = starts[1:] + self.prefix_starts[-1]
        self.prefix_starts = torch.cat((self.prefix_starts, shifted))

    def keep_prompts(self, groups: Tensor) -> Tensor:
        """Drop the prompts that nobody continues any more.

        Args:
            groups: prompt of each sequence that is still needed [B], int32.

        Returns:
            The same prompts by their new numbers [B], int32.
        """
        kept, renumbered = torch.unique(groups, return_inverse=True)
        if kept.numel() < self.num_prompts:
            first = self.prefix_starts[kept.long()].long()
            lengths = self.prefix_starts[kept.long() + 1].long() - first
            ends = lengths.cumsum(0)
            rows = torch.arange(int(lengths.sum()), device=groups.device)
            rows += torch.repeat_interleave(first - (ends - lengths), lengths)
            self.prefix = [(k[rows], v[rows]) for k, v in self.prefix]
            self.prefix_starts = torch.cat((ends.new_zeros(1), ends)).int()
        return renumbered.int()

    # -- tails ---------------------------------------------------------------------------------

    def take_rows(self, count: int) -> Tensor:
        """Rows for `count` sequences that begin [count], int32."""
        taken, self._free = self._free[:count], self._free[count:]
        return torch.tensor(taken, dtype=torch.int32, device=self.prefix_starts.device)

    def give_back(self, rows: Tensor) -> None:
        """Rows of sequences that ended; the next ones to begin may have them."""
        self._free = sorted(self._free + rows.tolist())

    def reserve(self, length: int, running: Tensor, waiting: int) -> Tensor:
        """Make room for tails of `length` tokens.

        Args:
            length: tokens that the longest tail is about to have.
            running: rows of the running sequences [B], int32.
            waiting: how many sequences have not begun; fewer rows are kept when they are few.

        Returns:
            The rows of the running sequences from now on [B], int32.
        """
        if length <= self.tail_capacity:
            return running
        capacity = self.tail_capacity
        size = min(self._max_tail, max(_FIRST_TAIL, 2 * capacity, length))
        rows = min(self._rows, running.numel() + waiting)
        for layer, (k, v) in enumerate(self.prefix):
            # Zeros, because a masked value still takes part in a product: 0 * NaN is NaN.
            fresh = [t.new_zeros(rows, size, *t.shape[1:]) for t in (k, v)]
            if capacity:
                for new, old in zip(fresh, self.tails[layer], strict=True):
                    new[: running.numel(), :capacity] = old[running.long()]
            self.tails[layer : layer + 1] = [(fresh[0], fresh[1])]
        self._free = list(range(running.numel(), rows))
        return torch.arange(running.numel(), dtype=torch.int32, device=running.device)


class PrefillAttend:
    """Reading packed prompts: plain packed attention that keeps what it computes.

    Args:
        layout: one segment per prompt, no prefixes.
        rows: packed rows whose hidden state is wanted [N], as passed to the trunk.
    """

    def __init__(self, layout: PackedLayout, rows: Tensor) -> None:
        self._layout, self._selected = layout, layout.select(rows)
        self.positions, self.max_position = layout.positions, layout.max_position
        self.computed: list[tuple[Tensor, Tensor]] = []

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None, window: int | None
    ) -> Tensor:
        self.computed.append((k, v))
        return ops.attention(
            q, k, v, self._layout if rows is None else self._selected, window=window
        )


class DecodeAttend:
    """One new token per sequence, over its prompt and its tail.

    Args:
        cache: its tails have room for the new tokens.
        group: prompt of each sequence [B], int32.
        rows: tail of each sequence [B], int32.
        lengths: tokens in each tail, the new one included [B], int32.
        positions: sequence position of each new token [B], int32.
        max_position: a bound on the positions, plus one.
    """

    def __init__(
        self,
        cache: KVCache,
        group: Tensor,
        rows: Tensor,
        lengths: Tensor,
        positions: Tensor,
        max_position: int,
    ) -> None:
        self._cache, self._group, self._rows, self._lengths = cache, group, rows, lengths
        self.positions, self.max_position = positions, max_position
        self._slots = rows.long() * cache.tail_capacity + lengths.long() - 1

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None, window: int | None
    ) -> Tensor:
        tail_k, tail_v = self._cache.tails[layer]
        tail_k.flatten(0, 1).index_copy_(0, self._slots, k)
        tail_v.flatten(0, 1).index_copy_(0, self._slots, v)
        return ops.decode_attention(
            q,
            *self._cache.prefix[layer],
            self._cache.prefix_starts,
            self._group,
            tail_k,
            tail_v,
            self._rows,
            self._lengths,
            window=window,
        )

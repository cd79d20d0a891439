"""The packed, prefix-shared layout that every batch in fastllm has.

A batch is one row of T tokens without padding, cut into S *segments* that lie one after
another. A segment may name another segment as its *prefix*: it continues that segment, and its
tokens see the whole prefix and, causally, their own segment. A preference pair is a shared
beginning and two continuations; a GRPO group is one prompt and its completions; plain packing
has no prefixes. Loss and gradients are those of the padded, unshared batch, up to rounding.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

NO_PREFIX = -1


class PackedLayout:
    """Segments, prefixes, positions and kernel schedules of one packed row.

    Args:
        lengths: tokens in each segment [S]; 0 is allowed.
        prefix: index of the segment that segment i continues, or -1 [S]. One level only: a
            prefix has no prefix itself. ``None`` means no prefixes.
        device: where the index tensors live. All of them are int32.

    Raises:
        ValueError: a negative length, a prefix out of range, or a prefix of a prefix.
    """

    def __init__(
        self,
        lengths: Sequence[int] | Tensor,
        prefix: Sequence[int] | Tensor | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.lengths = _integers(lengths)
        self.prefix_of = [NO_PREFIX] * len(self.lengths) if prefix is None else _integers(prefix)
        self.device = torch.device(device)
        _validate(self.lengths, self.prefix_of)
        self.total_tokens = sum(self.lengths)
        self.num_segments = len(self.lengths)
        self._rows: Tensor | None = None

    def __repr__(self) -> str:
        shared = sum(p != NO_PREFIX for p in self.prefix_of)
        return (
            f"PackedLayout({self.total_tokens} tokens, {self.num_segments} segments, "
            f"{shared} with a prefix, {self.num_queries} queries, {self.device})"
        )

    # -- the row of tokens ---------------------------------------------------------------------

    @cached_property
    def offsets(self) -> list[int]:
        """Host copy of ``starts``: the first packed row of each segment, and T [S + 1]."""
        return _running_sum(self.lengths)

    @cached_property
    def starts(self) -> Tensor:
        """First packed row of each segment, and T at the end [S + 1]."""
        return self._tensor(self.offsets)

    @cached_property
    def prefix(self) -> Tensor:
        """Index of the segment that each segment continues, or -1 [S]."""
        return self._tensor(self.prefix_of)

    @cached_property
    def segments(self) -> Tensor:
        """Segment of each packed row [T]."""
        return self._per_row(range(self.num_segments))

    @cached_property
    def positions(self) -> Tensor:
        """Sequence position of each packed row, counted from the start of its prefix [T]."""
        rows = np.arange(self.total_tokens, dtype=np.int32)
        first = [self.prefix_length(s) - self.offsets[s] for s in range(self.num_segments)]
        return self._per_row(first, rows)

    @cached_property
    def max_position(self) -> int:
        """Largest sequence position plus one: how long the longest sequence is."""
        return max(
            (self.prefix_length(s) + n for s, n in enumerate(self.lengths)),
            default=0,
        )

    def prefix_length(self, segment: int) -> int:
        """Tokens that come before `segment` in its sequence."""
        prefix = self.prefix_of[segment]
        return 0 if prefix == NO_PREFIX else self.lengths[prefix]

    # -- children: which segments continue a segment -------------------------------------------

    @cached_property
    def _children_lists(self) -> list[list[int]]:
        children: list[list[int]] = [[] for _ in self.lengths]
        for segment, prefix in enumerate(self.prefix_of):
            if prefix != NO_PREFIX:
                children[prefix].append(segment)
        return children

    @cached_property
    def children_starts(self) -> Tensor:
        """Where each segment's list begins in `children`, and its length at the end [S + 1]."""
        return self._tensor(_running_sum([len(c) for c in self._children_lists]))

    @cached_property
    def children(self) -> Tensor:
        """Segments that continue each segment, one list after another [E]."""
        return self._tensor([child for some in self._children_lists for child in some])

    # -- queries: which rows ask ---------------------------------------------------------------

    def select(self, rows: Tensor | Sequence[int]) -> PackedLayout:
        """The same row of tokens with queries for `rows` only.

        The last layer of a model needs keys and values of every token, but queries only where a
        loss reads the hidden state.

        Args:
            rows: packed rows [N], ascending and unique.

        Raises:
            ValueError: rows out of range or not strictly ascending.
        """
        chosen = torch.as_tensor(rows, dtype=torch.int32).cpu()
        if chosen.numel() and not (
            int(chosen[0]) >= 0
            and int(chosen[-1]) < self.total_tokens
            and bool((chosen[1:] > chosen[:-1]).all())
        ):
            raise ValueError(
                f"select: rows must be strictly ascending within 0..{self.total_tokens - 1}, "
                f"found {chosen.tolist()[:8]}..."
            )
        selected = copy.copy(self)
        for name in ("query_rows", "query_starts", "_query_offsets"):
            selected.__dict__.pop(name, None)
        selected.__dict__.pop("_tiles", None)
        selected._rows = chosen
        return selected

    @property
    def num_queries(self) -> int:
        """How many rows have a query: N, or T without `select`."""
        return self.total_tokens if self._rows is None else self._rows.numel()

    @cached_property
    def query_rows(self) -> Tensor:
        """Packed rows that have a query, ascending [N]."""
        if self._rows is None:
            return torch.arange(self.total_tokens, dtype=torch.int32, device=self.device)
        return self._rows.to(self.device)

    @cached_property
    def _query_offsets(self) -> list[int]:
        if self._rows is None:
            return self.offsets
        bounds = torch.tensor(self.offsets, dtype=torch.int32)
        return torch.searchsorted(self._rows, bounds).tolist()

    @cached_property
    def query_starts(self) -> Tensor:
        """Where each segment's queries begin among the N queries, and N at the end [S + 1]."""
        return self._tensor(self._query_offsets)

    # -- schedules: the work lists of the kernels ----------------------------------------------

    def query_tiles(self, block: int) -> Tensor:
        """Tiles of at most `block` queries of one segment: (segment, first query) [n, 2]."""
        return self._tile("query", self._query_offsets, block)

    def key_tiles(self, block: int) -> Tensor:
        """Tiles of at most `block` rows of one segment: (segment, first packed row) [n, 2]."""
        return self._tile("key", self.offsets, block)

    @cached_property
    def _tiles(self) -> dict[tuple[str, int], Tensor]:
        return {}

    def _tile(self, kind: str, offsets: list[int], block: int) -> Tensor:
        if (kind, block) not in self._tiles:
            tiles = [
                (segment, first)
                for segment, (begin, end) in enumerate(pairwise(offsets))
                for first in range(begin, end, block)
            ]
            table = torch.tensor(tiles, dtype=torch.int32).view(-1, 2)
            self._tiles[kind, block] = table.to(self.device, non_blocking=True)
        return self._tiles[kind, block]

    def to(self, device: torch.device | str) -> PackedLayout:
        """The same layout with its tensors on `device`."""
        if torch.device(device) == self.device:
            return self
        moved = PackedLayout(self.lengths, self.prefix_of, device)
        moved._rows = self._rows
        return moved

    def _per_row(self, values: Sequence[int], plus: int | np.ndarray = 0) -> Tensor:
        """A segment's value at each of its rows [T], plus what is given."""
        lengths = np.asarray(self.lengths, dtype=np.int64)
        of_rows = np.repeat(np.asarray(values, dtype=np.int32), lengths)
        of_rows += plus
        return torch.from_numpy(of_rows).to(self.device, non_blocking=True)

    def _tensor(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32).to(self.device, non_blocking=True)


def _integers(values: Sequence[int] | Tensor) -> list[int]:
    return values.tolist() if isinstance(values, Tensor) else [int(v) for v in values]


def _running_sum(counts: list[int]) -> list[int]:
    sums = [0]
    for count in counts:
        sums.append(sums[-1] + count)
    return sums


def _validate(lengths: list[int], prefix_of: list[int]) -> None:
    if len(prefix_of) != len(lengths):
        raise ValueError(f"prefix has {len(prefix_of)} entries, expected {len(lengths)} (lengths)")
    for segment, (length, prefix) in enumerate(zip(lengths, prefix_of, strict=True)):
        if length < 0:
            raise ValueError(f"segment {segment}: length must be >= 0, found {length}")
        if prefix == NO_PREFIX:
            continue
        if not 0 <= prefix < len(lengths) or prefix == segment:
            raise ValueError(
                f"segment {segment}: prefix must be -1 or another segment in "
                f"0..{len(lengths) - 1}, found {prefix}"
            )
        if prefix_of[prefix] != NO_PREFIX:
            raise ValueError(
                f"segment {segment}: its prefix {prefix} has a prefix itself "
                f"({prefix_of[prefix]}); only one level is supported"
            )

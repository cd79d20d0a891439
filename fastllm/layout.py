"""The packed, prefix-shared layout that every batch in fastllm has.

A batch is one row of T tokens without padding, cut into S *segments* that lie one after
another. A segment may name another segment as its *prefix*: it continues that segment, and its
tokens see the whole prefix and, causally, their own segment. A preference pair is a shared
beginning and two continuations; a GRPO group is one prompt and its completions; plain packing
has no prefixes. Loss and gradients are those of the padded, unshared batch, up to rounding.
"""

from __future__ import annotations

import copy
import itertools
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

NO_PREFIX = -1

Build = Callable[["OnHost"], tuple[np.ndarray, ...]]


class OnHost(NamedTuple):
    """A layout in numpy, which the kernels' schedules are built from; all arrays are int64.

    starts: first packed row of each segment, and T [S + 1].
    prefix: index of the segment that each segment continues, or -1 [S].
    query_rows: packed rows that have a query, ascending [N].
    query_starts: where each segment's queries begin, and N [S + 1].
    every_row: whether every row has a query.
    fixed_shapes: whether shapes must follow from T, S and N alone (see `PackedLayout.bucketed`).
    """

    starts: np.ndarray
    prefix: np.ndarray
    query_rows: np.ndarray
    query_starts: np.ndarray
    every_row: bool
    fixed_shapes: bool


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
        self._remembered: tuple[Tensor, PackedLayout] | None = None
        self._fixed_shapes = False
        self._schedules: dict[str, tuple[Tensor, ...]] = {}
        # What kernels keep with a layout, by keys of their own.
        self.kept: dict[tuple[Any, ...], tuple[Any, ...]] = {}

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
        return self._offsets.tolist()

    @cached_property
    def _offsets(self) -> np.ndarray:
        return _running_sum(np.asarray(self.lengths, dtype=np.int64))

    @cached_property
    def starts(self) -> Tensor:
        """First packed row of each segment, and T at the end [S + 1]."""
        return self._tensor(self._offsets)

    @cached_property
    def prefix(self) -> Tensor:
        """Index of the segment that each segment continues, or -1 [S]."""
        return self._tensor(np.asarray(self.prefix_of))

    @cached_property
    def segments(self) -> Tensor:
        """Segment of each packed row [T]."""
        return self._per_row(np.arange(self.num_segments))

    @cached_property
    def positions(self) -> Tensor:
        """Sequence position of each packed row, counted from the start of its prefix [T]."""
        rows = np.arange(self.total_tokens, dtype=np.int32)
        return self._per_row(self._prefix_lengths - self._offsets[:-1], rows)

    @cached_property
    def max_position(self) -> int:
        """Largest sequence position plus one: how long the longest sequence is."""
        return int((self._prefix_lengths + np.diff(self._offsets)).max(initial=0))

    @cached_property
    def _prefix_lengths(self) -> np.ndarray:
        prefix = np.asarray(self.prefix_of, dtype=np.int64)
        lengths = np.append(np.diff(self._offsets), 0)  # the last one, for -1: no prefix
        return lengths[prefix]

    def prefix_length(self, segment: int) -> int:
        """Tokens that come before `segment` in its sequence."""
        prefix = self.prefix_of[segment]
        return 0 if prefix == NO_PREFIX else self.lengths[prefix]

    # -- children: which segments continue a segment -------------------------------------------

    @cached_property
    def children_starts(self) -> Tensor:
        """Where each segment's list begins in `children`, and its length at the end [S + 1]."""
        prefix = np.asarray(self.prefix_of, dtype=np.int64)
        counts = np.bincount(prefix[prefix != NO_PREFIX], minlength=self.num_segments)
        return self._tensor(_running_sum(counts))

    @cached_property
    def children(self) -> Tensor:
        """Segments that continue each segment, one list after another [E]."""
        prefix = np.asarray(self.prefix_of, dtype=np.int64)
        by_parent = np.argsort(prefix, kind="stable")
        children = by_parent[np.count_nonzero(prefix == NO_PREFIX) :]
        return self._tensor(children)

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
        if self._remembered is not None and self._remembered[0] is rows:
            return self._remembered[1]
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
        for name in (*_OF_QUERIES, "host", "ticket"):
            selected.__dict__.pop(name, None)
        selected._schedules, selected.kept, selected._remembered = {}, {}, None
        selected._rows = chosen
        return selected

    def remember(self, rows: Tensor, selected: PackedLayout) -> None:
        """From now on `select`, given this very tensor, returns `selected`.

        The selection and its schedules can be made ahead of time, on the host; `rows` may then be
        on the device, where reading them would wait for it.
        """
        self._remembered = (rows, selected)

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
    def _query_offsets(self) -> np.ndarray:
        if self._rows is None:
            return self._offsets
        return np.searchsorted(self._rows.numpy(), self._offsets)

    @cached_property
    def query_offsets(self) -> list[int]:
        """Host copy of ``query_starts`` [S + 1]."""
        return self._query_offsets.tolist()

    @cached_property
    def query_starts(self) -> Tensor:
        """Where each segment's queries begin among the N queries, and N at the end [S + 1]."""
        return self._tensor(self._query_offsets)

    # -- schedules: the work lists of the kernels ----------------------------------------------

    @cached_property
    def host(self) -> OnHost:
        """The layout as the builders of schedules take it."""
        if self._rows is None:
            rows, every = np.arange(self.total_tokens), True
        else:
            rows, every = self._rows.numpy().astype(np.int64), False
        prefix = np.asarray(self.prefix_of, dtype=np.int64)
        return OnHost(self._offsets, prefix, rows, self._query_offsets, every, self._fixed_shapes)

    def schedule(self, name: str, build: Build) -> tuple[Tensor, ...]:
        """The int32 tables that `build` makes of this layout, made once.

        Args:
            name: of the schedule, with all that it depends on besides the layout.
            build: makes the tables from `host`.
        """
        found = self._schedules.get(name)
        if found is None:
            found = tuple(self._tensor(table) for table in build(self.host))
            self._schedules[name] = found
        return found

    def tables(self) -> dict[str, Tensor]:
        """All tensors of this layout that exist so far, by name."""
        own = {name: self.__dict__[name] for name in _TENSORS if name in self.__dict__}
        for name, tables in self._schedules.items():
            own |= {f"{name} {place}": table for place, table in enumerate(tables)}
        return own

    def placed(self, device: torch.device | str, tables: Mapping[str, Tensor]) -> PackedLayout:
        """The same layout on `device`, with tensors that are there already.

        Args:
            tables: copies of what `tables` returned. What is not among them is made when asked for.
        """
        placed = copy.copy(self)
        for name in (*_TENSORS, "ticket"):
            placed.__dict__.pop(name, None)
        placed.device = torch.device(device)
        placed._schedules, placed.kept, placed._remembered = {}, {}, None
        for name, tensor in tables.items():
            if name in _TENSORS:
                placed.__dict__[name] = tensor
        for name, made in self._schedules.items():
            moved = [tables.get(f"{name} {place}") for place in range(len(made))]
            if all(table is not None for table in moved):
                placed._schedules[name] = tuple(table for table in moved if table is not None)
        return placed

    @cached_property
    def ticket(self) -> Tensor:
        """A number, on the CPU, that stands for this layout where only tensors may pass [1]."""
        number = next(_numbers)
        _by_number[number] = self
        return torch.tensor([number])

    @staticmethod
    def of_ticket(ticket: Tensor) -> PackedLayout:
        """The layout that a ticket stands for.

        Raises:
            RuntimeError: nobody kept the layout.
        """
        layout = _by_number.get(int(ticket))
        if layout is None:
            raise RuntimeError("expected a layout that is kept until the backward pass: it is gone")
        return layout

    # -- buckets: batches of different lengths, tables of equal shapes ---------------------------

    def bucketed(
        self, total_tokens: int, num_segments: int, num_queries: int | None = None
    ) -> PackedLayout:
        """This layout, filled up so that the shapes of all tables follow from these numbers.

        A graph of kernels that was recorded for one batch then runs the next one. The filling is
        one more segment, which no other sees, and empty segments after it.

        Args:
            total_tokens: tokens to fill up to.
            num_segments: segments to fill up to; one more than there are, at least.
            num_queries: where rows are selected, queries to fill up to, with the last rows of the
                filling segment. They must fit into it.

        Raises:
            ValueError: the layout does not fit, or the queries do not fit into the filling.
        """
        filling = total_tokens - self.total_tokens
        empty = num_segments - self.num_segments - 1
        if filling < 0 or empty < 0:
            raise ValueError(
                f"bucketed: {self.total_tokens} tokens in {self.num_segments} segments and a "
                f"filling segment do not fit into {total_tokens} tokens in {num_segments}"
            )
        lengths = [*self.lengths, filling, *[0] * empty]
        prefix = [*self.prefix_of, *[NO_PREFIX] * (empty + 1)]
        filled = PackedLayout(lengths, prefix, self.device)
        filled._fixed_shapes = True
        if self._rows is None:
            if num_queries not in (None, total_tokens):
                raise ValueError(
                    f"bucketed: every row has a query, {num_queries} queries in {total_tokens} rows"
                )
            return filled
        missing = (self.num_queries if num_queries is None else num_queries) - self.num_queries
        if not 0 <= missing <= filling:
            raise ValueError(
                f"bucketed: {missing} queries do not fit into {filling} filling tokens "
                f"({self.num_queries} of {num_queries} are there)"
            )
        last = torch.arange(total_tokens - missing, total_tokens, dtype=torch.int32)
        return filled.select(torch.cat((self._rows, last)))

    def to(self, device: torch.device | str) -> PackedLayout:
        """The same layout with its tensors on `device`."""
        if torch.device(device) == self.device:
            return self
        moved = PackedLayout(self.lengths, self.prefix_of, device)
        moved._rows, moved._fixed_shapes = self._rows, self._fixed_shapes
        return moved

    def _per_row(self, values: np.ndarray, plus: int | np.ndarray = 0) -> Tensor:
        """A segment's value at each of its rows [T], plus what is given."""
        of_rows = np.repeat(values.astype(np.int32), np.diff(self._offsets))
        of_rows += plus
        return torch.from_numpy(of_rows).to(self.device, non_blocking=True)

    def _tensor(self, values: np.ndarray) -> Tensor:
        table = np.ascontiguousarray(values, dtype=np.int32)
        return torch.from_numpy(table).to(self.device, non_blocking=True)


_OF_QUERIES = ("query_rows", "query_starts", "query_offsets", "_query_offsets")
_numbers = itertools.count()
_by_number: weakref.WeakValueDictionary[int, PackedLayout] = weakref.WeakValueDictionary()

# The cached tensors of a layout.
_TENSORS = (
    "starts",
    "prefix",
    "segments",
    "positions",
    "children_starts",
    "children",
    "query_rows",
    "query_starts",
)


def _integers(values: Sequence[int] | Tensor) -> list[int]:
    return values.tolist() if isinstance(values, Tensor) else [int(v) for v in values]


def _running_sum(counts: np.ndarray) -> np.ndarray:
    sums = np.zeros(len(counts) + 1, dtype=np.int64)
    np.cumsum(counts, out=sums[1:])
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

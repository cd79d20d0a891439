"""The running batch: the state of every sequence that draws tokens, in arrays that stay in place.

The token step reads and writes these arrays where they are, from Python or from C++. A sequence
is a row; rows 0 .. size-1 are in use, and the rows of one prompt are neighbours, so that its keys
are read once for all of them.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

import numpy as np
from torch import Tensor

from .requests import Sequence

_INTS = (
    "position", "tail_length", "group", "count", "min_count", "max_count", "top_k",
    "owned", "place",
)  # fmt: skip
_LONGS = ("token", "key")
_FLOATS = ("temperature", "top_p", "min_p", "repetition_penalty")


class Drawn(NamedTuple):
    """What a token step drew: s tokens for each of B rows, [s, B]."""

    token_ids: np.ndarray
    """int64."""
    logprobs: np.ndarray
    """fp32."""
    sampling_logprobs: np.ndarray
    """fp32."""


class TokenStep(Protocol):
    """Computes all layers for the newest token of every row, and draws the next ones."""

    @property
    def description(self) -> str:
        """Which implementation this is, and why it serves."""

    @property
    def goes_on(self) -> bool:
        """Whether rows go on when another one ends. Where they do, `count` tells how many tokens
        each of them drew; what is drawn for a row after its end is nobody's."""

    def __call__(self, batch: RunningBatch, steps: int) -> Drawn:
        """Draw at most `steps` tokens for every row, one after another.

        Each step writes the keys and values of `token` at place `tail_length` of the tail, draws
        the next one, and moves `token`, `position`, `tail_length`, `count` and `seen` on. A row
        ends with one of its stop tokens, or with its `max_count`-th token; unless the others go on,
        that is the last step. Blocks for all of it have been taken.

        Raises:
            RuntimeError: logits that are not finite.
        """

    def prefilling(self) -> AbstractContextManager[None]:
        """While prompts are read: whatever this step can do for it."""

    def logits(self, hidden: Tensor) -> Tensor:
        """Of hidden states after prompts: [N, C] -> [N, V], fp32."""


class RunningBatch:
    """Rows of the running sequences, of the prompts that they continue, and of how they draw.

    Args:
        vocab_size: tokens that a model knows (V).
        rows: room for so many rows to begin with; it grows.
    """

    token: np.ndarray
    """Newest token of each row, not yet in the cache [R], int64."""
    key: np.ndarray
    """Stream of random numbers [R], int64."""
    position: np.ndarray
    """Of the newest token in its sequence [R]; this and all that follow are int32."""
    tail_length: np.ndarray
    """Generated tokens in the cache, the newest not among them [R]."""
    group: np.ndarray
    """Row of the prompt's table [R]."""
    count: np.ndarray
    """Tokens drawn so far [R]."""
    min_count: np.ndarray
    """Before so many tokens, stop tokens cannot be drawn [R]."""
    max_count: np.ndarray
    """The token that is the last one [R]."""
    top_k: np.ndarray
    owned: np.ndarray
    """Blocks of the tail [R]."""
    place: np.ndarray
    """Row of the transcript [R]."""
    temperature: np.ndarray
    """This and the parameters that follow: [R], fp32."""
    top_p: np.ndarray
    min_p: np.ndarray
    repetition_penalty: np.ndarray

    def __init__(self, vocab_size: int, rows: int = 16) -> None:
        self.vocab_size = vocab_size
        self.size = 0
        """Rows in use."""
        self.version = 0
        """Counts the reallocations: who keeps an address must look at it again."""
        self.changes = 0
        """Counts what happens to rows between token steps."""
        self.sequences: list[Sequence] = []
        """Who the rows are."""
        self.stop_tokens = np.full((0, 1), -1, np.int32)
        """Padded with -1 [R, S]."""
        self.tail_blocks = np.zeros((0, 1), np.int32)
        """Of each row, its first `owned` ones [R, J]."""
        self.prefix_blocks = np.zeros((0, 1), np.int32)
        """Of each prompt in use [R, Jp]; the table has holes."""
        self.prefix_length = np.zeros(0, np.int32)
        """Tokens of each prompt, 0 where there is none [R]."""
        self.seen = np.zeros((0, 0), np.uint8)
        """Tokens that the repetition penalty is for [R, V]; [R, 0] while no row has one."""
        self._ints = np.zeros((len(_INTS), 0), np.int32)
        self._longs = np.zeros((len(_LONGS), 0), np.int64)
        self._floats = np.zeros((len(_FLOATS), 0), np.float32)
        self._free_slots: list[int] = []
        self._grow(rows)

    @property
    def capacity(self) -> int:
        """Rows there is room for (R)."""
        return len(self.prefix_length)

    # -- joining -------------------------------------------------------------------------------

    def append(self, sequence: Sequence, place: int) -> int:
        """Give a sequence the row after the last; `regroup` must follow.

        Args:
            place: its row of the transcript.

        Returns:
            The row. It has no blocks yet.
        """
        if self.size == self.capacity:
            self._grow(2 * self.size)
        row, request, params = self.size, sequence.request, sequence.request.params
        count, length = sequence.count, len(request.prompt)
        self._make_room(request.tail_blocks, request.prompt_blocks, len(request.stop_tokens))
        self._ints[:, row] = (
            length + count - 1, max(count - 1, 0), self._slot(sequence), count,
            params.min_new_tokens, params.max_new_tokens, params.top_k, 0, place,
        )  # fmt: skip
        self._floats[:, row] = (
            params.temperature, params.top_p, params.min_p, params.repetition_penalty,
        )  # fmt: skip
        self.key[row] = sequence.key
        self.token[row] = sequence.tokens.token_ids[-1] if sequence.tokens else -1
        self.stop_tokens[row] = -1
        self.stop_tokens[row, : len(request.stop_tokens)] = request.stop_tokens
        if params.repetition_penalty != 1:
            self._see(row, sequence)
        self.sequences.append(sequence)
        self.size += 1
        return row

    def regroup(self) -> None:
        """Make the rows of each prompt neighbours, in the order in which they came."""
        self.changes += 1
        group = self.group[: self.size]
        runs = np.count_nonzero(group[1:] != group[:-1]) + 1
        prompts, first, number = np.unique(group, return_index=True, return_inverse=True)
        if runs > len(prompts):
            self._keep(np.argsort(first[number], kind="stable"), 0)

    # -- leaving -------------------------------------------------------------------------------

    def remove(self, rows: np.ndarray) -> None:
        """Close the gaps that these rows leave [n], ascending. What they owned has gone back."""
        self.changes += 1
        staying = np.ones(self.size, bool)
        staying[rows] = False
        for row in rows.tolist():
            request = self.sequences[row].request
            request.running -= 1
            if not request.running:
                self._free_slots.append(request.slot)
                self.prefix_length[request.slot] = 0
                request.slot = -1
        self._keep(np.flatnonzero(staying), int(rows[0]))
        if self.seen.shape[1] and not (self.repetition_penalty[: self.size] != 1).any():
            self.seen = np.zeros((self.capacity, 0), np.uint8)
            self.version += 1

    # -- arrays --------------------------------------------------------------------------------

    def _keep(self, rows: np.ndarray, first: int) -> None:
        """Leave only `rows` in use, in this order; those before `first` are as they were."""
        into, moved = slice(first, len(rows)), rows[first:]
        for columns in (self._ints, self._longs, self._floats):
            columns[:, into] = columns[:, moved]
        for table in (self.stop_tokens, self.tail_blocks, self.seen):
            table[into] = table[moved]
        self.sequences[first:] = [self.sequences[row] for row in moved.tolist()]
        self.size = len(rows)

    def _slot(self, sequence: Sequence) -> int:
        """The row of the sequence's prompt, which is filled if it is the first to run."""
        request = sequence.request
        assert request.blocks is not None
        if request.slot < 0:
            request.slot = self._free_slots.pop()
            self.prefix_length[request.slot] = len(request.prompt)
            self.prefix_blocks[request.slot, : len(request.blocks)] = request.blocks
        request.running += 1
        return request.slot

    def _see(self, row: int, sequence: Sequence) -> None:
        if not self.seen.shape[1]:
            self.seen = np.zeros((self.capacity, self.vocab_size), np.uint8)
            self.version += 1
        self.seen[row] = 0
        self.seen[row, sequence.request.prompt] = 1
        if sequence.tokens:
            self.seen[row, sequence.tokens.token_ids] = 1

    def _grow(self, rows: int) -> None:
        before = self.capacity
        self._ints, self._longs, self._floats = (
            _resized(columns, len(columns), rows)
            for columns in (self._ints, self._longs, self._floats)
        )
        self.prefix_length = np.pad(self.prefix_length, (0, rows - before))
        self._reshape(rows, self.tail_blocks.shape[1], self.prefix_blocks.shape[1])
        self.stop_tokens = _resized(self.stop_tokens, rows, self.stop_tokens.shape[1])
        self.seen = _resized(self.seen, rows, self.seen.shape[1])
        self._free_slots = [*range(rows - 1, before - 1, -1), *self._free_slots]
        for names, columns in (
            (_INTS, self._ints),
            (_LONGS, self._longs),
            (_FLOATS, self._floats),
        ):
            for name, column in zip(names, columns, strict=True):
                setattr(self, name, column)

    def _make_room(self, tail_blocks: int, prompt_blocks: int, stop_tokens: int) -> None:
        if tail_blocks > self.tail_blocks.shape[1] or prompt_blocks > self.prefix_blocks.shape[1]:
            self._reshape(
                self.capacity,
                max(tail_blocks, self.tail_blocks.shape[1]),
                max(prompt_blocks, self.prefix_blocks.shape[1]),
            )
        if stop_tokens > self.stop_tokens.shape[1]:
            self.stop_tokens = _resized(self.stop_tokens, self.capacity, stop_tokens)
            self.version += 1

    def _reshape(self, rows: int, tail_blocks: int, prompt_blocks: int) -> None:
        self.tail_blocks = _resized(self.tail_blocks, rows, tail_blocks)
        self.prefix_blocks = _resized(self.prefix_blocks, rows, prompt_blocks)
        self.version += 1


def _resized(old: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """A larger copy, with no token and no block where it is new."""
    new = np.full((rows, columns), 0 if old.dtype == np.uint8 else -1, old.dtype)
    new[: old.shape[0], : old.shape[1]] = old
    return new

"""What the running sequences have drawn, in arrays that a step appends to all at once."""

from __future__ import annotations

import numpy as np

from .batch import Drawn
from .requests import Tokens

_DTYPES = (np.int64, np.float32, np.float32)


class Transcript:
    """Tokens and log-probabilities of the running sequences, one place for each."""

    def __init__(self) -> None:
        self._columns = Tokens(*(np.empty((0, 0), dtype) for dtype in _DTYPES))
        self._free: list[int] = []

    def make_room(self, tokens: int) -> None:
        """Let every place hold so many tokens."""
        places, width = self._columns.token_ids.shape
        if tokens > width:
            self._reshape(places, tokens)

    def take(self, tokens: Tokens | None) -> int:
        """A place for a sequence, with what it has drawn already."""
        if not self._free:
            places, width = self._columns.token_ids.shape
            more = max(16, places)
            self._reshape(places + more, width)
            self._free = list(range(places + more - 1, places - 1, -1))
        place = self._free.pop()
        if tokens is not None:
            for column, values in zip(self._columns, tokens, strict=True):
                column[place, : len(values)] = values
        return place

    def give_back(self, place: int) -> None:
        self._free.append(place)

    def record(
        self, places: np.ndarray, counts: np.ndarray, drawn: Drawn, lengths: np.ndarray
    ) -> None:
        """Append what a token step drew.

        Args:
            places: of the rows [B].
            counts: tokens that each row has now, these included [B].
            lengths: how many of these each row has [B]; what it drew after them is nobody's.
        """
        step = np.arange(len(drawn.token_ids))[:, None]
        valid = step < lengths
        at = (counts - lengths + step)[valid]
        places = np.broadcast_to(places, valid.shape)[valid]
        for column, values in zip(self._columns, drawn, strict=True):
            column[places, at] = values[valid]

    def of(self, place: int, count: int, first: int = 0) -> Tokens:
        """What a place holds: the tokens from `first` up to `count`."""
        return Tokens(*(column[place, first:count].copy() for column in self._columns))

    def _reshape(self, places: int, width: int) -> None:
        # Untouched, so that room for long completions costs nothing where they are short.
        fresh = Tokens(*(np.empty((places, width), dtype) for dtype in _DTYPES))
        for new, old in zip(fresh, self._columns, strict=True):
            new[: old.shape[0], : old.shape[1]] = old
        self._columns = fresh

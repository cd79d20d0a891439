"""The text of a sequence as its tokens come, and the stop strings in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

_INCOMPLETE = "\ufffd"


class TextCodec(Protocol):
    """What the engine needs of a tokenizer."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


class TextReader:
    """Reads tokens one by one, and finds the end of the text where it has a stop string.

    A token may hold parts of words or of characters, so its text is what it adds to that of the
    tokens before it; a character that is not complete yet is waited for.

    Args:
        codec: decodes tokens.
        stop_strings: what ends the text.
    """

    def __init__(self, codec: TextCodec, stop_strings: Sequence[str] = ()) -> None:
        self._codec, self._stops = codec, tuple(stop_strings)
        self._ids: list[int] = []
        # ids[:_settled] have their final text; ids[_context:_settled] are decoded once more with
        # those that follow, for tokenizers that look at the token before.
        self._context = self._settled = 0
        self._settled_text = self._newest = ""
        self._told = 0
        self._end: int | None = None

    @property
    def text(self) -> str:
        """All of the text, up to the stop string if there is one."""
        return (self._settled_text + self._newest)[: self._end]

    def read(self, tokens: Sequence[int], may_stop: bool = True) -> bool:
        """Read the next tokens.

        Args:
            may_stop: whether a stop string that these tokens complete ends the text.

        Returns:
            Whether the text has ended with a stop string.
        """
        before = len(self._complete)
        self._ids += tokens
        context = self._codec.decode(self._ids[self._context : self._settled])
        self._newest = self._codec.decode(self._ids[self._context :])[len(context) :]
        if may_stop and self._stops:
            self._find_stop(before)
        if self._newest and not self._newest.endswith(_INCOMPLETE):
            self._settled_text += self._newest
            self._newest = ""
            self._context, self._settled = self._settled, len(self._ids)
        return self._end is not None

    def tell(self, last: bool) -> str:
        """The text that nobody was told yet.

        Args:
            last: whether no more tokens follow. Until then, what may turn out to begin a stop
                string is held back.
        """
        text = self.text if last else self._complete
        certain = len(text) if last else len(text) - self._begun_stop(text)
        told, self._told = self._told, max(self._told, certain)
        return text[told:certain]

    @property
    def _complete(self) -> str:
        """The text without a character at the end that is not complete yet."""
        return self._settled_text + self._newest.rstrip(_INCOMPLETE)

    def _find_stop(self, before: int) -> None:
        """Look for a stop string that ends in what was read after `before` characters."""
        text = self._complete
        found = (text.find(stop, max(0, before - len(stop) + 1)) for stop in self._stops)
        self._end = min((at for at in found if at >= 0), default=None)

    def _begun_stop(self, text: str) -> int:
        """Characters at the end of the text that may be the beginning of a stop string."""
        return max(
            (
                length
                for stop in self._stops
                for length in range(1, len(stop))
                if text.endswith(stop[:length])
            ),
            default=0,
        )

"""Timing a generating program: the whole, and how much of it is the prompts' part.

Shared with the peers' environment: no torch, no fastllm.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .turns import Block, Result


@dataclass(frozen=True)
class Drawn:
    """Completions, and the memory of keys and values at most, where the program says."""

    token_ids: Sequence[Sequence[int]]
    cache_bytes: float | None = None


def in_parts(
    draw: Callable[[bool], Drawn], wanted: Sequence[int], lengths: Sequence[int] | None = None
) -> Block:
    """A block of generations.

    Completions of one token each take what the prompts take: that is the prefill, and decoding is
    the difference. They come second, so that a program that keeps its cache keeps the large one.

    Args:
        draw: completes the prompts, whole (True) or by one token (False).
        wanted: tokens of each completion that were asked for; these are looked at.
        lengths: tokens that the program draws, if these are more.
    """
    lengths = wanted if lengths is None else lengths

    def block(count: int) -> Result:
        whole = first = 0.0
        for _ in range(count):
            started = time.perf_counter()
            drawn = draw(True)
            middle = time.perf_counter()
            single = draw(False)
            first += time.perf_counter() - middle
            whole += middle - started
        _check(drawn, lengths)
        _check(single, [1] * len(lengths))
        parts = {"prefill": first, "decoding": whole - first}
        pairs = zip(drawn.token_ids, wanted, strict=True)
        check = [float(token) for ids, count in pairs for token in ids[:count]]
        return Result(check, whole, parts, drawn.cache_bytes)

    return block


def _check(drawn: Drawn, lengths: Sequence[int]) -> None:
    found = [len(ids) for ids in drawn.token_ids]
    if found != list(lengths):
        wrong = sum(a != b for a, b in zip(found, lengths, strict=False))
        raise ValueError(
            f"{wrong + abs(len(found) - len(lengths))} of {len(lengths)} completions have another "
            "length than was asked for"
        )

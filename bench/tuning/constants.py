"""Which constants a call looks up, and other constants in their place for a while."""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from unittest import mock

from fastllm.kernels import configs

Constants = dict[str, Any]


@dataclass(frozen=True)
class Place:
    """Where in the tables the constants of a launch stand."""

    kernel: str
    itemsize: int
    size: int
    """What the launch asked for; the class of sizes that serves it is a matter of the table."""


@contextlib.contextmanager
def watched(found: dict[Place, Constants]) -> Iterator[None]:
    """Note what is looked up inside, and what was found."""
    lookup = configs._config

    def note(kernel: str, itemsize: int, size: int, gpu: Any) -> Constants:
        constants = lookup(kernel, itemsize, size, gpu)
        found[Place(kernel, itemsize, size)] = constants
        return constants

    with mock.patch.object(configs, "_config", note), _fresh():
        yield


@contextlib.contextmanager
def replaced(place: Place, constants: Constants) -> Iterator[None]:
    """Inside, lookups of this place find these constants."""
    lookup = configs._config

    def answer(kernel: str, itemsize: int, size: int, gpu: Any) -> Constants:
        if Place(kernel, itemsize, size) == place:
            return constants
        return lookup(kernel, itemsize, size, gpu)

    with mock.patch.object(configs, "_config", answer), _fresh():
        yield


@contextlib.contextmanager
def _fresh() -> Iterator[None]:
    """Kernels' modules may keep what they derived from constants; not across this."""
    _forget()
    try:
        yield
    finally:
        _forget()


def _forget() -> None:
    for name, module in list(sys.modules.items()):
        if name.startswith("fastllm.kernels.") and module is not configs:
            for value in list(vars(module).values()):
                if hasattr(value, "cache_clear"):
                    value.cache_clear()


def spaces() -> dict[str, Mapping[str, tuple[Any, ...]]]:
    """What the kernels' modules that are loaded have put up for tuning, by the kernel's name."""
    found: dict[str, Mapping[str, tuple[Any, ...]]] = {}
    for name, module in list(sys.modules.items()):
        if name.startswith("fastllm.kernels."):
            found |= getattr(module, "TUNABLE", {})
    return found


def candidates(now: Constants, space: Mapping[str, tuple[Any, ...]]) -> list[Constants]:
    """All combinations, those of now first; what is not in the space stays as it is."""
    names = list(space)
    every = (dict(zip(names, values, strict=True)) for values in itertools.product(*space.values()))
    others = [{**now, **choice} for choice in every]
    return [dict(now), *(other for other in others if other != now)]

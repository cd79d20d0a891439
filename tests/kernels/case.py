"""What is compiled ahead of time: the cases of each op, in `cases/<op>.py`, are made of these."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

EVERYWHERE = ("sm_80", "sm_90", "sm_100", "gfx942")
"""The targets of the gate; sm_86, with its small shared memory, is asked for by name."""


@dataclass(frozen=True)
class Case:
    """Launches of an op at one size, and what the compiler may not do better."""

    label: str
    launch: Callable[[], None]
    """Calls the public functions of `kernels/<op>.py` on meta tensors."""
    targets: tuple[str, ...] = EVERYWHERE
    again: tuple[Callable[[], None], ...] = ()
    """The same with other lengths and counts, which must find the same kernels compiled."""
    multiplies: tuple[str, ...] = ()
    """Kernels (parts of their names) that must use the tensor cores; on Hopper, whole warp groups
    of them."""
    narrow: Mapping[str, str] = field(default_factory=dict)
    """Kernels (parts of their names) whose loads or stores cannot be 16 bytes wide, and why."""
    spills: Mapping[tuple[str, str], tuple[int, str]] = field(default_factory=dict)
    """(target, kernel) -> bytes that a thread may spill, and why."""


def all_cases() -> dict[str, list[Case]]:
    """The cases of each op, by its name."""
    files = sorted((Path(__file__).parent / "cases").glob("[a-z]*.py"))
    names = [path.stem for path in files]
    return {name: importlib.import_module(f"tests.kernels.cases.{name}").CASES for name in names}


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor without data."""
    return torch.empty(shape, dtype=dtype, device="meta")


def indices(*shape: int) -> torch.Tensor:
    """int32, without data."""
    return meta(*shape, dtype=torch.int32)

"""Compile-time constants of each kernel, by GPU and size: the table in `tuned/<op>.json`.

The table is found offline, by `bench/tune.py`, and checked in. A file holds, for each GPU, kernel
and element size, the constants of each class of sizes:

    {"sm_90": {"rms_norm_forward_kernel": {"2": {"4096": {"ROWS": 1, "num_warps": 4, ...}}}}}

A class is named after the largest size that it serves; what is larger takes the last one.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch
from triton.backends.compiler import GPUTarget

from .launch import target

TABLES = Path(__file__).resolve().parent / "tuned"

# Which table serves a GPU: its own, or that of the next older one. sm_86 stands for the cards with
# 99 KiB of shared memory for a block, where the others have 163 and more.
_NVIDIA = ("sm_100", "sm_90", "sm_80")
_SMALL = (86, 87, 89, 120, 121)


def config(kernel: str, dtype: torch.dtype, size: int) -> dict[str, Any]:
    """The constants of a kernel on this GPU; not to be written to.

    Args:
        kernel: its name.
        dtype: of its elements.
        size: what its classes of sizes are about: columns, the size of a head, ...

    Raises:
        LookupError: the table does not have this kernel.
    """
    return _config(kernel, dtype.itemsize, size, target())


@functools.cache
def _config(kernel: str, itemsize: int, size: int, gpu: GPUTarget) -> dict[str, Any]:
    tables = _tables()
    for arch in architectures(gpu):
        of_kernel = tables.get((arch, kernel), {})
        classes = of_kernel.get(str(itemsize)) or of_kernel.get("4")
        if classes:
            largest = sorted(map(int, classes))
            chosen = next((n for n in largest if n >= size), largest[-1])
            return classes[str(chosen)]
    raise LookupError(f"no constants for {kernel} on {gpu.backend} {gpu.arch} in {TABLES}")


@functools.cache
def _tables() -> dict[tuple[str, str], dict[str, Any]]:
    """The classes of all kernels, by (architecture, kernel)."""
    found = {}
    for path in sorted(TABLES.glob("*.json")):
        for arch, kernels in json.loads(path.read_text()).items():
            for kernel, classes in kernels.items():
                found[arch, kernel] = classes
    return found


def architectures(gpu: GPUTarget) -> tuple[str, ...]:
    """The names under which a GPU's constants are looked up, best first."""
    if gpu.backend != "cuda":
        return ("gfx942",)
    arch = int(gpu.arch)
    fitting = tuple(name for name in _NVIDIA if int(name.removeprefix("sm_")) <= arch)
    return ("sm_86", "sm_80") if arch in _SMALL else fitting or ("sm_80",)

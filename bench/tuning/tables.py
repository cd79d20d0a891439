"""The checked-in tables `kernels/tuned/<op>.json`: reading a class, writing a winner."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

from fastllm.kernels import configs

from .constants import Constants, Place

# Constants that nobody chooses come last in an entry, as people write them.
_LAST = ("num_warps", "num_stages")


def file_of(kernel: str, folder: Path | None = None) -> Path:
    """The file that has a kernel.

    Raises:
        LookupError: none does.
    """
    for path in sorted((folder or configs.TABLES).glob("*.json")):
        if any(kernel in kernels for kernels in json.loads(path.read_text()).values()):
            return path
    raise LookupError(f"no table has {kernel}")


def class_of(classes: dict[str, Any], size: int) -> str:
    """The class of sizes that serves a size."""
    largest = sorted(map(int, classes))
    return str(next((n for n in largest if n >= size), largest[-1]))


def serving(arch: str, place: Place) -> str:
    """The class that serves a place on an architecture, by its own table or that of another."""
    table = json.loads(file_of(place.kernel).read_text())
    return class_of(_classes(table, arch, place), place.size)


def put(path: Path, arch: str, place: Place, constants: Constants) -> None:
    """Write the constants of one class, for one architecture.

    An architecture that had none of its own for this kernel and element size gets a copy of the
    classes that served it.
    """
    text = path.read_text()
    table = json.loads(text)
    served = copy.deepcopy(_classes(table, arch, place))
    classes = (
        table.setdefault(arch, {})
        .setdefault(place.kernel, {})
        .setdefault(str(place.itemsize), served)
    )
    classes[class_of(classes, place.size)] = ordered(constants)
    path.write_text(json.dumps(table, indent=indent_of(text)) + "\n")


def _classes(table: dict[str, Any], arch: str, place: Place) -> dict[str, Any]:
    """The classes in which `configs` looks a place up."""
    number = int(arch.removeprefix("sm_")) if arch.startswith("sm_") else 0
    gpu = configs.GPUTarget("cuda" if number else "hip", number or arch, 32 if number else 64)
    for name in configs.architectures(gpu):
        of_kernel = table.get(name, {}).get(place.kernel, {})
        classes = of_kernel.get(str(place.itemsize)) or of_kernel.get("4")
        if classes:
            return classes
    raise LookupError(f"no constants for {place.kernel} on {arch}")


def ordered(constants: Constants) -> Constants:
    """The kernel's own constants, then warps and stages."""
    last = {name: constants[name] for name in _LAST if name in constants}
    return {name: value for name, value in constants.items() if name not in _LAST} | last


def indent_of(text: str) -> int:
    """How a file is indented already, so that only what changed changes."""
    found = re.search(r"^( +)\S", text, re.MULTILINE)
    return len(found.group(1)) if found else 2

"""Many small arrays to a GPU in one copy, which nobody waits for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

# Vectors that kernels read are at most so wide.
_ALIGNMENT = 16

_DTYPES: dict[np.dtype, torch.dtype] = {
    np.dtype(np.int64): torch.int64,
    np.dtype(np.int32): torch.int32,
    np.dtype(np.float32): torch.float32,
    np.dtype(np.uint8): torch.uint8,
}


class Field(NamedTuple):
    """One of the arrays."""

    shape: tuple[int, ...]
    dtype: np.dtype


class Parcel:
    """Arrays of fixed shapes that go to a device together, always to the same addresses.

    Args:
        fields: what it holds.
        device: where it goes.
    """

    def __init__(self, fields: Mapping[str, Field], device: torch.device) -> None:
        sizes = [_bytes(field) for field in fields.values()]
        on_gpu = device.type == "cuda"
        self._host = torch.zeros(sum(sizes), dtype=torch.uint8, pin_memory=on_gpu)
        self._there = torch.zeros(sum(sizes), dtype=torch.uint8, device=device)
        self.arrays: dict[str, np.ndarray] = {}
        """The host's side, to be written before `send`."""
        self.tensors: dict[str, Tensor] = {}
        """The device's side."""
        parts = zip(fields.items(), self._host.split(sizes), self._there.split(sizes), strict=True)
        for (name, field), host, there in parts:
            self.arrays[name] = _view(host, field).numpy()
            self.tensors[name] = _view(there, field)

    def send(self) -> None:
        """Copy; the arrays may be written again when the device has come past this point."""
        self._there.copy_(self._host, non_blocking=True)


def upload(arrays: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    """Arrays as tensors: on the CPU without a copy, elsewhere by one that is not waited for."""
    if device.type == "cpu":
        return [torch.from_numpy(array) for array in arrays]
    fields = {str(place): Field(array.shape, array.dtype) for place, array in enumerate(arrays)}
    parcel = Parcel(fields, device)
    for into, array in zip(parcel.arrays.values(), arrays, strict=True):
        into[...] = array
    parcel.send()
    return list(parcel.tensors.values())


def _bytes(field: Field) -> int:
    exact = math.prod(field.shape) * field.dtype.itemsize
    return -(-exact // _ALIGNMENT) * _ALIGNMENT


def _view(part: Tensor, field: Field) -> Tensor:
    exact = math.prod(field.shape) * field.dtype.itemsize
    return part[:exact].view(_DTYPES[field.dtype]).view(field.shape)

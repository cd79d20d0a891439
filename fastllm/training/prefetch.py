"""Batches on their way to a GPU: one buffer, one copy, on a stream beside the computing one.

A batch has a dozen small tensors, and its layout as many tables for the kernels. Each copied by
itself would cost a launch, and from ordinary memory a wait as well. Here a thread that is ahead of
the step lays all of them into one buffer of pinned memory; the copy runs while the step before is
computed, and the computing stream waits for its event, not the host.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..layout import PackedLayout

ALIGNMENT = 128
"""Bytes: every tensor begins as one of its own would, as far as vectors and cache lines go."""


@dataclass(frozen=True)
class Bytes:
    """Where tensors lie in one buffer."""

    parts: tuple[tuple[torch.dtype, tuple[int, ...], int], ...]
    """Type, shape and first byte of each."""
    size: int

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> Bytes:
        parts, end = [], 0
        for tensor in tensors:
            parts.append((tensor.dtype, tuple(tensor.shape), end))
            end += -(-tensor.numel() * tensor.element_size() // ALIGNMENT) * ALIGNMENT
        return cls(tuple(parts), end)

    def views(self, buffer: Tensor) -> list[Tensor]:
        """The tensors in a buffer of `size` bytes."""
        return [
            buffer[first : first + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
            for dtype, shape, first in self.parts
        ]

    def fill(self, buffer: Tensor, tensors: Sequence[Tensor]) -> None:
        """Copy tensors of these types and shapes, all on the CPU, into `buffer`.

        NumPy copies: torch would start a second team of threads in the worker.
        """
        for view, tensor in zip(self.views(buffer), tensors, strict=True):
            np.copyto(view.numpy(), tensor.numpy())


@dataclass(frozen=True)
class Parcel:
    """A batch and the buffer that holds all of its tensors."""

    batch: Any
    buffer: Tensor
    bytes: Bytes


def pack(batch: Any, pinned: bool = False) -> tuple[Bytes, Tensor]:
    """Every tensor of a batch and of its layouts in one buffer on the CPU."""
    tensors = _tensors(batch)
    layout = Bytes.of(tensors)
    buffer = torch.empty(layout.size, dtype=torch.uint8, pin_memory=pinned)
    layout.fill(buffer, tensors)
    return layout, buffer


def unpack(batch: Any, layout: Bytes, buffer: Tensor) -> Any:
    """The batch that `pack` was given, with its tensors where `buffer` is."""
    moved = dict(zip(map(id, _tensors(batch)), layout.views(buffer), strict=True))
    return _mapped(batch, lambda tensor: moved[id(tensor)], buffer.device)


class Placement:
    """Puts batches on a device; to a GPU they travel beside the computation.

    Args:
        device: where to.
        prepare: makes the tables on the CPU that a model's last layer and those before it read;
            called with (layout, selected layout) in the thread that packs.
    """

    def __init__(
        self,
        device: torch.device | str,
        prepare: Callable[[PackedLayout, PackedLayout], None] = lambda layout, last: None,
    ) -> None:
        self._device, self._prepare = torch.device(device), prepare
        self._stream: torch.cuda.Stream | None = None
        self._lock = threading.Lock()

    def __call__(self, batch: Any) -> Any:
        """The batch on the device, for the computing stream."""
        return self.send(batch)()

    def send(self, batch: Any) -> Callable[[], Any]:
        """Begin to move a batch; in any thread.

        Returns:
            What the computing thread calls for the batch.
        """
        if self._device.type != "cuda":
            there = batch.to(self._device)
            return lambda: there
        arrive = self.send_parcel(batch)
        return lambda: arrive().batch

    def send_parcel(self, batch: Any) -> Callable[[], Parcel]:
        """The same with the buffer that the batch lies in."""
        for part in _with_layouts(batch):
            _ = part.layout.positions  # made once for both
            selected = part.layout.select(part.rows)
            self._prepare(part.layout, selected)
            part.layout.remember(part.rows, selected)
        if self._device.type != "cuda":
            layout, buffer = pack(batch)
            parcel = Parcel(unpack(batch, layout, buffer), buffer, layout)
            return lambda: parcel
        with torch.cuda.device(self._device):  # a thread begins with the first one
            layout, host = pack(batch, pinned=True)
            buffer, copied = self._copied(host)
        parcel = Parcel(unpack(batch, layout, buffer), buffer, layout)
        return lambda: self._arrived(parcel, copied)

    def _copied(self, host: Tensor) -> tuple[Tensor, torch.cuda.Event]:
        with self._lock:
            if self._stream is None:
                self._stream = torch.cuda.Stream(self._device)
        with torch.cuda.stream(self._stream):
            there = torch.empty(host.numel(), dtype=host.dtype, device=self._device)
            # PyTorch keeps the pinned memory from being used again before the copy is done.
            there.copy_(host, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record(self._stream)
        return there, copied

    def _arrived(self, parcel: Parcel, copied: torch.cuda.Event) -> Parcel:
        computing = torch.cuda.current_stream(self._device)
        computing.wait_event(copied)
        # Its memory belongs to the copying stream: not to be written there again before the
        # computation that reads it is done.
        parcel.buffer.record_stream(computing)
        return parcel


def _tensors(batch: Any) -> list[Tensor]:
    """Every tensor of a batch once, in a fixed order."""
    found: dict[int, Tensor] = {}

    def collect(tensor: Tensor) -> Tensor:
        return found.setdefault(id(tensor), tensor)

    _mapped(batch, collect, torch.device("cpu"))
    return list(found.values())


def _mapped(value: Any, move: Callable[[Tensor], Tensor], device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return move(value)
    if isinstance(value, PackedLayout):
        return _placed(value, move, device)
    if not is_dataclass(value) or isinstance(value, type):
        return value
    own = {f.name: getattr(value, f.name) for f in fields(value)}
    moved: Any = replace(value, **{name: _mapped(one, move, device) for name, one in own.items()})
    if _has_layout(value):
        selected = _placed(own["layout"].select(own["rows"]), move, device)
        moved.layout.remember(moved.rows, selected)
    return moved


def _placed(
    layout: PackedLayout, move: Callable[[Tensor], Tensor], device: torch.device
) -> PackedLayout:
    tables = {name: move(table) for name, table in layout.tables().items()}
    return layout.placed(device, tables)


def _with_layouts(value: Any) -> list[Any]:
    """The parts of a batch that have a layout and the rows that are read."""
    if not is_dataclass(value):
        return []
    below = [one for f in fields(value) for one in _with_layouts(getattr(value, f.name))]
    return [value, *below] if _has_layout(value) else below


def _has_layout(value: Any) -> bool:
    return hasattr(value, "layout") and hasattr(value, "rows")

"""AdamW (Loshchilov and Hutter, 2019) over all tensors of a model, decided on the device.

The norm, the clip factor, the finite test, fp16's loss scale and the count of steps stay where the
gradients are, so that `AdamW.step_` returns at once. A step whose norm or loss is not finite
changes nothing, and neither does any later one until `clear_failure` is called: who reads the norm
of a step while the next ones run still finds the weights from before the bad one.

Weights and moments in bf16 are rounded stochastically, which keeps on average what is smaller than
half of their last bit. The random bits are a hash of (seed, tensor, step, element).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import backend, cpp, working
from .adamw_reference import (
    CLEAN,
    FACTOR,
    FAILED,
    FIRST_SCALE,
    RATE,
    SCALE,
    SKIPPED,
    Settings,
    Slot,
    adamw_reference,
    decide_,
    gradient_norm,
    logarithm,
    update_,
)

__all__ = ["AdamW", "Settings", "Slot", "adamw_reference"]

_ALIGNMENT = 16


class AdamW:
    """Steps of AdamW over many tensors, in three launches.

    The equations are those of torch.optim.AdamW, in fp32 (fp64 for fp64 parameters).

    Args:
        slots: parameters in fp32, bf16 or fp16 (PyTorch also takes fp64), moments in fp32 or bf16;
            all on one device. For the kernels, contiguous and beginning at multiples of 16 bytes.
            A working copy of a parameter (see `working`) is written in the same pass.
        settings: see there.

    Raises:
        RuntimeError: an explicitly requested backend cannot serve these tensors.
        ValueError: tensors that the kernels cannot read.
    """

    def __init__(self, slots: Sequence[Slot], settings: Settings) -> None:
        self.settings = settings
        # One launch serves one combination of dtypes; each has a run of slots to itself.
        self._order = sorted(range(len(slots)), key=lambda i: _kind(slots[i]))
        self._slots = [slots[i] for i in self._order]
        first = slots[0].parameter
        self._raw: Any = _kernels([slot.parameter for slot in slots])
        wide = torch.float64 if first.dtype == torch.float64 else torch.float32
        self.numbers = torch.zeros(3, dtype=wide, device=first.device)
        self.counts = torch.zeros(4, dtype=torch.int32, device=first.device)
        self.scale = self.numbers[SCALE]
        """The loss scale, on the device."""
        self.scale.fill_(FIRST_SCALE if settings.scaled else 1.0)
        self._steps = torch.zeros(len(slots), dtype=wide, device=first.device)
        self.steps = [self._steps[place] for place in _inverse(self._order)]
        """How often each parameter was updated, on the device."""
        self._tables: _Tables | None = None

    @torch.no_grad()
    def step_(
        self,
        gradients: Sequence[Tensor | None],
        loss: Tensor,
        rate: float | None,
        zero: bool = False,
    ) -> Tensor:
        """Update parameters, moments and working copies; never waits for the device.

        Args:
            gradients: one for each slot, or None: then that parameter is left alone.
            loss: a scalar; unless it and the norm are finite, the step is not taken.
            rate: learning rate; None for that of the step before, which a CUDA graph needs.
            zero: leave zeros in the gradients.

        Returns:
            The norm of the gradients, unscaled and before clipping: a scalar on the device.
        """
        if rate is not None:
            self.numbers[RATE].fill_(rate)
        copies = [working.copy_of(slot.parameter) for slot in self._slots]
        given = [gradients[i] for i in self._order]
        take = self._step_of_torch if self._raw is None else self._launch
        norm = take(given, copies, loss, zero)
        working.mark_written(slot.parameter for slot in self._slots)
        return norm

    def failed(self) -> bool:
        """Whether a step has failed, so that none is taken any more; waits for the device."""
        return bool(self.counts[FAILED].item())

    def clear_failure(self) -> None:
        """Take steps again."""
        self.counts[FAILED].zero_()

    def clean_steps(self) -> int:
        """Steps since the loss scale last changed; waits for the device."""
        return int(self.counts[CLEAN].item())

    def set_scale(self, scale: float, clean_steps: int) -> None:
        """Go on with a loss scale, and with the steps since it changed."""
        self.numbers[SCALE].fill_(scale)
        self.counts[CLEAN].fill_(clean_steps)

    def skipped(self) -> int:
        """Steps left out because scaled gradients overflowed; waits for the device."""
        return int(self.counts[SKIPPED].item())

    def _launch(
        self,
        gradients: list[Tensor | None],
        copies: list[Tensor | None],
        loss: Tensor,
        zero: bool,
    ) -> Tensor:
        if self._tables is None or not self._tables.hold(self._slots, copies):
            self._tables = _Tables(self._raw, self._slots, copies, self._order)
        dtypes, ready = self._tables.place(gradients, zero)
        norm = self._decide(self._tables, dtypes, loss)
        self._update(self._tables, dtypes, zero)
        del ready  # copies of gradients, which the launches read
        return norm

    def _decide(self, tables: _Tables, dtypes: list[torch.dtype], loss: Tensor) -> Tensor:
        """The norm; reads the gradients once, and makes everything known that the update asks."""
        settings, norm = self.settings, torch.empty_like(self.scale)
        for part, dtype in zip(tables.parts, dtypes, strict=True):
            tensors = part.rows, part.owners, tables.gradients[part.range]
            self._raw.square_sums_(*tensors, self.numbers, part.sums, dtype, settings.scaled)
        self._raw.finish_(
            tables.sums,
            tables.gradients,
            self._steps,
            tables.scales,
            self.numbers,
            self.counts,
            loss,
            norm,
            settings.max_norm,
            logarithm(settings.beta1),
            logarithm(settings.beta2),
            settings.growth_interval,
            settings.scaled,
        )
        return norm

    def _update(self, tables: _Tables, dtypes: list[torch.dtype], zero: bool) -> None:
        settings = self.settings
        for part, dtype in zip(tables.parts, dtypes, strict=True):
            self._raw.adamw_(
                part.rows,
                part.owners,
                tables.gradients[part.range],
                part.decays,
                part.streams,
                self._steps[part.range],
                tables.scales[part.range],
                self.numbers,
                self.counts,
                settings.beta1,
                settings.beta2,
                settings.eps,
                settings.seed & 0x7FFFFFFF,
                (part.parameter, dtype, part.moment, part.copy),
                zero,
            )

    def _step_of_torch(
        self,
        gradients: list[Tensor | None],
        copies: list[Tensor | None],
        loss: Tensor,
        zero: bool,
    ) -> Tensor:
        norm = gradient_norm(gradients, self.scale)
        taken = decide_(self.settings, self.numbers, self.counts, norm, loss)
        for i, gradient in enumerate(gradients):
            if gradient is None:
                continue
            slot, copy = self._slots[i], copies[i]
            update_(
                slot,
                gradient.to(self.numbers.dtype) * self.numbers[FACTOR],
                self._steps[i],
                self.numbers[RATE],
                taken,
                self._order[i],
                self.settings,
            )
            if copy is not None:
                copy.copy_(slot.parameter)
            if zero:
                gradient.zero_()
        return norm


@dataclass(frozen=True)
class _Part:
    """The slots of one launch: of one combination of dtypes."""

    range: slice
    rows: Tensor
    owners: Tensor
    decays: Tensor
    streams: Tensor
    sums: Tensor
    parameter: torch.dtype
    moment: torch.dtype
    copy: torch.dtype | None


class _Tables:
    """Where everything is, on the device."""

    def __init__(
        self, raw: Any, slots: list[Slot], copies: list[Tensor | None], order: list[int]
    ) -> None:
        device = slots[0].parameter.device
        self._found = _places(slots, copies)
        self.scales = torch.zeros(len(slots), 2, device=device)
        self.gradients = torch.zeros(len(slots), dtype=torch.int64, device=device)
        self._addresses = [0] * len(slots)
        ranges = _runs([_kind(slot) for slot in slots])
        tables = [raw.tabulate(*_columns(slots[run]), copies[run]) for run in ranges]
        chunks = [owners.numel() for _, owners in tables]
        self.sums = torch.zeros(sum(chunks), device=device)
        self.parts = [
            _Part(
                run,
                rows.to(device),
                owners.to(device),
                torch.tensor([slot.decay for slot in slots[run]], device=device),
                torch.tensor(order[run], dtype=torch.int32, device=device),
                sums,
                slots[run][0].parameter.dtype,
                slots[run][0].mean.dtype,
                _dtype_of_copies(copies[run]),
            )
            for run, (rows, owners), sums in zip(
                ranges, tables, self.sums.split(chunks), strict=True
            )
        ]

    def hold(self, slots: list[Slot], copies: list[Tensor | None]) -> bool:
        """Whether parameters and copies are where they were."""
        return self._found == _places(slots, copies)

    def place(
        self, gradients: list[Tensor | None], zero: bool
    ) -> tuple[list[torch.dtype], list[Tensor | None]]:
        """Tell the device where the gradients are.

        Returns:
            Their dtype in each part; and the gradients that are there, some of them copies, which
            must live until the kernels are launched.
        """
        dtypes: list[torch.dtype] = []
        ready: list[Tensor | None] = []
        for part in self.parts:
            given = gradients[part.range]
            found = [gradient.dtype for gradient in given if gradient is not None]
            dtypes.append(functools.reduce(torch.promote_types, found or [part.parameter]))
            ready += [None if g is None else _readable(g, dtypes[-1], zero) for g in given]
        # An empty gradient has no address, but its step counts.
        addresses = [0 if g is None else g.data_ptr() or _ALIGNMENT for g in ready]
        # In a steady run memory is handed out in the same order, and nothing has to be sent.
        if addresses != self._addresses:
            self.gradients = _sent(addresses, self.gradients.device)
            self._addresses = addresses
        return dtypes, ready


def _readable(gradient: Tensor, dtype: torch.dtype, zero: bool) -> Tensor:
    if (
        gradient.dtype is dtype
        and gradient.is_contiguous()
        and gradient.data_ptr() % _ALIGNMENT == 0
    ):
        return gradient
    if zero:
        raise ValueError(
            "optimizer: gradients that are left as zeros must be contiguous, of one dtype, and "
            f"begin at multiples of {_ALIGNMENT} bytes"
        )
    return gradient.to(dtype, copy=True, memory_format=torch.contiguous_format)


def _sent(values: list[int], device: torch.device) -> Tensor:
    """int64 on the device. Pinned memory is not used again before the copy has been made: PyTorch's
    allocator sees to that."""
    pinned = device.type == "cuda"
    host = torch.tensor(values, dtype=torch.int64, pin_memory=pinned)
    return host.to(device, non_blocking=pinned)


def _columns(slots: list[Slot]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    return [s.parameter for s in slots], [s.mean for s in slots], [s.square for s in slots]


def _dtype_of_copies(copies: list[Tensor | None]) -> torch.dtype | None:
    found = {copy.dtype for copy in copies if copy is not None}
    if len(found) > 1:
        raise ValueError(f"optimizer: expected working copies of one dtype, found {found}")
    return found.pop() if found else None


def _runs(kinds: list[Any]) -> list[slice]:
    """Where equal neighbours are."""
    starts = [i for i, kind in enumerate(kinds) if i == 0 or kind != kinds[i - 1]]
    return [slice(*ends) for ends in zip(starts, [*starts[1:], len(kinds)], strict=True)]


def _places(slots: list[Slot], copies: list[Tensor | None]) -> list[int]:
    parameters = [slot.parameter.data_ptr() for slot in slots]
    return parameters + [0 if copy is None else copy.data_ptr() for copy in copies]


def _kernels(parameters: list[Tensor]) -> Any | None:
    raw = backend.kernels("optimizer", *parameters)
    if raw is not cpp.optimizer:
        return raw
    if backend.requested() == "cpp":
        raise RuntimeError(
            "backend 'cpp' was requested, but its optimizer has no state on the device, no working "
            "copies and no stochastic rounding"
        )
    return None


def _kind(slot: Slot) -> tuple[str, str]:
    return str(slot.parameter.dtype), str(slot.mean.dtype)


def _inverse(order: list[int]) -> list[int]:
    return sorted(range(len(order)), key=order.__getitem__)

"""Section `ceilings`: the rates that everything is held against, and what a launch costs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..harness import in_turns
from ..records import Record
from .case import Case, Context

NAME = "ceilings"


def cases(context: Context) -> list[Case]:
    """Copy, read, matrix products, launches."""
    products = [
        Case(NAME, "matrix product", f"{size}x{size}x{size}", partial(_product, dtype, size), dtype)
        for dtype in ("bfloat16", "float16", "float32")
        for size in [context.pick(8192, 8192, 64) // (4 if dtype == "float32" else 1)]
    ]
    return [
        Case(NAME, "copy", "read and written", _copy, "", seconds=1.0),
        Case(NAME, "read", "a sum", _read, "", seconds=1.0),
        *(replace(case, seconds=1.0) for case in products),
        Case(NAME, "launch", "x += 1 on 1 KiB", _launch, "float32", seconds=1.0),
    ]


def rates(context: Context) -> dict[str, float]:
    """Bytes per second of a copy, operations per second of a bf16 matrix product."""
    size = context.pick(8192, 8192, 64)
    blocks = {"copy": _copying(context), "product": _multiplying("bfloat16", size, context)}
    turns = in_turns({name: block for name, (block, _) in blocks.items()}, 3, sample=lambda: None)
    return {name: work / min(turns.rounds[name]) for name, (_, work) in blocks.items()}


def _copying(context: Context) -> tuple[Any, float]:
    count = context.pick(1 << 30, 1 << 30, 1 << 10)
    source = torch.randn(count, generator=context.generator("copy"), device=context.device.place)
    target = torch.empty_like(source)
    return context.device.timed([lambda: target.copy_(source)]).block, 8.0 * count


def _multiplying(dtype: str, size: int, context: Context) -> tuple[Any, float]:
    # Random: on zeros the chip draws less power and runs faster.
    place, generator = context.device.place, context.generator("product")
    a, b = (
        torch.randn(size, size, generator=generator, device=place).to(getattr(torch, dtype))
        for _ in range(2)
    )
    out = torch.empty_like(a)
    return context.device.timed([lambda: torch.mm(a, b, out=out)]).block, 2.0 * size**3


def _copy(context: Context) -> Iterator[Record]:
    yield from _one(context, "copy", "read and written", "", "torch.copy_", _copying(context), "B")


def _read(context: Context) -> Iterator[Record]:
    count = context.pick(1 << 30, 1 << 30, 1 << 10)
    source: Tensor = torch.randn(
        count, generator=context.generator("read"), device=context.device.place
    )
    timed = context.device.timed([source.sum])
    yield from _one(context, "read", "a sum", "", "torch.sum", (timed.block, 4.0 * count), "B")


def _product(dtype: str, size: int, context: Context) -> Iterator[Record]:
    label = f"{size}x{size}x{size}"
    found = _multiplying(dtype, size, context)
    yield from _one(context, "matrix product", label, dtype, "torch.mm", found, "FLOP")


def _one(
    context: Context, name: str, label: str, dtype: str, who: str, found: Any, unit: str
) -> Iterator[Record]:
    block, work = found
    turns = in_turns({who: block}, context.rounds, sample=lambda: None)
    yield from turns.records(NAME, name, label, dtype, work=work, unit=unit)


def _launch(context: Context) -> Iterator[Record]:
    """The host's time for a launch by PyTorch, and the device's for one kernel of a graph."""
    x = torch.zeros(256, device=context.device.place)
    timed = context.device.timed([lambda: x.add_(1.0)])
    blocks = {
        "eager, on the host": lambda: context.device.wall(lambda: x.add_(1.0), 500),
        "in a graph": timed.block,
    }
    turns = in_turns(blocks, context.rounds, sample=lambda: None)
    yield from turns.records(NAME, "launch", "x += 1 on 1 KiB", "float32")

"""`python -m bench.cuda.worker DEVICE FD`: runs the sections that it reads orders for.

Orders come on the standard input, messages go to the file descriptor; what else is printed goes to
the standard error. After an error that leaves the device unusable the process ends, with status 3.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ..records import OURS, Record
from . import ceilings, protocol
from .case import Case, Context
from .device import Device, Gpu, Host, first_line
from .protocol import Order, message
from .sections import module_of

UNUSABLE = 3

Say = Callable[..., None]


def main(kind: str, descriptor: int) -> int:
    """Answer orders until there are no more."""
    device: Device = Gpu() if kind == "cuda" else Host()
    torch.backends.cuda.matmul.allow_tf32 = False
    with os.fdopen(descriptor, "w", buffering=1) as line:

        def say(kind: str, **what: Any) -> None:
            line.write(message(kind, **what))
            line.flush()

        for order in sys.stdin:
            if not run(Order.read(order), device, say):
                return UNUSABLE
            say("finished")
    return 0


def run(order: Order, device: Device, say: Say) -> bool:
    """The cases of an order; False if the device is not usable any more."""
    context = Context(
        device,
        order.scale,
        order.rounds,
        order.seed,
        order.deadline,
        order.compile,
        dict(order.rates),
        lambda what: say("doing", what=what),
    )
    if order.section != "check" and not context.rates:
        with device.working():
            context.rates |= ceilings.rates(context)
        say("rates", rates=context.rates)
    for case in dealt(_cases(order, context, say), order):
        say("begin", case=case.key)
        for record in guarded(case, context):
            say("record", record=protocol.packed(record))
        if not device.alive():
            return False
        say("ended", case=case.key)
        device.forget()
    return True


def _cases(order: Order, context: Context, say: Say) -> list[Case]:
    """The section's; a section that cannot even be imported is an error like that of a case."""
    try:
        return module_of(order.section).cases(context)
    except Exception as error:
        traceback.print_exc()
        note = f"ERROR: {first_line(error)}"
        lost = Record(order.section, order.section, "", "", OURS, note=note)
        say("record", record=protocol.packed(lost))
        return []


def dealt(cases: list[Case], order: Order) -> list[Case]:
    """The cases of this worker that are still to do."""
    small = [case for case in cases if not case.large]
    mine = small[order.part :: order.parts]
    if order.part == 0:
        mine += [case for case in cases if case.large]
    wanted = order.only
    return [
        case
        for case in mine
        if case.key not in order.done and (wanted in case.name or wanted in case.label)
    ]


def guarded(case: Case, context: Context) -> Iterator[Record]:
    """A case's records; an error is one more."""
    if context.left < case.seconds:
        yield case.remark("left out: the section's time is over")
        return
    begun = time.perf_counter()
    try:
        yield from case.run(context)
    except Exception as error:
        traceback.print_exc()
        yield case.remark(f"ERROR: {first_line(error)}")
    context.progress(f"{case.key}: {time.perf_counter() - begun:.1f} s")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2])))

"""AdamW in each of its combinations of dtypes, with and without loss scaling."""

from __future__ import annotations

import torch

from fastllm.kernels import optimizer
from tests.kernels.case import EVERYWHERE, Case, indices, meta

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
ONE_NUMBER = "one number for each program"
NARROW = {
    "square_sums": ONE_NUMBER,
    "finish": "one program, and half a megabyte at most for 1e9 parameters",
}
EVERY = ("sm_86", *EVERYWHERE)


def run(
    parameter: torch.dtype,
    gradient: torch.dtype,
    moment: torch.dtype,
    copy: torch.dtype | None,
    scaled: bool = False,
    tensors: int = 3,
    rows: int = 4096,
) -> None:
    slots = [meta(rows, 11, dtype=parameter)] * tensors
    found = optimizer.tabulate(slots, slots, slots, [None] * tensors)
    table, owners = (tensor.to("meta") for tensor in found)
    addresses = meta(tensors, dtype=torch.int64)
    numbers, counts, sums = meta(3), indices(4), meta(owners.numel())
    steps, scales = meta(tensors), meta(tensors, 2)
    optimizer.square_sums_(table, owners, addresses, numbers, sums, gradient, scaled)
    logarithms = -0.1, -0.001
    optimizer.finish_(
        sums,
        addresses,
        steps,
        scales,
        numbers,
        counts,
        meta(),
        meta(),
        1.0,
        *logarithms,
        2000,
        scaled,
    )
    optimizer.adamw_(
        table,
        owners,
        addresses,
        meta(tensors),
        indices(tensors),
        steps,
        scales,
        numbers,
        counts,
        0.9,
        0.999,
        1e-8,
        7,
        (parameter, gradient, moment, copy),
        scaled,
    )


CASES = [
    Case(
        label,
        lambda dtypes=dtypes, scaled=scaled: run(*dtypes, scaled),
        targets=targets,
        narrow=NARROW,
        again=tuple(
            lambda n=n, rows=rows, dtypes=dtypes, scaled=scaled: run(*dtypes, scaled, n, rows)
            for n, rows in ((1, 7), (16, 16), (300, 129))
        ),
    )
    for label, dtypes, scaled, targets in (
        ("fp32", (FP32, FP32, FP32, None), False, EVERY),
        ("master", (FP32, FP32, FP32, BF16), False, EVERY),
        ("master, bf16 gradients", (FP32, BF16, FP32, BF16), False, EVERYWHERE),
        ("master, bf16 moments", (FP32, FP32, BF16, BF16), False, EVERYWHERE),
        ("bf16", (BF16, BF16, BF16, None), False, EVERY),
        ("bf16, fp32 moments", (BF16, BF16, FP32, None), False, EVERYWHERE),
        ("fp16, scaled", (FP32, FP32, FP32, FP16), True, EVERYWHERE),
    )
]

"""Drawing a token for each row, with and without a repetition penalty."""

from __future__ import annotations

from functools import partial

import torch

from fastllm.kernels import sampling
from tests.kernels.case import Case, indices, meta

FEW = {
    "softmax_sums_kernel": "what is stored of 4,096 logits is five numbers",
    "pick_kernel": "what is stored of a row is its token and two numbers",
    "advance_kernel": "a few numbers of each row, most of them moved by one",
}


def run(vocabulary: int, rows: int = 64, penalised: bool = False, stops: int = 3) -> None:
    logits, row, numbers = meta(rows, vocabulary), meta(rows), indices(rows)
    long, seen = meta(rows, dtype=torch.int64), vocabulary if penalised else 0
    table = meta(rows, seen, dtype=torch.uint8)
    sampling.draw(logits, row, row, long, numbers, numbers, indices(rows, stops), table)
    sampling.advance_(
        long, row, row, indices(1), long, indices(7, rows), numbers, indices(rows, stops),
        indices(rows, 16), table, indices(16, 3, rows),
    )  # fmt: skip


CASES = [
    Case(
        "151936",
        partial(run, 151936),
        again=(partial(run, 151936, 1), partial(run, 151936, 17), partial(run, 151936, stops=1)),
        narrow=FEW,
    ),
    Case("128256, penalty", partial(run, 128256, penalised=True), narrow=FEW),
    Case("50257", partial(run, 50257), targets=("sm_90",), narrow=FEW),
]

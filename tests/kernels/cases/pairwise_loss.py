from __future__ import annotations

import torch

from fastllm.kernels import pairwise_loss
from tests.kernels.case import Case, meta

FEW = {"pairwise_loss_kernel": "any number of pairs, of which a batch has few"}


def launch(dtype: torch.dtype, pairs: int) -> None:
    score = meta(pairs, dtype=dtype)
    pairwise_loss.forward(score, score, None, 0.01)
    pairwise_loss.forward(score, score, score, 0.01)


CASES = [
    Case(
        "bf16 8",
        lambda: launch(torch.bfloat16, 8),
        again=(lambda: launch(torch.bfloat16, 3), lambda: launch(torch.bfloat16, 96)),
        narrow=FEW,
    ),
    Case("fp32 1000", lambda: launch(torch.float32, 1000), narrow=FEW),
    Case("fp32 100000", lambda: launch(torch.float32, 100_000), narrow=FEW),
]

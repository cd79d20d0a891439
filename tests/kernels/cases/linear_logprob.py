from __future__ import annotations

import torch

from fastllm.kernels import linear_logprob
from tests.kernels.case import EVERYWHERE, Case, meta

ROW = {"logprob_forward_kernel": "a row leaves three numbers"}
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def launch(
    dtype: torch.dtype, vocabulary: int, gradient: torch.dtype | None = None, rows: int = 64
) -> None:
    width = -(-vocabulary // 32) * 32
    logits, row = meta(rows, width, dtype=dtype), meta(rows)
    targets = meta(rows, dtype=torch.int64)
    for softcap in (0.0, 30.0):
        options = 0.7, softcap, vocabulary
        linear_logprob.forward(logits, targets, *options)
        linear_logprob.backward_(logits, targets, row, row, row, row, *options, gradient)
        linear_logprob.forward_backward_(logits, targets, row, *options, gradient)


def scale(dtype: torch.dtype, rows: int = 1000) -> None:
    linear_logprob.scale_(meta(rows, 4096, dtype=dtype), meta())


CASES = [
    Case(
        "bf16 128256",
        lambda: launch(BF16, 128256),
        again=(lambda: launch(BF16, 128256, rows=2049), lambda: launch(BF16, 131072)),
        narrow=ROW,
    ),
    Case("fp32 128256", lambda: launch(FP32, 128256), narrow=ROW),
    Case("fp32 128256 to bf16", lambda: launch(FP32, 128256, BF16), narrow=ROW),
    Case("fp32 50257 to fp16", lambda: launch(FP32, 50257, FP16), ("sm_90", "gfx942"), narrow=ROW),
    Case("bf16 50257", lambda: launch(BF16, 50257), narrow=ROW),
    Case("bf16 32000", lambda: launch(BF16, 32000), ("sm_80", "sm_86", "sm_90"), narrow=ROW),
    Case("bf16 259", lambda: launch(BF16, 259), ("sm_90",), narrow=ROW),
    Case("scale bf16", lambda: scale(BF16), again=(lambda: scale(BF16, 5000),)),
    Case("scale fp32", lambda: scale(FP32), EVERYWHERE),
]

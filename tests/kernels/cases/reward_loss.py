from __future__ import annotations

import torch

from fastllm.kernels import reward_loss
from tests.kernels.case import Case, meta

SCORES = {
    "reward_loss_kernel": "a row leaves one number, and a pair is found by its rows",
    "reward_scores_kernel": "a row leaves one number",
}
FUSED = {"reward_loss_kernel": SCORES["reward_loss_kernel"]}


def launch(dtype: torch.dtype, rows: int, channels: int, margin: bool = True) -> None:
    hidden, weight = meta(rows, channels, dtype=dtype), meta(channels)
    which = meta(rows // 2, dtype=torch.int64)
    given = meta(rows // 2) if margin else None
    loss, _, _, dscores = reward_loss.forward(hidden, weight, which, which, given, 0.01)
    for needs_weight in (True, False):
        reward_loss.backward(loss, dscores, hidden, weight, needs_weight)


BF16, FP32 = torch.bfloat16, torch.float32
BACKWARD = {"reward_backward_kernel": "one without the weight's gradient reads no hidden states"}
CASES = [
    Case(
        "bf16 64 x 4096",
        lambda: launch(BF16, 64, 4096),
        again=(lambda: launch(BF16, 50, 4096),),
        narrow=FUSED | BACKWARD,
    ),
    Case("bf16 16 x 2048", lambda: launch(BF16, 16, 2048, margin=False), narrow=FUSED | BACKWARD),
    Case("bf16 512 x 4096", lambda: launch(BF16, 512, 4096), narrow=SCORES | BACKWARD),
    Case("fp32 1024 x 2048", lambda: launch(FP32, 1024, 2048), narrow=SCORES | BACKWARD),
]

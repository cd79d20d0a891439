"""SwiGLU on tensors of their own and on the halves of one buffer."""

from __future__ import annotations

import torch

from fastllm.kernels import swiglu
from tests.kernels.case import EVERYWHERE, Case, meta


def run(dtype: torch.dtype, columns: int, rows: int = 512) -> None:
    gate, both = meta(rows, columns, dtype=dtype), meta(rows, 2 * columns, dtype=dtype)
    swiglu.forward(gate, gate)
    swiglu.backward(gate, gate, gate)
    swiglu.forward_fused(both)
    swiglu.backward_fused(gate, both)


CASES = [
    Case(
        f"{str(dtype).removeprefix('torch.')}-{columns}",
        lambda dtype=dtype, columns=columns: run(dtype, columns),
        targets=targets,
        again=tuple(
            lambda n=n, dtype=dtype, columns=columns: run(dtype, columns, n) for n in (17, 8192)
        ),
    )
    for dtype, columns, targets in (
        (torch.bfloat16, 512, ("sm_90",)),
        (torch.bfloat16, 4864, ("sm_90", "sm_86")),
        (torch.bfloat16, 14336, EVERYWHERE),
        (torch.float16, 14336, ("sm_90",)),
        (torch.float32, 14336, EVERYWHERE),
    )
]

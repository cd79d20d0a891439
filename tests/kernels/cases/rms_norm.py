"""add+RMSNorm, forward and backward, over the classes of its table and the widths of models."""

from __future__ import annotations

import torch

from fastllm.kernels import rms_norm
from tests.kernels.case import Case, meta

_NARROW = {"sum_rows": "a few columns for each program, so that enough programs read the rows"}
_TWO_PROGRAMS = "Triton 3.6 gives up two registers, so that two programs of 512 threads fit"
_WHOLE_ROW = "1,024 threads have 64 registers each, and a row of 32,768 wants a few more"


def run(dtype: torch.dtype, columns: int, rows: int = 512) -> None:
    x, rstd = meta(rows, columns, dtype=dtype), meta(rows)
    for weight in (meta(columns, dtype=dtype), meta(columns)):
        rms_norm.forward(x, weight, 1e-6, None)
        rms_norm.forward(x, weight, 1e-6, x)
        rms_norm.backward(x, None, x, weight, rstd, False)
        rms_norm.backward(x, x, x, weight, rstd, True)


def case(dtype: torch.dtype, columns: int, **options: object) -> Case:
    name = str(dtype).removeprefix("torch.")
    return Case(
        f"{name}-{columns}",
        lambda: run(dtype, columns),
        narrow=_NARROW,
        **options,  # type: ignore[arg-type]
    )


CASES = [
    case(torch.bfloat16, 128, again=(lambda: run(torch.bfloat16, 128, 17),)),
    case(torch.bfloat16, 896),
    case(torch.bfloat16, 2048),
    case(
        torch.bfloat16,
        3584,
        again=tuple(lambda n=n: run(torch.bfloat16, 3584, n) for n in (17, 513)),
    ),
    case(torch.bfloat16, 4096, targets=("sm_80", "sm_86", "sm_90", "sm_100", "gfx942")),
    case(torch.float16, 5120, targets=("sm_90",)),
    case(torch.bfloat16, 8192, targets=("sm_80", "sm_86", "sm_90", "sm_100", "gfx942")),
    case(
        torch.bfloat16,
        16384,
        spills={("sm_100", "rms_norm_forward_kernel"): (8, _TWO_PROGRAMS)},
    ),
    case(
        torch.bfloat16,
        32768,
        targets=("sm_90", "gfx942"),
        spills={("sm_90", "rms_norm_forward_kernel"): (128, _WHOLE_ROW)},
    ),
    case(torch.float32, 2048, targets=("sm_86", "sm_90")),
    case(torch.float32, 4096, targets=("sm_86", "sm_90")),
    case(torch.float32, 8192, targets=("sm_80", "sm_86", "sm_90", "sm_100", "gfx942")),
    case(torch.float32, 16384, targets=("sm_90",)),
]

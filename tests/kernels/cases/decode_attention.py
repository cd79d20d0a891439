"""Decode attention: prompts shared by many sequences, by one, and none at all."""

from __future__ import annotations

from functools import partial

import torch

from fastllm.kernels import decode_attention
from tests.kernels.case import EVERYWHERE, Case, indices, meta

ONE_ROW = {
    "combine_splits_kernel": "a program stores one row of a head, up to 256 numbers of 2 bytes, "
    "where it reads that in fp32 for each split"
}


def run(
    dtype: torch.dtype,
    head_dim: int,
    heads: tuple[int, int] = (28, 4),
    sequences: int = 64,
    prompts: int = 8,
    columns: tuple[int, int] = (17, 16),
) -> None:
    decode_attention.forward(
        meta(sequences, heads[0], head_dim, dtype=dtype),
        meta(700, heads[1], head_dim, 64, dtype=dtype),
        meta(700, heads[1], 64, head_dim, dtype=dtype),
        indices(prompts, columns[0]),
        indices(prompts),
        indices(sequences),
        indices(sequences, columns[1]),
        indices(sequences),
        0.1,
        0,
    )


SHARED = partial(run, torch.bfloat16, 128)
CASES = [
    Case(
        "bf16 128, groups of 8",
        SHARED,
        again=(
            partial(SHARED, sequences=96, prompts=12),
            partial(SHARED, columns=(18, 13)),
            partial(SHARED, columns=(1, 31)),
        ),
        multiplies=("decode_splits_kernel",),
        narrow=ONE_ROW,
    ),
    Case(
        "bf16 64, 0.5B",
        partial(run, torch.bfloat16, 64, (14, 2), 256, 32),
        multiplies=("decode_splits_kernel",),
        narrow=ONE_ROW,
    ),
    Case(
        # Four rows of queries: a whole warp group would multiply zeros.
        "bf16 128, 8B without prompts",
        partial(run, torch.bfloat16, 128, (32, 8), 64, 1, (0, 64)),
        targets=("sm_80", "sm_86", "sm_100", "gfx942"),
        multiplies=("decode_splits_kernel",),
        narrow=ONE_ROW,
    ),
    Case(
        "bf16 128, 8B with a prompt each",
        partial(run, torch.bfloat16, 128, (32, 8), 64, 64, (64, 4)),
        targets=("sm_90",),
        narrow=ONE_ROW,
    ),
    Case("fp32 64", partial(run, torch.float32, 64), targets=EVERYWHERE, narrow=ONE_ROW),
    Case("fp16 256", partial(run, torch.float16, 256), targets=("sm_90", "sm_86"), narrow=ONE_ROW),
    Case("bf16 80", partial(run, torch.bfloat16, 80), targets=("sm_90",), narrow=ONE_ROW),
]

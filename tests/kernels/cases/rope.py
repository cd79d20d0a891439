"""RoPE, with and without norms of the heads, and into the cache of a decoding step."""

from __future__ import annotations

import torch

from fastllm.kernels import rope
from tests.kernels.case import EVERYWHERE, Case, indices, meta

_NARROW = {"sum_rows": "a few columns for each program, so that enough programs read the rows"}


def run(dtype: torch.dtype, head_dim: int, tokens: int = 512) -> None:
    heads, key_heads = 28, 4
    # Slices of one projection, as a model may have them.
    parts = meta(tokens, heads + 2 * key_heads, head_dim, dtype=dtype)
    q, k, v = parts.split((heads, key_heads, key_heads), dim=1)
    tables, positions = (meta(4096, head_dim // 2),) * 2, indices(tokens)
    asked = q[: tokens // 2], k, *tables, positions[: tokens // 2]
    norms = (meta(head_dim, dtype=dtype),) * 2
    rope.forward(q, k, *tables, positions, False)
    rope.forward(q, k, *tables, positions, True)
    rope.forward(*asked, False, positions, *norms, 1e-6)
    for weight_grad in (False, True):
        rope.backward(*asked[:2], *asked, positions, *norms, 1e-6, weight_grad)
    cache = meta(700, key_heads, head_dim, 64, dtype=dtype)
    step = positions, positions, positions, cache, cache.view(700, key_heads, 64, head_dim)
    rope.forward_into_cache(q, k, v, *tables, *step)
    rope.forward_into_cache(q, k, v, *tables, *step, *norms, 1e-6)


CASES = [
    Case(
        f"{str(dtype).removeprefix('torch.')}-{head_dim}",
        lambda dtype=dtype, head_dim=head_dim: run(dtype, head_dim),
        targets=targets,
        again=tuple(
            lambda n=n, dtype=dtype, head_dim=head_dim: run(dtype, head_dim, n) for n in (34, 8192)
        ),
        narrow=_NARROW,
    )
    for dtype, head_dim, targets in (
        (torch.bfloat16, 64, ("sm_86", "sm_90")),
        (torch.bfloat16, 80, ("sm_90",)),
        (torch.float16, 96, ("sm_90",)),
        (torch.bfloat16, 128, EVERYWHERE),
        (torch.bfloat16, 256, ("sm_86", "sm_90")),
        (torch.float32, 80, EVERYWHERE),
    )
]

"""Attention over a prompt with answers and a segment on its own, in every form of its kernels."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from fastllm import PackedLayout
from fastllm.kernels import attention
from tests.kernels.case import EVERYWHERE, Case, meta

_PREFIX = [-1, 0, 0, -1]
# Long enough for bulk copies, and for work that is divided.
_LONG, _SHORT = [3000, 900, 700, 4100], [300, 200, 150, 400]
_MULTIPLIES = ("attention_forward", "attention_dq", "attention_dkdv")
_NARROW = {"add_parts": "16 rows for each program, so that a few tiles fill all processors"}
_AMD = {"attention": "a lane keeps 4 columns of a product, which are 8 bytes of bf16"}
_NVIDIA = tuple(name for name in EVERYWHERE if name != "gfx942")
_MASKED = "only in the loop over blocks that need a mask, a few of each tile"
_HOPPER = {("sm_90", "attention_dkdv_kernel"): (64, _MASKED)}
_WIDE_HEADS = {
    ("sm_90", "attention_dkdv_kernel"): (
        256,
        "two sums of 64 keys by 256 channels take half of all registers, and smaller tiles "
        "multiply without warp groups",
    )
}
_FULL_PRECISION = {
    (target, f"attention_{part}_kernel"): (
        512,
        "three TF32 products of fp32 tiles keep both halves of each operand",
    )
    for target in ("sm_80", "sm_90", "sm_100", "gfx942")
    for part in ("forward", "dq", "dkdv")
}


def run(
    dtype: torch.dtype,
    head_dim: int,
    lengths: list[int],
    rows: list[int] | None = None,
    key_heads: int = 4,
) -> None:
    layout = PackedLayout(lengths, _PREFIX[: len(lengths)], "meta")
    layout = layout if rows is None else layout.select(rows)
    q = meta(layout.num_queries, 28, head_dim, dtype=dtype)
    # Slices of one projection, as a model has them.
    k, v = meta(layout.total_tokens, 2 * key_heads, head_dim, dtype=dtype).split(key_heads, dim=1)
    out, lse = attention.forward(q, k, v, layout, 0.1, 0)
    attention.backward(out, q, k, v, out, lse, layout, 0.1, 0)


def case(dtype: torch.dtype, head_dim: int, lengths: list[int], **options: Any) -> Case:
    longer = [length + 17 for length in lengths], [length + 64 for length in lengths]
    form = "bulk" if lengths is _LONG else "plain"
    return Case(
        f"{str(dtype).removeprefix('torch.')}-{head_dim}-{form}",
        partial(run, dtype, head_dim, lengths),
        again=tuple(partial(run, dtype, head_dim, more) for more in longer),
        **{"multiplies": _MULTIPLIES, "narrow": _NARROW if lengths is _LONG else {}, **options},
    )


def of_few(head_dim: int, targets: tuple[str, ...], narrow: dict[str, str] | None = None) -> Case:
    few = partial(run, torch.bfloat16, head_dim, _SHORT, [299, 400, 649, 1049])
    return Case(f"bfloat16-{head_dim}-few", few, targets, narrow=narrow or {})


CASES = [
    case(torch.bfloat16, 128, _LONG, targets=("sm_90", "sm_100"), spills=_HOPPER),
    case(torch.bfloat16, 64, _LONG, targets=("sm_90", "sm_100")),
    case(torch.bfloat16, 80, _LONG, targets=("sm_90",), spills=_HOPPER),
    case(torch.float16, 96, _LONG, targets=("sm_90",), spills=_HOPPER),
    case(torch.bfloat16, 256, _LONG, targets=("sm_90",), spills=_WIDE_HEADS),
    case(torch.bfloat16, 128, _SHORT, targets=(*_NVIDIA, "sm_86")),
    case(torch.bfloat16, 64, _SHORT, targets=_NVIDIA),
    case(torch.float16, 80, _SHORT, targets=("sm_80", "sm_90")),
    case(torch.float32, 64, _SHORT, targets=("sm_80", "sm_100"), spills=_FULL_PRECISION),
    # Warp groups have no three-product form of fp32: single warps multiply.
    case(torch.float32, 64, _SHORT, targets=("sm_90",), spills=_FULL_PRECISION, multiplies=()),
    of_few(128, ("sm_90",)),
    *(
        case(dtype, head_dim, _SHORT, targets=("gfx942",), narrow=_AMD, spills=_FULL_PRECISION)
        for dtype, head_dim in (
            (torch.bfloat16, 128),
            (torch.bfloat16, 64),
            (torch.float16, 80),
            (torch.float32, 64),
        )
    ),
    of_few(128, ("gfx942",), _AMD),
]

"""Section `ops`: what reads and writes rows once, held against the copy; and the host's time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastllm import ops

from . import host, liger, small
from .case import Case, Context
from .contest import Contender, Op, Work, ours
from .exact import Inputs, by_autograd
from .goals import Share, Within

NAME = "ops"
BYTES = 2


def cases(context: Context) -> list[Case]:
    """The sizes of a model of 8 billion weights; then what is small, and the host's time."""
    rows = context.pick(8192, 8192, 8)
    large = [
        rms_norm(rows, context.pick(4096, 4096, 64)),
        swiglu(rows, context.pick(14336, 14336, 64)),
        rope(rows, *context.pick((32, 8, 128), (32, 8, 128), (4, 2, 16)), normed=True),
    ]
    if context.scale != "quick":
        large += [
            rms_norm(4 * rows, context.pick(896, 896, 24)),
            rope(rows, *context.pick((32, 8, 64), (32, 8, 64), (4, 2, 32)), normed=False),
        ]
    return [*(op.case() for op in large), *small.cases(context), *host.cases(context)]


def random(
    *shapes: tuple[int, ...], names: Sequence[str], dtype: torch.dtype = torch.bfloat16
) -> Callable[[torch.device, torch.Generator], Inputs]:
    """Normally distributed inputs."""

    def make(device: torch.device, generator: torch.Generator) -> Inputs:
        return {
            name: torch.randn(shape, generator=generator, device=device).to(dtype)
            for name, shape in zip(names, shapes, strict=True)
        }

    return make


def rms_norm(rows: int, channels: int) -> Op:
    """The residual add and the norm: four tensors each way."""
    amount = 4.0 * rows * channels * BYTES
    shape, judged = (rows, channels), channels in (4096, 64)

    def contenders() -> list[Contender]:
        return [
            ours(ops.rms_norm),
            Contender("eager", ops.rms_norm_reference),
            Contender("F.rms_norm", torch_rms_norm),
            Contender("compile", ops.rms_norm_reference, compile=True),
            *liger.add_rms_norm(),
        ]

    return Op(
        NAME,
        "add + rms_norm",
        f"{rows}x{channels}",
        random(shape, (channels,), shape, names=("x", "weight", "residual")),
        contenders,
        by_autograd(ops.rms_norm_reference),
        Work(amount, goal=Share(0.93) if judged else None),
        Work(amount, goal=Share(0.87) if judged else None),
        leaves=("x", "weight", "residual"),
    )


def torch_rms_norm(x: Tensor, weight: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    h = x + residual
    return F.rms_norm(h, h.shape[-1:], weight, eps=1e-6), h


def swiglu(rows: int, width: int) -> Op:
    """On one buffer with the gates and what they let through: three tensors, and five back."""
    tensor = float(rows * width * BYTES)

    def contenders() -> list[Contender]:
        return [
            ours(ops.swiglu),
            Contender("eager", swiglu_reference),
            Contender("F.silu", torch_swiglu),
            Contender("compile", torch_swiglu, compile=True),
            *liger.swiglu(),
        ]

    return Op(
        NAME,
        "swiglu",
        f"{rows}x{width}",
        random((rows, 2 * width), names=("gate",)),
        contenders,
        by_autograd(swiglu_reference),
        Work(3 * tensor, goal=Share(0.94)),
        Work(5 * tensor, goal=Share(0.91)),
        leaves=("gate",),
    )


def swiglu_reference(gate: Tensor) -> Tensor:
    return ops.swiglu_reference(*gate.chunk(2, dim=-1))


def torch_swiglu(gate: Tensor) -> Tensor:
    gate, up = gate.chunk(2, dim=-1)
    return F.silu(gate) * up


def rope(tokens: int, heads: int, key_heads: int, head_dim: int, normed: bool) -> Op:
    """Queries and keys in and out, once; with norms of the heads before the rotation or not."""
    amount = 2.0 * tokens * (heads + key_heads) * head_dim * BYTES
    half = head_dim // 2

    def inputs(device: torch.device, generator: torch.Generator) -> Inputs:
        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device).to(torch.bfloat16)

        frequencies = 1e4 ** (-torch.arange(half, device=device) / half)
        angles = torch.arange(tokens, device=device)[:, None] * frequencies
        found = {
            "q": normal(tokens, heads, head_dim),
            "k": normal(tokens, key_heads, head_dim),
            "cos": angles.cos(),
            "sin": angles.sin(),
            "positions": torch.arange(tokens, dtype=torch.int32, device=device),
        }
        if normed:
            found |= {"q_norm": normal(head_dim), "k_norm": normal(head_dim)}
        return found

    def contenders() -> list[Contender]:
        return [
            ours(ops.rope),
            Contender("eager", rope_reference),
            Contender("rotate_half", rotate_half, prepare=whole_tables),
            Contender("compile", rotate_half, prepare=whole_tables, compile=True),
            *([] if normed else liger.rope()),
        ]

    leaves = ("q", "k", "q_norm", "k_norm") if normed else ("q", "k")
    return Op(
        NAME,
        "q/k-norm + rope" if normed else "rope",
        f"{tokens}x{heads}/{key_heads}x{head_dim}",
        inputs,
        contenders,
        by_autograd(rope_reference),
        Work(amount, goal=Within(44e-6) if normed and head_dim == 128 else None),
        # Back, the norms need what was normalised as well.
        Work(amount * (1.5 if normed else 1.0)),
        leaves=leaves,
    )


def rope_reference(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """The norms and the rotation, one after another."""
    if q_norm is not None and k_norm is not None:
        q, k = (_normed(x, weight) for x, weight in ((q, q_norm), (k, k_norm)))
    return ops.rope_reference(q, k, cos, sin, positions)


def _normed(x: Tensor, weight: Tensor) -> Tensor:
    found = ops.rms_norm_reference(x, weight)
    assert isinstance(found, Tensor)
    return found


def whole_tables(inputs: Inputs) -> Inputs:
    """cos and sin of every token, [T, 1, D], in the dtype of q, as models keep them."""
    tables = {
        name: torch.cat([inputs[name]] * 2, -1)[:, None].to(inputs["q"].dtype)
        for name in ("cos", "sin")
    }
    return {name: value for name, value in inputs.items() if name != "positions"} | tables


def rotate_half(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
) -> tuple[Any, ...]:
    """As models of transformers do it: a copy with halves swapped."""
    if q_norm is not None and k_norm is not None:
        q = F.rms_norm(q, q.shape[-1:], q_norm, eps=1e-6)
        k = F.rms_norm(k, k.shape[-1:], k_norm, eps=1e-6)
    return tuple(x * cos + _swapped(x) * sin for x in (q, k))


def _swapped(x: Tensor) -> Tensor:
    low, high = x.chunk(2, dim=-1)
    return torch.cat((-high, low), dim=-1)

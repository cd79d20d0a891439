"""Checks beyond 2^31 elements: offsets that do not fit 32 bits.

The beginning and the end are compared with fp64; the rest must hold no NaN, which is what it holds
before it is written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastllm import ops
from fastllm.layout import PackedLayout
from fastllm.ops import use_backend

from . import exact_attention, rows
from .case import Case, Context
from .exact import Wrong, by_autograd, compare, outputs_of, poisoned

NAME = "check"
B16 = torch.bfloat16

# Rows that are compared at either end.
ENDS = 64


def cases(context: Context) -> list[Case]:
    """One for each op whose tensors can grow so large; one worker runs them all."""
    beyond = context.pick((1 << 31) + (1 << 22), 0, 1 << 11)
    checks: dict[str, Callable[..., Any]] = {
        "rms_norm": _rms_norm,
        "swiglu": _swiglu,
        "rope": _rope,
        "attention": _attention,
        "decode_attention": _decode,
    }
    label = "more than 2^31 elements"
    return [
        Case(NAME, op, label, partial(_run, op, check, beyond), seconds=3.0, large=True)
        for op, check in checks.items()
    ]


def _run(
    op: str, check: Callable[..., tuple[float, float]], elements: int, context: Context
) -> Iterator[Any]:
    case = Case(NAME, op, "more than 2^31 elements", partial(_run, op, check, elements))
    # Seven tensors of bf16 at most, and some fp64 at the ends.
    needed = 16.0 * elements
    if context.device.free_bytes() < needed:
        yield case.remark(f"left out: {needed / 1e9:.0f} GB are not free")
        return
    try:
        with use_backend(context.device.backend), poisoned():
            error = check(elements, context)
    except Wrong as wrong:
        yield case.remark(f"WRONG: {wrong}")
    else:
        yield case.remark(f"ok, off by {error:.2g}")


def _ends(count: int) -> list[slice]:
    return [slice(0, min(ENDS, count)), slice(max(0, count - ENDS), count)]


def _normal(context: Context, *shape: int) -> Tensor:
    generator = context.generator("large", shape)
    return torch.randn(shape, generator=generator, device=context.device.place, dtype=B16)


def _whole(tensor: Tensor, what: str) -> None:
    """No NaN: the sum of all elements is a number."""
    if bool(tensor.sum(dtype=torch.float32).isnan()):
        raise Wrong(f"{what} was not written everywhere")


def _by_rows(
    function: Callable[..., Any],
    reference: Callable[..., Any],
    tensors: dict[str, Tensor],
    fixed: dict[str, Tensor],
) -> float:
    """An op that treats each row by itself, forward and backward."""
    leaves = {name: t.requires_grad_() for name, t in tensors.items()}
    outputs = outputs_of(function(**leaves, **fixed))
    gradients = [torch.randn_like(output) for output in outputs]
    found = torch.autograd.grad(outputs, list(leaves.values()), gradients)
    for tensor in (*outputs, *found):
        _whole(tensor, "a result")
    worst = 0.0
    for part in _ends(len(outputs[0])):
        few = {n: t.detach()[part] for n, t in leaves.items()}
        few |= {n: t[part] if n == "positions" else t for n, t in fixed.items()}
        right = by_autograd(reference)(few, tuple(leaves), [g[part] for g in gradients])
        worst = max(
            worst,
            compare([t.detach()[part] for t in outputs], right.outputs, "output", B16),
            compare([t[part] for t in found], right.gradients, "gradient", B16),
        )
    return worst


def _rms_norm(elements: int, context: Context) -> float:
    channels = context.pick(4096, 4096, 16)
    shape = elements // channels, channels
    tensors = {"x": _normal(context, *shape), "residual": _normal(context, *shape).flip(0)}
    weight = {"weight": _normal(context, channels)}
    return _by_rows(ops.rms_norm, ops.rms_norm_reference, tensors, weight)


def _swiglu(elements: int, context: Context) -> float:
    width = context.pick(14336, 14336, 16)
    gate = _normal(context, elements // (2 * width), 2 * width)
    return _by_rows(ops.swiglu, rows.swiglu_reference, {"gate": gate}, {})


def _rope(elements: int, context: Context) -> float:
    heads, key_heads, head_dim = context.pick((32, 8, 128), (32, 8, 128), (4, 2, 16))
    tokens = elements // (heads * head_dim)
    place = context.device.place
    angles = torch.rand(512, head_dim // 2, device=place) * 6
    fixed = {
        "cos": angles.cos(),
        "sin": angles.sin(),
        "positions": torch.arange(tokens, dtype=torch.int32, device=place) % 512,
    }
    tensors = {
        "q": _normal(context, tokens, heads, head_dim),
        "k": _normal(context, tokens, key_heads, head_dim),
    }
    return _by_rows(ops.rope, rows.rope_reference, tensors, fixed)


def _attention(elements: int, context: Context) -> float:
    heads, key_heads, head_dim = context.pick((32, 8, 128), (32, 8, 128), (4, 2, 16))
    length = context.pick(512, 512, 8)
    segments = elements // (heads * head_dim * length)
    layout = PackedLayout([length] * segments, None, context.device.place)
    tokens = layout.total_tokens
    q = _normal(context, tokens, heads, head_dim)
    k, v = (_normal(context, tokens, key_heads, head_dim) for _ in range(2))
    v = v.flip(0)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    out = ops.attention(q, k, v, layout)
    gradient = torch.randn_like(out)
    found = torch.autograd.grad(out, leaves, gradient)
    for tensor in (out, *found):
        _whole(tensor, "a result")
    worst = 0.0
    one = PackedLayout([length], None, context.device.place)
    for part in (slice(0, length), slice(tokens - length, tokens)):
        inputs = {n: t.detach()[part] for n, t in zip("qkv", leaves, strict=True)}
        right = exact_attention.solve(inputs | {"layout": one}, (), [gradient[part]])
        few = [t[part] for t in found]
        worst = max(
            worst,
            compare([out.detach()[part]], right.outputs, "output", B16),
            compare(few, right.gradients, "gradient", B16),
        )
    return worst


def _decode(elements: int, context: Context) -> float:
    """A pool of blocks so large that the last ones lie beyond 2^31 elements."""
    key_heads, head_dim, block = context.pick((8, 128, 64), (8, 128, 64), (2, 16, 64))
    count = elements // (key_heads * head_dim * block) + 8
    place = context.device.place
    keys = _normal(context, count, key_heads, head_dim, block)
    values = _normal(context, count, key_heads, block, head_dim)
    ids = partial(torch.tensor, dtype=torch.int32, device=place)
    inputs = {
        "q": _normal(context, 3, 2 * key_heads, head_dim),
        "prefix_blocks": ids([[count - 1, 0], [count - 2, 1]]),
        "prefix_lengths": ids([100, 77]),
        "group": ids([0, 0, 1]),
        "tail_blocks": ids([[count - 3], [2], [count - 4]]),
        "tail_lengths": ids([64, 3, 40]),
    }
    out = ops.decode_attention(keys=keys, values=values, **inputs)
    used = torch.tensor([count - 1, 0, count - 2, 1, count - 3, 2, count - 4], device=place)
    few = {"keys": keys[used].double(), "values": values[used].double()}
    few |= inputs | {"q": inputs["q"].double()}
    few |= {"prefix_blocks": ids([[0, 1], [2, 3]]), "tail_blocks": ids([[4], [5], [6]])}
    with use_backend("torch"):
        right = ops.decode_attention_reference(**few)
    return compare([out], [right], "output", B16)

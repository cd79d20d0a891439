"""The calls that section `check` makes: odd sizes, all dtypes, rows with gaps, shared prompts."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastllm import ops
from fastllm.layout import PackedLayout

from . import check_heads, check_sampling, exact_attention, rows
from .case import Context
from .exact import Inputs, by_autograd

if TYPE_CHECKING:
    from .checks import Check

B16, F16, F32 = torch.bfloat16, torch.float16, torch.float32

# Segments of a packed row, and which of them continue which.
ROWS: dict[str, tuple[list[int], list[int] | None]] = {
    "one segment": ([333], None),
    "groups, single and empty segments": (
        [130, 77, 1, 200, 0, 65, 300, 64, 128],
        [-1, 0, 0, 0, -1, -1, -1, 6, 6],
    ),
    "many short ones": ([5, 17, 1, 3, 40, 2, 9, 31] * 6, None),
}
SMALL_ROWS = {"groups": ([9, 4, 1, 0, 7], [-1, 0, 0, -1, -1])}


def checks(context: Context) -> Iterator[Check]:
    """All of them."""
    for some in (_rms_norm, _swiglu, _rope, _attention, _decode):
        yield from some(context)
    yield from check_heads.heads(context)
    yield from check_sampling.into_cache(context)


def check(*arguments: Any, **more: Any) -> Check:
    """A `Check`; that module imports this one."""
    from .checks import Check

    return Check(*arguments, **more)


def normal(dtype: torch.dtype, **shapes: tuple[int, ...]) -> Callable[..., Inputs]:
    """Normally distributed inputs by name."""

    def make(device: torch.device, generator: torch.Generator) -> Inputs:
        return {
            name: torch.randn(shape, generator=generator, device=device).to(dtype)
            for name, shape in shapes.items()
        }

    return make


def _rms_norm(context: Context) -> Iterator[Check]:
    sizes = [(1001, 4096), (7, 8192), (130, 896), (3, 80), (1, 64), (0, 64), (5, 16384), (9, 77)]
    for number, (count, channels) in enumerate(context.pick(sizes, sizes, [(5, 24), (0, 8)])):
        for dtype in (B16, F16, F32) if number < 2 else (B16,):
            for added in (True, False):
                shapes = {"x": (count, channels), "weight": (channels,)}
                shapes |= {"residual": (count, channels)} if added else {}
                yield check(
                    "rms_norm",
                    f"{count}x{channels}" + " with residual" * added,
                    dtype,
                    ops.rms_norm,
                    by_autograd(ops.rms_norm_reference),
                    normal(dtype, **shapes),
                    tuple(shapes),
                    gradients=("plain", "expanded", "spaced")[number % 3],
                    spaced=("x",) if number % 2 else (),
                )


def _swiglu(context: Context) -> Iterator[Check]:
    sizes = [(333, 4864), (5, 14336), (64, 344), (7, 77), (0, 64)]
    for number, (count, width) in enumerate(context.pick(sizes, sizes, [(5, 12), (0, 8)])):
        for dtype in (B16, F16, F32) if number == 0 else (B16,):
            yield check(
                "swiglu",
                f"{count}x{width} on one buffer",
                dtype,
                ops.swiglu,
                by_autograd(rows.swiglu_reference),
                normal(dtype, gate=(count, 2 * width)),
                ("gate",),
                gradients=("plain", "spaced", "expanded")[number % 3],
            )
            yield check(
                "swiglu",
                f"{count}x{width}",
                dtype,
                ops.swiglu,
                by_autograd(ops.swiglu_reference),
                normal(dtype, gate=(count, width), up=(count, width)),
                ("gate", "up"),
                spaced=("up",) if number % 2 else (),
            )


def _rope(context: Context) -> Iterator[Check]:
    sizes = [
        (1001, 32, 8, 128),
        (77, 14, 2, 64),
        (33, 5, 5, 80),
        (64, 8, 1, 96),
        (9, 4, 2, 256),
        (1, 1, 1, 64),
    ]
    for number, size in enumerate(context.pick(sizes, sizes, [(5, 4, 2, 16)])):
        for dtype in (B16, F16, F32) if number == 0 else (B16,):
            for normed in (True, False):
                leaves = ("q", "k", "q_norm", "k_norm") if normed else ("q", "k")
                yield check(
                    "rope",
                    "x".join(map(str, size)) + " with norms" * normed,
                    dtype,
                    ops.rope,
                    by_autograd(rows.rope_reference),
                    _rope_inputs(dtype, *size, normed=normed),
                    leaves,
                    gradients=("plain", "spaced", "expanded")[number % 3],
                    spaced=("q",) if number % 2 else (),
                )


def _rope_inputs(
    dtype: torch.dtype, tokens: int, heads: int, key_heads: int, head_dim: int, normed: bool
) -> Callable[..., Inputs]:
    shapes: dict[str, tuple[int, ...]] = {
        "q": (tokens, heads, head_dim),
        "k": (tokens, key_heads, head_dim),
    }
    shapes |= {"q_norm": (head_dim,), "k_norm": (head_dim,)} if normed else {}

    def make(device: torch.device, generator: torch.Generator) -> Inputs:
        longest = 4 * tokens + 3
        frequencies = 1e4 ** (-torch.arange(head_dim // 2, device=device) * 2 / head_dim)
        angles = torch.arange(longest, device=device)[:, None] * frequencies
        positions = torch.randint(longest, (tokens,), generator=generator, device=device)
        tables = {"cos": angles.cos(), "sin": angles.sin(), "positions": positions.int()}
        return normal(dtype, **shapes)(device, generator) | tables

    return make


def _attention(context: Context) -> Iterator[Check]:
    sizes = [
        (B16, 8, 2, 128),
        (B16, 4, 4, 64),
        (F16, 6, 2, 64),
        (F32, 4, 2, 64),
        (B16, 14, 2, 64),
        (B16, 4, 1, 80),
        (B16, 4, 2, 96),
        (B16, 4, 2, 256),
        (F32, 2, 1, 128),
    ]
    sizes = context.pick(sizes, sizes, [(F32, 4, 2, 16)])
    layouts = context.pick(ROWS, ROWS, SMALL_ROWS)
    for number, (dtype, heads, key_heads, head_dim) in enumerate(sizes):
        lengths, prefix = next(reversed(list(layouts.values())))
        yield check(
            "attention",
            f"last tokens {heads}/{key_heads}x{head_dim}",
            dtype,
            ops.attention,
            exact_attention.solve,
            _attention_inputs(dtype, lengths, prefix, heads, key_heads, head_dim, None, last=True),
            ("q", "k", "v"),
        )
        for where, (lengths, prefix) in list(layouts.items())[: None if number < 2 else 2]:
            for window in (None, context.pick(70, 70, 3)) if number < 5 else (None,):
                yield check(
                    "attention",
                    f"{where} {heads}/{key_heads}x{head_dim} window {window}",
                    dtype,
                    ops.attention,
                    exact_attention.solve,
                    _attention_inputs(dtype, lengths, prefix, heads, key_heads, head_dim, window),
                    ("q", "k", "v"),
                    gradients=("plain", "spaced", "expanded")[number % 3],
                )


def _attention_inputs(
    dtype: torch.dtype,
    lengths: list[int],
    prefix: list[int] | None,
    heads: int,
    key_heads: int,
    head_dim: int,
    window: int | None,
    last: bool = False,
) -> Callable[..., Inputs]:
    """`last`: only the last token of each segment asks."""
    tokens = sum(lengths)
    every = heads + 2 * key_heads

    def make(device: torch.device, generator: torch.Generator) -> Inputs:
        # As a model has them: side by side in the rows of one product.
        together = torch.randn(tokens, every, head_dim, generator=generator, device=device)
        q, k, v = together.to(dtype).split([heads, key_heads, key_heads], dim=1)
        layout = PackedLayout(lengths, prefix, device)
        if last:
            ends = itertools.accumulate(lengths)
            layout = layout.select([end - 1 for end, n in zip(ends, lengths, strict=True) if n])
            q = q[layout.query_rows.long()]
        tensors = {"q": q.detach(), "k": k.detach(), "v": v.detach()}
        return tensors | {"layout": layout, "window": window}

    return make


def _decode(context: Context) -> Iterator[Check]:
    sizes = [
        (B16, 3, 4, 300, 90, 32, 8, 128),
        (B16, 2, 1, 4100, 1, 14, 2, 64),
        (F16, 1, 7, 64, 65, 8, 8, 64),
        (F32, 2, 3, 70, 33, 4, 2, 64),
        (B16, 1, 1, 1, 3, 4, 1, 256),
        (B16, 5, 2, 130, 128, 6, 3, 80),
    ]
    small = [(F32, 2, 2, 70, 20, 4, 2, 16)]
    for number, (dtype, *size) in enumerate(context.pick(sizes, sizes, small)):
        yield check(
            "decode_attention",
            "x".join(map(str, size)),
            dtype,
            ops.decode_attention,
            by_autograd(ops.decode_attention_reference),
            decode_inputs(dtype, *size, ragged=number % 2 == 0),
        )


def decode_inputs(
    dtype: torch.dtype,
    prompts: int,
    group: int,
    prompt: int,
    tail: int,
    heads: int,
    key_heads: int,
    head_dim: int,
    ragged: bool = True,
    block: int = 64,
) -> Callable[..., Inputs]:
    """Caches in shuffled blocks; ragged: sequences of all lengths up to these."""
    size = prompts * group
    of_prompt, of_tail = -(-prompt // block), -(-tail // block)

    def make(device: torch.device, generator: torch.Generator) -> Inputs:
        def lengths(count: int, most: int) -> Tensor:
            least = max(1, most // 2) if ragged else most
            found = torch.randint(least, most + 1, (count,), generator=generator, device=device)
            return found.int()

        def cache(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device).to(dtype)

        count = prompts * of_prompt + size * of_tail
        blocks = torch.randperm(count, generator=generator, device=device).int()
        first = blocks[: prompts * of_prompt].view(prompts, of_prompt)
        return {
            "q": cache(size, heads, head_dim),
            "keys": cache(count, key_heads, head_dim, block),
            "values": cache(count, key_heads, block, head_dim),
            "prefix_blocks": first,
            "prefix_lengths": lengths(prompts, prompt),
            "group": torch.arange(size, dtype=torch.int32, device=device) // group,
            "tail_blocks": blocks[prompts * of_prompt :].view(size, of_tail),
            "tail_lengths": lengths(size, tail),
        }

    return make

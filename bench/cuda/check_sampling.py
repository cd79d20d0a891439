"""Checks of what a token step does beside attention: drawing tokens, and writing the cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastllm import ops
from fastllm.generation.sampling import SamplingRows, sample, uniforms
from fastllm.ops import use_backend

from ..records import Record
from . import rows
from .case import Case, Context
from .exact import Inputs, Wrong, by_autograd, compare, poisoned

if TYPE_CHECKING:
    from .checks import Check

NAME = "check"
BLOCK = 64

# How far fp32's cumulative distribution of 150,000 tokens may be from the exact one.
CUMULATIVE = 1e-4


def cases(context: Context) -> list[Case]:
    """Sizes of batches and vocabularies."""
    sizes = context.pick([(7, 151936), (64, 32000), (1, 77)], [(7, 151936)], [(3, 41)])
    return [
        Case(NAME, "sampling", f"{rows}x{columns}", partial(_run, rows, columns), "float32", 1.0)
        for rows, columns in sizes
    ]


def _run(count: int, vocabulary: int, context: Context) -> Iterator[Record]:
    case = Case(
        NAME, "sampling", f"{count}x{vocabulary}", partial(_run, count, vocabulary), "float32"
    )
    try:
        error = check(count, vocabulary, context)
    except Wrong as wrong:
        yield case.remark(f"WRONG: {wrong}")
    else:
        yield case.remark(f"ok, off by {error:.2g}")


def check(count: int, vocabulary: int, context: Context) -> float:
    """Whether tokens are where the distribution passes the streams' numbers; the error of their
    log-probabilities.

    Raises:
        Wrong: they are not.
    """
    place, generator = context.device.place, context.generator("sampling", count, vocabulary)
    logits = torch.randn(count, vocabulary, generator=generator, device=place) * 2
    numbers = torch.arange(count, device=place)
    temperature = torch.where(numbers % 3 == 2, 0.0, 0.5 + numbers % 2)
    given = SamplingRows(
        temperature=temperature,
        top_p=torch.ones(count, device=place),
        min_p=torch.zeros(count, device=place),
        repetition_penalty=torch.ones(count, device=place),
        top_k=torch.zeros(count, dtype=torch.int32, device=place),
        key=torch.randint(1 << 62, (count,), generator=generator, device=place),
        count=numbers.int(),
        min_count=torch.zeros(count, dtype=torch.int32, device=place),
        stop_tokens=torch.full((count, 1), -1, dtype=torch.int32, device=place),
        seen=torch.zeros((count, 0), dtype=torch.uint8, device=place),
    )
    with use_backend(context.device.backend), poisoned():
        drawn = sample(logits, given, filtered=False)
    greedy = temperature == 0
    wide = logits.double() / torch.where(greedy, 1.0, temperature)[:, None]
    logp, tokens = wide.log_softmax(-1), drawn.token_ids
    _passes(logp.exp().cumsum(-1), tokens, uniforms(given.key, given.count), greedy)
    best = logits.gather(1, tokens[:, None]).squeeze(1)
    if not bool((best == logits.max(-1).values)[greedy].all()):
        raise Wrong("a greedy row did not take its likeliest token")
    right = logp.gather(1, tokens[:, None]).squeeze(1)
    found = drawn.logprobs, drawn.sampling_logprobs
    return compare(found, (right, right * ~greedy), "log-probability", torch.float32)


def _passes(cumulative: Tensor, tokens: Tensor, uniform: Tensor, greedy: Tensor) -> None:
    above = cumulative.gather(1, tokens[:, None]).squeeze(1)
    first = tokens == 0
    before = cumulative.gather(1, (tokens - 1).clamp(min=0)[:, None]).squeeze(1)
    below = before.masked_fill(first, 0.0)
    wrong = (uniform < below - CUMULATIVE) | (uniform > above + CUMULATIVE)
    if bool((wrong & ~greedy).any()):
        raise Wrong("a token is not where the cumulative distribution passes its number")


# -- into the cache --------------------------------------------------------------------------------


def into_cache(context: Context) -> Iterator[Check]:
    """Rotation of one token of each sequence, and its key and value in the cache."""
    from .checks import Check

    sizes = [
        (torch.bfloat16, 33, 32, 8, 128, True),
        (torch.bfloat16, 256, 14, 2, 64, False),
        (torch.float16, 5, 4, 4, 80, True),
    ]
    small = [(torch.float32, 3, 4, 2, 16, True), (torch.float32, 3, 4, 2, 16, False)]
    for dtype, count, heads, key_heads, head_dim, normed in context.pick(sizes, sizes, small):
        yield Check(
            "rope_into_cache",
            f"{count}x{heads}/{key_heads}x{head_dim}" + " with norms" * normed,
            dtype,
            _into_cache,
            by_autograd(_reference),
            _inputs(dtype, count, heads, key_heads, head_dim, normed),
        )


def _into_cache(keys: Tensor, values: Tensor, **given: Any) -> tuple[Tensor, ...]:
    keys, values = keys.clone(), values.clone()
    return ops.rope_into_cache(keys=keys, values=values, **given), keys, values


def _reference(
    v: Tensor, keys: Tensor, values: Tensor, block: Tensor, place: Tensor, **given: Any
) -> tuple[Tensor, ...]:
    q, k = rows.rope_reference(**given)
    keys, values = keys.clone(), values.clone()
    keys[block.long(), :, :, place.long()] = k
    values[block.long(), :, place.long()] = v
    return q, keys, values


def _inputs(
    dtype: torch.dtype, count: int, heads: int, key_heads: int, head_dim: int, normed: bool
) -> Callable[..., Inputs]:
    def make(device: torch.device, generator: torch.Generator) -> Inputs:
        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device).to(dtype)

        def below(most: int) -> Tensor:
            return torch.randint(most, (count,), generator=generator, device=device).int()

        angles = torch.rand(512, head_dim // 2, generator=generator, device=device) * 6
        norms = {"q_norm": normal(head_dim), "k_norm": normal(head_dim)} if normed else {}
        blocks = torch.randperm(count + 3, generator=generator, device=device).int()
        return norms | {
            "q": normal(count, heads, head_dim),
            "k": normal(count, key_heads, head_dim),
            "v": normal(count, key_heads, head_dim),
            "cos": angles.cos(),
            "sin": angles.sin(),
            "positions": below(512),
            "keys": normal(count + 3, key_heads, head_dim, BLOCK),
            "values": normal(count + 3, key_heads, BLOCK, head_dim),
            "block": blocks[:count],
            "place": below(BLOCK),
        }

    return make

"""Checks of what stands at the end of a model: heads, losses, and linear layers with adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastllm import ops

from . import small
from .case import Context
from .exact import Inputs, by_autograd

if TYPE_CHECKING:
    from .checks import Check

B16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
PAIR = ("chosen", "rejected", "margin")


def heads(context: Context) -> Iterator[Check]:
    """All of them."""
    yield from _logprobs(context)
    yield from _pairs(context)
    yield from _layers(context)


def _check(*arguments: Any, **more: Any) -> Check:
    from .checks import Check

    return Check(*arguments, **more)


def _logprobs(context: Context) -> Iterator[Check]:
    sizes = [
        (B16, 515, 256, 50257, {}),
        (B16, 64, 128, 151936, {"temperature": 0.7, "softcap": 30.0}),
        (F16, 130, 96, 32000, {}),
        (F32, 77, 64, 5003, {"temperature": 1.3}),
        (B16, 1, 64, 77, {}),
    ]
    small_sizes: list[Any] = [(F32, 5, 8, 41, {"softcap": 9.0}), (F32, 3, 8, 16, {})]
    for dtype, count, channels, vocabulary, how in context.pick(sizes, sizes, small_sizes):
        label = f"{count}x{channels}x{vocabulary} " + ", ".join(f"{k} {v}" for k, v in how.items())
        inputs = _head_inputs(dtype, count, channels, vocabulary)
        leaves = ("hidden", "weight")
        yield _check(
            "linear_logprob",
            label.strip(),
            dtype,
            _partial(ops.linear_logprob, entropy=True, **how),
            by_autograd(_partial(ops.linear_logprob_reference, entropy=True, **how)),
            inputs,
            leaves,
        )
        yield _check(
            "linear_cross_entropy",
            label.strip(),
            dtype,
            _weighted_loss(how),
            by_autograd(_weighted_reference(how)),
            _head_inputs(dtype, count, channels, vocabulary, weighted=True),
            leaves,
        )


def _partial(function: Callable[..., Any], **how: Any) -> Callable[..., Any]:
    return lambda **given: function(**given, **how)


def _weighted_loss(how: dict[str, Any]) -> Callable[..., Tensor]:
    return lambda **given: ops.linear_cross_entropy(**given, **how)[0]


def _weighted_reference(how: dict[str, Any]) -> Callable[..., Tensor]:
    def loss(hidden: Tensor, weight: Tensor, targets: Tensor, token_weights: Tensor) -> Tensor:
        logp = ops.linear_logprob_reference(hidden, weight, targets, **how)
        assert isinstance(logp, Tensor)
        return -(token_weights * logp).sum()

    return loss


def _head_inputs(
    dtype: torch.dtype, count: int, channels: int, vocabulary: int, weighted: bool = False
) -> Callable[..., Inputs]:
    def make(device: torch.device, generator: torch.Generator) -> Inputs:
        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device)

        found = {
            "hidden": normal(count, channels).to(dtype),
            "weight": (normal(vocabulary, channels) * 2 * channels**-0.5).to(dtype),
            "targets": torch.randint(vocabulary, (count,), generator=generator, device=device),
        }
        # A third of the tokens carries no loss.
        weights = normal(count).abs() * (torch.arange(count, device=device) % 3 != 0)
        return found | ({"token_weights": weights} if weighted else {})

    return make


def _pairs(context: Context) -> Iterator[Check]:
    for dtype, pairs in context.pick(
        [(B16, 7), (F32, 1), (F16, 1000), (F32, 4097)],
        [(B16, 7), (F32, 1), (F16, 1000), (F32, 4097)],
        [(F32, 3)],
    ):

        def scores(
            device: torch.device,
            generator: torch.Generator,
            dtype: torch.dtype = dtype,
            pairs: int = pairs,
        ) -> Inputs:
            made = torch.randn(3, pairs, generator=generator, device=device).to(dtype)
            return dict(zip(PAIR, (row.clone() for row in made), strict=True))

        yield _check(
            "pairwise_loss",
            f"{pairs} with margins",
            dtype,
            ops.pairwise_loss,
            by_autograd(ops.pairwise_loss_reference),
            scores,
            PAIR[:2],
        )


def _layers(context: Context) -> Iterator[Check]:
    sizes = [(B16, 333, 896, 16), (B16, 9, 4096, 64), (F32, 17, 96, 4), (F16, 64, 256, 8)]
    for dtype, count, channels, rank in context.pick(sizes, sizes, [(F32, 5, 8, 2)]):
        op = small.lora(count, channels, rank)

        def cast(
            device: torch.device,
            generator: torch.Generator,
            make: Callable[..., Inputs] = op.inputs,
            dtype: torch.dtype = dtype,
        ) -> Inputs:
            return {name: t.to(dtype) for name, t in make(device, generator).items()}

        yield _check(
            "lora_linear",
            f"{count}x{channels} rank {rank}",
            dtype,
            op.contenders()[0].function,
            op.exact,
            cast,
            op.leaves,
        )
    pairs, width = context.pick((130, 896), (130, 896), (3, 8))
    op = small.reward_loss(pairs, width)
    yield _check(
        "reward_loss",
        f"{pairs} pairs x {width}",
        B16,
        op.contenders()[0].function,
        op.exact,
        op.inputs,
        op.leaves,
    )
    rows, outputs = context.pick((130, 512), (130, 512), (3, 8))
    yield _check(
        "linear",
        f"{rows}x{width}x{outputs}, fp32 weights",
        B16,
        ops.linear,
        by_autograd(lambda x, weight: F.linear(x, weight)),
        _wide_weight(rows, width, outputs),
        ("x", "weight"),
    )


def _wide_weight(rows: int, width: int, outputs: int) -> Callable[..., Inputs]:
    def make(device: torch.device, generator: torch.Generator) -> Inputs:
        x = torch.randn(rows, width, generator=generator, device=device)
        weight = torch.randn(outputs, width, generator=generator, device=device)
        return {"x": x.to(B16), "weight": weight * width**-0.5}

    return make

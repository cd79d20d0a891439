"""What is mostly a matrix product, or mostly launches: LoRA's linear layer, the reward loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastllm import ops

from .case import Case, Context
from .contest import Contender, Op, Work, ours
from .exact import Inputs, by_autograd

NAME = "ops"
SCALING = 2.0


def cases(context: Context) -> list[Case]:
    """Both ops."""
    rows, channels, rank = context.pick((8192, 4096, 16), (8192, 4096, 16), (8, 16, 4))
    pairs, width = context.pick((512, 4096), (512, 4096), (6, 16))
    return [lora(rows, channels, rank).case(), reward_loss(pairs, width).case()]


def _normal(device: torch.device, generator: torch.Generator) -> Callable[..., Tensor]:
    def make(*shape: int, scale: float = 1.0) -> Tensor:
        found = torch.randn(shape, generator=generator, device=device) * scale
        return found.to(torch.bfloat16)

    return make


def lora(rows: int, channels: int, rank: int) -> Op:
    """A square layer with an adapter: gradients for x and the adapter, the base is frozen."""

    def inputs(device: torch.device, generator: torch.Generator) -> Inputs:
        normal = _normal(device, generator)
        return {
            "x": normal(rows, channels),
            "weight": normal(channels, channels, scale=channels**-0.5),
            "a": normal(rank, channels, scale=channels**-0.5),
            "b": normal(channels, rank, scale=rank**-0.5),
        }

    def contenders() -> list[Contender]:
        return [
            ours(_our_lora),
            Contender("eager", lora_reference),
            Contender("compile", lora_reference, compile=True),
        ]

    base, adapter = 2.0 * rows * channels * channels, 4.0 * rows * channels * rank
    return Op(
        NAME,
        "LoRA linear",
        f"{rows}x{channels}x{channels} rank {rank}",
        inputs,
        contenders,
        by_autograd(lora_reference),
        Work(base + adapter, "FLOP"),
        Work(base + 2 * adapter, "FLOP"),
        leaves=("x", "a", "b"),
        memory=True,
    )


def _our_lora(x: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> Any:
    return ops.lora_linear(x, weight, None, a, b, SCALING)


def lora_reference(x: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """As adapters are usually written."""
    return F.linear(x, weight) + F.linear(F.linear(x, a), b) * SCALING


def reward_loss(pairs: int, width: int) -> Op:
    """Head, gather, loss and metrics of a batch of pairs: too small for anything but launches."""

    def inputs(device: torch.device, generator: torch.Generator) -> Inputs:
        normal = _normal(device, generator)
        rows = torch.randperm(2 * pairs, generator=generator, device=device)
        return {
            "hidden": normal(2 * pairs, width),
            "weight": normal(1, width, scale=width**-0.5),
            "chosen": rows[:pairs].clone(),
            "rejected": rows[pairs:].clone(),
        }

    def contenders() -> list[Contender]:
        return [
            ours(lambda **given: ops.reward_loss(**given)[:2]),
            Contender("eager", reward_reference),
            Contender("compile", reward_reference, compile=True),
        ]

    elements = 2.0 * pairs * width
    return Op(
        NAME,
        "reward loss",
        f"{pairs} pairs x {width}",
        inputs,
        contenders,
        by_autograd(reward_reference),
        Work(2 * elements),
        both=Work(3 * 2 * elements),
        leaves=("hidden", "weight"),
    )


def reward_reference(
    hidden: Tensor, weight: Tensor, chosen: Tensor, rejected: Tensor
) -> tuple[Tensor, Tensor]:
    """The loss, and the scores, which carry no gradient."""
    scores = F.linear(hidden, weight).squeeze(-1)
    wide = scores if scores.dtype == torch.float64 else scores.float()
    loss = -F.logsigmoid(wide[chosen] - wide[rejected]).mean()
    return loss, wide.detach()

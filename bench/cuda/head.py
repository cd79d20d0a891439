"""Section `head`: from hidden states to a loss or log-probabilities, without keeping the logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastllm import ops

from . import liger
from .case import Case, Context
from .contest import Contender, Op, Work, ours
from .exact import Inputs, Right, by_autograd, widened
from .goals import Within

NAME = "head"


def cases(context: Context) -> list[Case]:
    """The size with goals, forward and backward in one; and what reinforcement learning needs."""
    size = context.pick((4096, 4096, 128256), (4096, 4096, 128256), (8, 16, 96))
    small = context.pick((8192, 896, 151936), (8192, 896, 151936), (6, 8, 64))
    found = [cross_entropy(*size), scored(*size)]
    if context.scale != "quick":
        found += [per_token(*size), cross_entropy(*small, goal=False), per_token(*small)]
    return [op.case() for op in found]


def _inputs(rows: int, channels: int, vocabulary: int) -> Callable[..., Inputs]:
    def make(device: torch.device, generator: torch.Generator) -> Inputs:
        hidden = torch.randn(rows, channels, generator=generator, device=device)
        weight = torch.randn(vocabulary, channels, generator=generator, device=device)
        return {
            "hidden": hidden.to(torch.bfloat16),
            "weight": (weight * channels**-0.5).to(torch.bfloat16),
            "targets": torch.randint(vocabulary, (rows,), generator=generator, device=device),
        }

    return make


def cross_entropy(rows: int, channels: int, vocabulary: int, goal: bool = True) -> Op:
    """The loss of SFT with its gradients: three matrix products."""

    def contenders() -> list[Contender]:
        return [
            ours(lambda hidden, weight, targets: _loss(hidden, weight, targets)),
            Contender("eager", all_logits),
            Contender("compile", all_logits, compile=True),
            Contender("F.linear_cross_entropy", chunked),
            *liger.linear_cross_entropy(),
        ]

    flops = 6.0 * rows * channels * vocabulary
    return Op(
        NAME,
        "linear + cross-entropy",
        f"{rows}x{channels}x{vocabulary}",
        _inputs(rows, channels, vocabulary),
        contenders,
        by_autograd(_wide_loss),
        None,
        both=Work(flops, "FLOP", Within(17.0e-3, 1.2e9) if goal else None),
        leaves=("hidden", "weight"),
        memory=True,
        seconds=6.0,
    )


def _loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return ops.linear_cross_entropy(hidden, weight, targets)[0]


def _wide_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight), targets, reduction="sum")


def all_logits(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """As models of transformers do it: all logits at once, the loss in fp32."""
    return F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="sum")


def chunked(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """PyTorch's head that keeps no logits, where this version has it."""
    options = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if options is None:
        raise NotImplementedError("this version of PyTorch does not have it")
    return F.linear_cross_entropy(hidden, weight, targets, reduction="sum", options=options())


def scored(rows: int, channels: int, vocabulary: int) -> Op:
    """Log-probability and entropy, forward only: one matrix product."""

    def contenders() -> list[Contender]:
        return [
            ours(_logprob_and_entropy),
            Contender("eager", of_logits),
            Contender("compile", of_logits, compile=True),
        ]

    def exact(inputs: Inputs, *_: Any) -> Right:
        with torch.no_grad():
            wide = {name: widened(value) for name, value in inputs.items()}
            return Right(of_logits(**wide))

    return Op(
        NAME,
        "logprob + entropy",
        f"{rows}x{channels}x{vocabulary}",
        _inputs(rows, channels, vocabulary),
        contenders,
        exact,
        Work(2.0 * rows * channels * vocabulary, "FLOP", Within(5.8e-3)),
        memory=True,
    )


def _logprob_and_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Any:
    with torch.no_grad():
        return ops.linear_logprob(hidden, weight, targets, entropy=True)


def of_logits(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """From all logits at once."""
    logits = F.linear(hidden, weight)
    logp = torch.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), -1)
    return logp.gather(1, targets[:, None]).squeeze(1), -(logp.exp() * logp).sum(-1)


def per_token(rows: int, channels: int, vocabulary: int) -> Op:
    """One log-probability per token, whose weights come later: a fourth product recomputes."""

    def contenders() -> list[Contender]:
        return [
            ours(ops.linear_logprob),
            Contender("eager", one_of_logits),
            Contender("compile", one_of_logits, compile=True),
        ]

    return Op(
        NAME,
        "logprob",
        f"{rows}x{channels}x{vocabulary}",
        _inputs(rows, channels, vocabulary),
        contenders,
        by_autograd(one_of_logits),
        None,
        both=Work(8.0 * rows * channels * vocabulary, "FLOP"),
        leaves=("hidden", "weight"),
        memory=True,
        seconds=6.0,
    )


def one_of_logits(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """What `linear_logprob` is asked for, from all logits at once."""
    logits = F.linear(hidden, weight)
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return -F.cross_entropy(wide, targets, reduction="none")

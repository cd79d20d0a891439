"""Log-probability of the target from hidden states, without keeping the logits.

One op serves SFT, GRPO, DPO and KL: the rows are taken in chunks, a chunk's logits live only
while its log-sum-exp is computed, and the backward pass computes them again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from . import backend

# Logits held at a time. A chunk must be tall enough to keep the matrix product at full speed
# (thousands of rows on a GPU) and small enough to be nothing beside the activations.
_CHUNK_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 28}
_MIN_ROWS = 64


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float = 1.0,
    softcap: float | None = None,
    entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """log softmax(z)[target] with z = softcap * tanh(hidden weight^T / softcap) / temperature.

    Args:
        hidden: [N, C]. weight: [V, C]. fp32, bf16 or fp16; logits are formed in fp32.
        targets: token ids [N], in 0..V-1.
        temperature: divides the logits.
        softcap: bounds the logits smoothly, as in Gemma 2; None for no bound.
        entropy: also return the entropy of each row's distribution, in nats.

    Returns:
        logp [N], or (logp [N], entropy [N]); fp32 (fp64 for fp64 inputs).

    Raises:
        ValueError: shapes that do not fit, targets out of range, temperature or softcap <= 0.
    """
    _check(hidden, weight, targets, temperature, softcap)
    raw = backend.kernels("linear_logprob", hidden, weight)
    if raw is None:
        return linear_logprob_reference(hidden, weight, targets, temperature, softcap, entropy)
    logp, entropies = _LinearLogprob.apply(
        hidden, weight, targets, temperature, softcap or 0.0, raw
    )
    return (logp, entropies) if entropy else logp


def linear_logprob_reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float = 1.0,
    softcap: float | None = None,
    entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The definition of `linear_logprob` in PyTorch, in recomputed chunks."""

    def of_chunk(rows: Tensor, weight: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        z = wide_matmul(rows, weight.t())
        z = softcap * torch.tanh(z / softcap) if softcap else z
        logp = torch.log_softmax(z / temperature, dim=-1)
        return logp.gather(1, ids[:, None]).squeeze(1), -(logp.exp() * logp).sum(-1)

    size = _chunk_rows(weight.shape[0], hidden.device)
    chunks = zip(hidden.split(size), targets.long().split(size), strict=True)
    parts = [checkpoint(of_chunk, rows, weight, ids, use_reentrant=False) for rows, ids in chunks]
    logp, entropies = (torch.cat(column) for column in zip(*parts, strict=True))
    return (logp, entropies) if entropy else logp


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        temperature: float,
        softcap: float,
        raw: Any,
    ) -> tuple[Tensor, Tensor]:
        targets = targets.long().contiguous()
        size = _chunk_rows(weight.shape[0], hidden.device)
        parts = [
            raw.forward(wide_matmul(rows, weight.t()), ids, temperature, softcap)
            for rows, ids in zip(hidden.split(size), targets.split(size), strict=True)
        ]
        logp, entropy, lse = (torch.cat(column) for column in zip(*parts, strict=True))
        ctx.save_for_backward(hidden, weight, targets, entropy, lse)
        ctx.temperature, ctx.softcap, ctx.raw = temperature, softcap, raw
        return logp, entropy

    @staticmethod
    def backward(ctx: Any, dlogp: Tensor, dentropy: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, entropy, lse = ctx.saved_tensors
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        dhidden = torch.empty_like(hidden, memory_format=torch.contiguous_format)
        dweight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        dlogp, dentropy = dlogp.contiguous(), dentropy.contiguous()
        size = _chunk_rows(weight.shape[0], hidden.device)
        for first in range(0, hidden.shape[0], size):
            chunk = slice(first, first + size)
            logits = wide_matmul(hidden[chunk], weight.t())
            ctx.raw.backward_(
                logits,
                targets[chunk],
                lse[chunk],
                entropy[chunk],
                dlogp[chunk],
                dentropy[chunk],
                ctx.temperature,
                ctx.softcap,
            )
            if needs_hidden:
                dhidden[chunk] = wide_matmul(logits, weight)
            if dweight is not None:
                dweight += wide_matmul(logits.t(), hidden[chunk])
        return (
            dhidden if needs_hidden else None,
            None if dweight is None else dweight.to(weight.dtype),
            *[None] * 4,
        )


def wide_matmul(a: Tensor, b: Tensor) -> Tensor:
    """a b with an fp32 result (fp64 for fp64), in the tensor cores' precision on a GPU."""
    narrow = {a.dtype, b.dtype} & {torch.bfloat16, torch.float16}
    if a.is_cuda and narrow:
        dtype = narrow.pop()
        return torch.mm(a.to(dtype), b.to(dtype), out_dtype=torch.float32)
    wide = torch.promote_types(a.dtype, torch.float32)
    return a.to(wide) @ b.to(wide)


def _chunk_rows(vocabulary: int, device: torch.device) -> int:
    elements = _CHUNK_ELEMENTS.get(device.type, _CHUNK_ELEMENTS["cpu"])
    return max(_MIN_ROWS, elements // vocabulary)


def _check(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, softcap: float | None
) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            "linear_logprob: expected hidden [N, C] and weight [V, C], "
            f"found {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if targets.shape != hidden.shape[:1] or targets.is_floating_point():
        raise ValueError(
            f"linear_logprob: targets must be integers [{hidden.shape[0]}], "
            f"found {targets.dtype} {tuple(targets.shape)}"
        )
    if temperature <= 0 or (softcap is not None and softcap <= 0):
        raise ValueError(
            "linear_logprob: temperature and softcap must be positive, "
            f"found {temperature} and {softcap}"
        )
    # A GPU would have to stop and wait for this answer; its kernels mask instead.
    if targets.device.type == "cpu" and targets.numel():
        low, high = int(targets.min()), int(targets.max())
        if low < 0 or high >= weight.shape[0]:
            raise ValueError(
                f"linear_logprob: targets must lie in 0..{weight.shape[0] - 1}, found {low}..{high}"
            )

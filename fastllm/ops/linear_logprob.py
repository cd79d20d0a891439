"""Log-probability of the target from hidden states, without keeping the logits.

`linear_logprob` serves GRPO, DPO and KL: the rows are taken in chunks, a chunk's logits live only
while its log-sum-exp is computed, and the backward pass computes them again. SFT knows the weight
of every token beforehand, and `linear_cross_entropy` needs the logits once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from . import backend
from .inputs import needs_grad
from .logit_chunks import Chunks, Gradients, chunk_rows, joined, wide_matmul
from .working import working


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float = 1.0,
    softcap: float | None = None,
    entropy: bool = False,
    logits_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """log softmax(z)[target] with z = softcap * tanh(hidden weight^T / softcap) / temperature.

    Args:
        hidden: [N, C]. fp32, bf16 or fp16.
        weight: [V, C]; read in the dtype of hidden.
        targets: token ids [N], in 0..V-1.
        temperature: divides the logits.
        softcap: bounds the logits smoothly, as in Gemma 2; None for no bound.
        entropy: also return the entropy of each row's distribution, in nats.
        logits_dtype: what the logits are rounded to, fp32 or the dtype of hidden; everything made
            of them is fp32. None: fp32, because ratios of probabilities are formed from the result.

    Returns:
        logp [N], or (logp [N], entropy [N]); fp32 (fp64 for fp64 inputs).

    Raises:
        ValueError: shapes that do not fit, targets out of range, temperature or softcap <= 0, or
            another dtype for the logits.
    """
    _check(hidden, weight, targets, temperature, softcap)
    kept_in = _logits_dtype(hidden, logits_dtype or _wide(hidden))
    raw = backend.kernels("linear_logprob", hidden, weight)
    if raw is None:
        return linear_logprob_reference(
            hidden, weight, targets, temperature, softcap, entropy, kept_in
        )
    logp, entropies = _LinearLogprob.apply(
        hidden, weight, targets, temperature, softcap or 0.0, kept_in, raw
    )
    return (logp, entropies) if entropy else logp


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    token_weights: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logits_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """-sum(token_weights * logp), for losses that know the weight of every token beforehand.

    The gradients are made in the forward pass, while a chunk's logits are there: three matrix
    products in all, where `linear_logprob` with its backward pass takes four. The loss can be
    differentiated once.

    Args:
        token_weights: what each row counts for [N], fp32, without gradient; 1 when None.
        hidden, weight, targets, temperature, softcap: as in `linear_logprob`.
        logits_dtype: as in `linear_logprob`. None: on a GPU, bf16 for bf16 hidden states, which
            halves the traffic and the memory; else fp32.

    Returns:
        The loss, a scalar; and of each row the log-probability of its target and the entropy,
        [N], which carry no gradient. fp32 (fp64 for fp64 inputs).

    Raises:
        ValueError: as `linear_logprob`, and token weights that do not fit or require a gradient.
    """
    _check(hidden, weight, targets, temperature, softcap)
    if token_weights is None:
        token_weights = hidden.new_ones(hidden.shape[0], dtype=torch.float32)
    elif token_weights.shape != targets.shape or token_weights.requires_grad:
        raise ValueError(
            f"linear_cross_entropy: token_weights must be [{targets.shape[0]}] without gradient, "
            f"found {tuple(token_weights.shape)}, requires_grad={token_weights.requires_grad}"
        )
    narrow = hidden.is_cuda and hidden.dtype == torch.bfloat16
    kept_in = _logits_dtype(hidden, logits_dtype or (hidden.dtype if narrow else _wide(hidden)))
    raw = backend.kernels("linear_logprob", hidden, weight, token_weights)
    if raw is None or not needs_grad(hidden, weight):
        logp, entropy = linear_logprob(hidden, weight, targets, temperature, softcap, True, kept_in)
        return -(token_weights * logp).sum(), logp.detach(), entropy.detach()
    weights = token_weights.float().contiguous()
    return _LinearCrossEntropy.apply(
        hidden, weight, targets, weights, temperature, softcap or 0.0, kept_in, raw
    )


def linear_logprob_reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float = 1.0,
    softcap: float | None = None,
    entropy: bool = False,
    logits_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The definition of `linear_logprob` in PyTorch, in recomputed chunks."""
    wide = _wide(hidden)
    kept_in = _logits_dtype(hidden, logits_dtype or wide)

    def of_chunk(rows: Tensor, weight: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        z = wide_matmul(rows, weight.t()).to(kept_in).to(wide)
        z = softcap * torch.tanh(z / softcap) if softcap else z
        logp = torch.log_softmax(z / temperature, dim=-1)
        return logp.gather(1, ids[:, None]).squeeze(1), -(logp.exp() * logp).sum(-1)

    size, weight = chunk_rows(hidden, weight, kept_in), working(weight, hidden.dtype)
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
        logits_dtype: torch.dtype,
        raw: Any,
    ) -> tuple[Tensor, Tensor]:
        targets, options = targets.long().contiguous(), (temperature, softcap, logits_dtype, raw)
        chunks = Chunks(hidden, working(weight, hidden.dtype), *options)
        logp, entropy, lse = joined([chunks.statistics(rows, targets) for rows in chunks])
        ctx.save_for_backward(hidden, weight, targets, entropy, lse)
        ctx.options = options
        return logp, entropy

    @staticmethod
    def backward(ctx: Any, dlogp: Tensor, dentropy: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, entropy, lse = ctx.saved_tensors
        narrow = working(weight, hidden.dtype)
        chunks = Chunks(hidden, narrow, *ctx.options)
        gradients = Gradients(
            hidden, weight, narrow, len(chunks), ctx.options[-1], *ctx.needs_input_grad[:2]
        )
        given = targets, lse, entropy, dlogp.contiguous(), dentropy.contiguous()
        for rows in chunks:
            gradients.add(rows, chunks.gradient(rows, *given))
        dweight = gradients.weight
        return gradients.hidden, None if dweight is None else dweight.to(weight.dtype), *[None] * 5


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        token_weights: Tensor,
        temperature: float,
        softcap: float,
        logits_dtype: torch.dtype,
        raw: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        targets, dlogp = targets.long().contiguous(), -token_weights
        narrow = working(weight, hidden.dtype)
        chunks = Chunks(hidden, narrow, temperature, softcap, logits_dtype, raw)
        gradients = Gradients(hidden, weight, narrow, len(chunks), raw, *ctx.needs_input_grad[:2])
        parts = []
        for rows in chunks:
            statistics, dlogits = chunks.statistics_and_gradient(rows, targets, dlogp)
            gradients.add(rows, dlogits)
            parts.append(statistics)
        logp, entropy, _ = joined(parts)
        ctx.save_for_backward(gradients.hidden, gradients.weight)
        ctx.dtypes, ctx.raw, ctx.asked = (hidden.dtype, weight.dtype), raw, False
        ctx.mark_non_differentiable(logp, entropy)
        ctx.set_materialize_grads(False)
        return (dlogp * logp).sum(), logp, entropy

    @staticmethod
    def backward(ctx: Any, dloss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if ctx.asked:
            raise RuntimeError(
                "linear_cross_entropy: its gradients were made in the forward pass and can be "
                "asked for once; use linear_logprob to differentiate twice"
            )
        # Scaled in place and given away: a second call would find them changed.
        ctx.asked = True
        if dloss is None:
            return (None,) * 8
        dhidden, dweight = ctx.saved_tensors
        scaled = (
            _scaled(gradient, dloss, dtype, ctx.raw)
            for gradient, dtype in zip((dhidden, dweight), ctx.dtypes, strict=True)
        )
        return *scaled, *[None] * 6


def _scaled(gradient: Tensor | None, factor: Tensor, dtype: torch.dtype, raw: Any) -> Tensor | None:
    """A gradient times a scalar on its device, in `dtype`; in place where that is its own."""
    if gradient is None:
        return None
    if gradient.dtype == dtype and hasattr(raw, "scale_"):
        raw.scale_(gradient, factor)
        return gradient
    if gradient.is_cuda and gradient.dtype != dtype:
        return torch.mul(gradient, factor, out=gradient.new_empty(gradient.shape, dtype=dtype))
    gradient = gradient.to(dtype)
    return gradient.mul_(factor.to(dtype))


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
    # A GPU would have to stop and wait for this answer; its kernels mask instead. A compiler knows
    # no numbers.
    known = targets.device.type == "cpu" and not torch.compiler.is_compiling()
    if known and targets.numel():
        low, high = int(targets.min()), int(targets.max())
        if low < 0 or high >= weight.shape[0]:
            raise ValueError(
                f"linear_logprob: targets must lie in 0..{weight.shape[0] - 1}, found {low}..{high}"
            )


def _wide(hidden: Tensor) -> torch.dtype:
    return torch.promote_types(hidden.dtype, torch.float32)


def _logits_dtype(hidden: Tensor, asked: torch.dtype) -> torch.dtype:
    if asked not in (hidden.dtype, _wide(hidden)):
        raise ValueError(
            f"linear_logprob: logits_dtype must be {_wide(hidden)} or that of the hidden states, "
            f"{hidden.dtype}, found {asked}"
        )
    return asked

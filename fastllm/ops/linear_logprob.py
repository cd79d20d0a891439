"""Log-probability of the target from hidden states, without keeping the logits.

`linear_logprob` serves GRPO, DPO and KL: the rows are taken in chunks, a chunk's logits live only
while its log-sum-exp is computed, and the backward pass computes them again. SFT knows the weight
of every token beforehand, and `linear_cross_entropy` needs the logits once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from . import backend
from .inputs import needs_grad
from .matmul import matmul

# Logits held at a time. A chunk must be tall enough to keep the matrix products at full speed
# (thousands of rows on a GPU) and small enough to be nothing beside the activations. On a CPU it is
# a ninth of the rows: less than 1/16 of what a head takes that keeps all logits and makes their
# gradient beside them.
_CHUNK_ELEMENTS = {"cpu": 1 << 23, "cuda": 1 << 28}
_CHUNK_SHARE = {"cpu": 9, "cuda": 1}
_MIN_ROWS, _MIN_ELEMENTS = 64, 1 << 18


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
        hidden: [N, C]. fp32, bf16 or fp16.
        weight: [V, C]; cast to the dtype of hidden. Logits are formed in fp32.
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


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    token_weights: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """-sum(token_weights * logp), for losses that know the weight of every token beforehand.

    The gradients are made in the forward pass, while a chunk's logits are there: three matrix
    products in all, where `linear_logprob` with its backward pass takes four. The loss can be
    differentiated once.

    Args:
        token_weights: what each row counts for [N], fp32, without gradient; 1 when None.
        hidden, weight, targets, temperature, softcap: as in `linear_logprob`.

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
    raw = backend.kernels("linear_logprob", hidden, weight, token_weights)
    if raw is None or not needs_grad(hidden, weight):
        logp, entropy = linear_logprob(hidden, weight, targets, temperature, softcap, entropy=True)
        return -(token_weights * logp).sum(), logp.detach(), entropy.detach()
    weights = token_weights.float().contiguous()
    return _LinearCrossEntropy.apply(
        hidden, weight, targets, weights, temperature, softcap or 0.0, raw
    )


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

    size, weight = _chunk_rows(hidden, weight), weight.to(hidden.dtype)
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
        parts = [
            raw.forward(logits, targets[rows], temperature, softcap)
            for rows, logits in _chunks(hidden, weight.to(hidden.dtype))
        ]
        logp, entropy, lse = (torch.cat(column) for column in zip(*parts, strict=True))
        ctx.save_for_backward(hidden, weight, targets, entropy, lse)
        ctx.temperature, ctx.softcap, ctx.raw = temperature, softcap, raw
        return logp, entropy

    @staticmethod
    def backward(ctx: Any, dlogp: Tensor, dentropy: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, entropy, lse = ctx.saved_tensors
        gradients = _Gradients(hidden, weight, *ctx.needs_input_grad[:2])
        weight = gradients.weight
        dlogp, dentropy = dlogp.contiguous(), dentropy.contiguous()
        options = ctx.temperature, ctx.softcap
        for rows, logits in _chunks(hidden, weight):
            per_row = (t[rows] for t in (targets, lse, entropy, dlogp, dentropy))
            ctx.raw.backward_(logits, *per_row, *options)
            gradients.add(rows, logits)
        return gradients.hidden, gradients.of_weight(), *[None] * 4


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
        raw: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        targets, dlogp = targets.long().contiguous(), -token_weights
        gradients = _Gradients(hidden, weight, *ctx.needs_input_grad[:2])
        no_gradient = torch.zeros_like(dlogp)
        parts = []
        for rows, logits in _chunks(hidden, gradients.weight):
            ids = targets[rows]
            logp, entropy, lse = raw.forward(logits, ids, temperature, softcap)
            raw.backward_(
                logits, ids, lse, entropy, dlogp[rows], no_gradient[rows], temperature, softcap
            )
            gradients.add(rows, logits)
            parts.append((logp, entropy))
        logp, entropy = (torch.cat(column) for column in zip(*parts, strict=True))
        ctx.gradients = gradients.hidden, gradients.of_weight()
        ctx.mark_non_differentiable(logp, entropy)
        ctx.set_materialize_grads(False)
        return (dlogp * logp).sum(), logp, entropy

    @staticmethod
    def backward(ctx: Any, dloss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        # Scaled in place and given away: a second call would find them changed.
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError(
                "linear_cross_entropy: its gradients were made in the forward pass and can be "
                "asked for once; use linear_logprob to differentiate twice"
            )
        if dloss is None:
            return (None,) * 7
        scaled = (g if g is None else g.mul_(dloss.to(g.dtype)) for g in gradients)
        return *scaled, *[None] * 5


def _chunks(hidden: Tensor, weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Rows of `hidden` and their logits, which the next chunk overwrites."""
    rows, size = hidden.shape[0], _chunk_rows(hidden, weight)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    buffer = hidden.new_empty(min(rows, size), weight.shape[0], dtype=wide)
    for first in range(0, max(rows, 1), size):
        chunk = slice(first, min(first + size, rows))
        yield chunk, wide_matmul(hidden[chunk], weight.t(), buffer[: chunk.stop - first])


class _Gradients:
    """The gradients of the hidden states and of the weight, chunk by chunk of rows."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, needs_hidden: bool, needs_weight: bool
    ) -> None:
        self._rows, self._dtype = hidden, weight.dtype
        self.weight = weight.to(hidden.dtype)
        self.hidden = hidden.new_empty(hidden.shape) if needs_hidden else None
        wide = torch.promote_types(hidden.dtype, torch.float32)
        self._sum = weight.new_empty(weight.shape, dtype=wide) if needs_weight else None
        self._begun = False

    def add(self, rows: slice, dlogits: Tensor) -> None:
        """Add what the rows' dlogits [n, V] give.

        They were formed in fp32; the products read them in the dtype of the hidden states.
        """
        dlogits = dlogits.to(self._rows.dtype)
        if self.hidden is not None:
            matmul(dlogits, self.weight, out=self.hidden[rows])
        if self._sum is not None:
            wide_matmul(dlogits.t(), self._rows[rows], self._sum, add=self._begun)
            self._begun = True

    def of_weight(self) -> Tensor | None:
        """The gradient of the weight, in its dtype."""
        return None if self._sum is None else self._sum.to(self._dtype)


def wide_matmul(a: Tensor, b: Tensor, out: Tensor | None = None, add: bool = False) -> Tensor:
    """a b with an fp32 result (fp64 for fp64), in the tensor cores' precision on a GPU.

    Args:
        out: where to put the result; a new tensor when None.
        add: add to `out` instead.
    """
    narrow = {a.dtype, b.dtype} & {torch.bfloat16, torch.float16}
    if a.is_cuda and narrow:
        dtype = narrow.pop()
        product = torch.mm(a.to(dtype), b.to(dtype), out_dtype=torch.float32)
        if out is None:
            return product
        return out.add_(product) if add else out.copy_(product)
    wide = torch.promote_types(a.dtype, torch.float32)
    if a.device.type == "cpu" and not needs_grad(a, b):
        return matmul(a, b, out, add, dtype=wide)
    a, b = a.to(wide), b.to(wide)
    if out is None:
        return a @ b
    return out.addmm_(a, b) if add else torch.mm(a, b, out=out)


def _chunk_rows(hidden: Tensor, weight: Tensor) -> int:
    kind = hidden.device.type if hidden.device.type in _CHUNK_ELEMENTS else "cpu"
    share = -(-hidden.shape[0] // _CHUNK_SHARE[kind])
    fewest = max(_MIN_ROWS, _MIN_ELEMENTS // weight.shape[0])
    return max(fewest, min(share, _CHUNK_ELEMENTS[kind] // weight.shape[0]))


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

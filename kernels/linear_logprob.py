"""Log-probability of a target, entropy and log-sum-exp of rows of logits, and their gradient.

The forward pass reads a row once: it keeps the running maximum, the sum of the exponentials and
the sum of the exponentials times their distance from the maximum, and rescales them when the
maximum grows (Milakov and Gimelshein, 2018). The backward pass turns the logits into their
gradient in place, so a chunk of logits is the only large buffer of the op.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import num_warps, on_tensor_device, schedule
from .numerics import LOWEST, narrow

_BLOCK = 4096


@on_tensor_device
def forward(
    logits: Tensor, targets: Tensor, temperature: float, softcap: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Statistics of softmax(z), z = softcap * tanh(logits / softcap) / temperature.

    Args:
        logits: [n, V]; targets: [n] int64. A target outside 0..V-1 gives NaN.
        softcap: 0 for z = logits / temperature.

    Returns:
        z[target] - lse, the entropy in nats, and lse = logsumexp(z): [n] each, fp32.
    """
    rows, vocabulary = logits.shape
    logp, entropy, lse = torch.empty((3, rows), dtype=torch.float32, device=logits.device)
    if rows:
        block = min(_BLOCK, triton.next_power_of_2(vocabulary))
        logprob_forward_kernel[(rows,)](
            logits,
            targets,
            logp,
            entropy,
            lse,
            vocabulary,
            1.0 / temperature,
            softcap,
            HAS_SOFTCAP=softcap > 0,
            BLOCK=block,
            **schedule(num_warps(block)),
        )
    return logp, entropy, lse


@on_tensor_device
def backward_(
    logits: Tensor,
    targets: Tensor,
    lse: Tensor,
    entropy: Tensor,
    dlogp: Tensor,
    dentropy: Tensor,
    temperature: float,
    softcap: float,
) -> None:
    """Overwrite the logits with the gradient with respect to them.

    Args:
        logits: [n, V], as given to `forward`; targets: [n] int64.
        lse, entropy: what `forward` returned [n].
        dlogp, dentropy: gradients of the two outputs [n], fp32.
    """
    rows, vocabulary = logits.shape
    if rows:
        block = min(_BLOCK, triton.next_power_of_2(vocabulary))
        logprob_backward_kernel[(rows, triton.cdiv(vocabulary, block))](
            logits,
            targets,
            lse,
            entropy,
            dlogp,
            dentropy,
            vocabulary,
            1.0 / temperature,
            softcap,
            HAS_SOFTCAP=softcap > 0,
            BLOCK=block,
            **schedule(num_warps(block)),
        )


@triton.jit(do_not_specialize=["inverse_temperature", "softcap"])
def logprob_forward_kernel(
    logits_ptr,
    targets_ptr,
    logp_ptr,
    entropy_ptr,
    lse_ptr,
    vocabulary,
    inverse_temperature,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    inverse_temperature = tl.cast(inverse_temperature, tl.float32)
    row_ptr = logits_ptr + row * vocabulary
    columns = tl.arange(0, BLOCK)

    top = LOWEST
    # Per lane: sum of exp(z - top), and of exp(z - top) * (z - top).
    total = tl.zeros((BLOCK,), tl.float32)
    weighted = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, vocabulary, BLOCK):
        mask = first + columns < vocabulary
        logits = tl.load(row_ptr + first + columns, mask=mask, other=0.0)
        z = capped(logits.to(tl.float32), softcap, HAS_SOFTCAP) * inverse_temperature
        z = tl.where(mask, tl.maximum(z, LOWEST), LOWEST)

        new_top = tl.maximum(top, tl.max(z, axis=0))
        shift = top - new_top
        rescale = tl.exp(shift)
        below = z - new_top
        power = tl.exp(below)
        weighted = rescale * (weighted + shift * total) + power * below
        total = rescale * total + power
        top = new_top

    total = tl.sum(total, axis=0)
    log_total = tl.log(total)
    # -sum p log p = log(total) - weighted / total, in which the size of the logits has no part.
    entropy = log_total - tl.sum(weighted, axis=0) / total

    target = tl.load(targets_ptr + row)
    known = (target >= 0) & (target < vocabulary)
    logit = tl.load(row_ptr + target, mask=known, other=float("nan")).to(tl.float32)
    z = capped(logit, softcap, HAS_SOFTCAP) * inverse_temperature
    tl.store(logp_ptr + row, z - top - log_total)
    tl.store(entropy_ptr + row, entropy)
    tl.store(lse_ptr + row, top + log_total)


@triton.jit(do_not_specialize=["inverse_temperature", "softcap"])
def logprob_backward_kernel(
    logits_ptr,
    targets_ptr,
    lse_ptr,
    entropy_ptr,
    dlogp_ptr,
    dentropy_ptr,
    vocabulary,
    inverse_temperature,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < vocabulary
    inverse_temperature = tl.cast(inverse_temperature, tl.float32)
    target = tl.load(targets_ptr + row)
    lse, entropy = tl.load(lse_ptr + row), tl.load(entropy_ptr + row)
    dlogp, dentropy = tl.load(dlogp_ptr + row), tl.load(dentropy_ptr + row)

    pointers = logits_ptr + row * vocabulary + columns
    cap = capped(tl.load(pointers, mask=mask, other=0.0).to(tl.float32), softcap, HAS_SOFTCAP)
    log_p = cap * inverse_temperature - lse
    p = tl.exp(log_p)
    # (1 - p) of the target is formed in fp32, before anything is rounded.
    dz = dlogp * (tl.where(columns == target, 1.0, 0.0) - p) - dentropy * p * (log_p + entropy)
    gradient = dz * inverse_temperature
    if HAS_SOFTCAP:
        tanh = cap / tl.cast(softcap, tl.float32)
        gradient *= 1.0 - tanh * tanh
    tl.store(pointers, narrow(gradient, logits_ptr.dtype.element_ty), mask=mask)


@triton.jit
def capped(x, softcap, HAS_SOFTCAP: tl.constexpr):
    """softcap * tanh(x / softcap), or x."""
    if HAS_SOFTCAP:
        softcap = tl.cast(softcap, tl.float32)
        # tanh(u) = 2 sigmoid(2u) - 1: the interpreter has no tanh.
        x = softcap * (2.0 * tl.sigmoid(2.0 * x / softcap) - 1.0)
    return x

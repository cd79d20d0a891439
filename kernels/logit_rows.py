"""What the kernels of linear_logprob do with a row of logits, block by block.

z is a capped logit times a scale: 1 / temperature in units of log2, so that 2^z is one instruction.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .numerics import LN2, LOWEST

PROPAGATE_NAN = tl.constexpr(tl.PropagateNan.ALL)


@triton.jit
def statistics(
    row_ptr,
    width,
    vocabulary,
    scale,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
    PADDED: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """log2 of the sum of 2^z over a row, z = capped logits * scale, and the entropy in nats."""
    top = tl.full((BLOCK // VECTOR,), LOWEST, tl.float32)
    # Per vector: sum of 2^(z - top), and of 2^(z - top) (z - top).
    total = tl.zeros((BLOCK // VECTOR,), tl.float32)
    weighted = tl.zeros((BLOCK // VECTOR,), tl.float32)
    for first in tl.range(0, width, BLOCK, num_stages=STAGES):
        columns = columns_of(first, BLOCK, VECTOR)
        logits = tl.load(row_ptr + columns, mask=columns < width, other=float("-inf"))
        z = capped(logits.to(tl.float32), softcap, HAS_SOFTCAP) * scale
        if PADDED:
            z = tl.where(columns < vocabulary, z, LOWEST)
        z = tl.maximum(z, LOWEST, PROPAGATE_NAN)  # -inf would give -inf - -inf; NaN stays

        new_top = tl.maximum(top, tl.max(z, axis=1))
        shift = top - new_top
        rescale = tl.exp2(shift)
        below = z - new_top[:, None]
        power = tl.exp2(below)
        weighted = rescale * (weighted + shift * total) + tl.sum(power * below, axis=1)
        total = rescale * total + tl.sum(power, axis=1)
        top = new_top

    largest = tl.max(top, axis=0)
    shift = top - largest
    rescale = tl.exp2(shift)
    weighted = tl.sum(rescale * (weighted + shift * total), axis=0)
    total = tl.sum(rescale * total, axis=0)
    log_total = tl.log2(total)
    # -sum p log p = log(total) - weighted / total, in which the size of the logits has no part.
    return largest + log_total, (log_total - weighted / total) * LN2


@triton.jit
def columns_of(first, BLOCK: tl.constexpr, VECTOR: tl.constexpr):
    """BLOCK columns from `first` on, [BLOCK / VECTOR, VECTOR]: one row for what a thread reads."""
    vectors = tl.arange(0, BLOCK // VECTOR)[:, None] * VECTOR
    return first + vectors + tl.arange(0, VECTOR)[None, :]


@triton.jit
def scaled_target(row_ptr, target, vocabulary, scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """z of the target; NaN for one that does not exist."""
    known = (target >= 0) & (target < vocabulary)
    logit = tl.load(row_ptr + target, mask=known, other=float("nan")).to(tl.float32)
    return capped(logit, softcap, HAS_SOFTCAP) * scale


@triton.jit
def known_column(target, vocabulary):
    """The target's column as int32; -1 for one that does not exist."""
    return tl.where((target >= 0) & (target < vocabulary), target, -1).to(tl.int32)


@triton.jit
def capped(x, softcap, HAS_SOFTCAP: tl.constexpr):
    """softcap * tanh(x / softcap), or x."""
    if HAS_SOFTCAP:
        softcap = tl.cast(softcap, tl.float32)
        # tanh(u) = 2 sigmoid(2u) - 1: the interpreter has no tanh.
        x = softcap * (2.0 * tl.sigmoid(2.0 * x / softcap) - 1.0)
    return x


@triton.jit
def sloped(gradient, bounded, softcap, HAS_SOFTCAP: tl.constexpr):
    """The gradient with respect to the logits of one with respect to the capped logits."""
    if HAS_SOFTCAP:
        tanh = bounded / tl.cast(softcap, tl.float32)
        gradient *= 1.0 - tanh * tanh
    return gradient

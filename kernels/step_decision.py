"""Whether a step of the optimizer is taken, and what its gradients are multiplied by.

One program makes that of the gradients' sums of squares and of the loss, so that the host need not
know. What it knows itself lies in two small tensors, `numbers` and `counts`. Once `counts[FAILED]`
is set, by a norm or a loss that is not finite, nothing is changed any more until the host clears
it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import config
from .launch import launch, on_tensor_device
from .numerics import LOG2E

# Places in `numbers` (fp32): the learning rate, what gradients are multiplied by, the loss scale.
RATE, FACTOR, SCALE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
# Places in `counts` (int32): whether this step is taken, whether one has failed, the steps since
# the loss scale last changed, and the steps that were left out because gradients overflowed.
TAKEN, FAILED, CLEAN, SKIPPED = (tl.constexpr(place) for place in range(4))


@on_tensor_device
def finish_(
    sums: Tensor,
    gradients: Tensor,
    steps: Tensor,
    scales: Tensor,
    numbers: Tensor,
    counts: Tensor,
    loss: Tensor,
    norm: Tensor,
    max_norm: float,
    log_beta1: float,
    log_beta2: float,
    growth_interval: int,
    scaled: bool,
) -> None:
    """Decide about the step: `norm`, `numbers[FACTOR]`, `counts`, and each tensor's scales.

    Args:
        sums: of all chunks; gradients: addresses of all tensors [N].
        steps: steps taken [N], fp32, counted up where there is a gradient.
        scales: [N, 2], fp32: learning rate over 1 - beta1^step, and 1 / sqrt(1 - beta2^step).
        numbers, counts: see the module.
        loss: a scalar; the step is not taken unless it is finite.
        norm: a scalar, fp32: the norm of the unscaled gradients.
        max_norm: what longer gradients are clipped to; inf for no clipping.
        log_beta1, log_beta2: natural logarithms.
        growth_interval: steps without an overflow until the loss scale is doubled.
        scaled: gradients are those of a scaled loss: an overflow lowers the scale, and is no
            failure.
    """
    launch(
        finish_kernel,
        (1,),
        sums,
        gradients,
        steps,
        scales,
        numbers,
        counts,
        loss,
        norm,
        sums.numel(),
        steps.numel(),
        max_norm,
        log_beta1,
        log_beta2,
        growth_interval,
        SCALED=scaled,
        **config("finish_kernel", torch.float32, sums.numel()),
    )


@triton.jit(do_not_specialize=["num_sums", "num_tensors", "growth_interval"])
def finish_kernel(
    sums_ptr,
    gradients_ptr,
    steps_ptr,
    scales_ptr,
    numbers_ptr,
    counts_ptr,
    loss_ptr,
    norm_ptr,
    num_sums,
    num_tensors,
    max_norm,
    log_beta1,
    log_beta2,
    growth_interval,
    SCALED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, num_sums, BLOCK):
        total += tl.load(sums_ptr + start + lanes, mask=start + lanes < num_sums, other=0.0)
    norm = tl.sqrt_rn(tl.sum(total, axis=0))
    tl.store(norm_ptr, norm)

    finite = norm < float("inf")
    good_loss = tl.abs(tl.load(loss_ptr).to(tl.float32)) < float("inf")
    failed = tl.load(counts_ptr + FAILED) != 0
    taken = finite & good_loss & (failed == 0)
    factor = tl.minimum(tl.cast(max_norm, tl.float32) / (norm + 1e-6), 1.0)
    if SCALED:
        scale = tl.load(numbers_ptr + SCALE)
        factor = factor / scale
        _adapt_scale(scale, finite, failed, good_loss, growth_interval, numbers_ptr, counts_ptr)
        failed = failed | (good_loss == 0)
    else:
        failed = failed | (good_loss == 0) | (finite == 0)
    tl.store(numbers_ptr + FACTOR, factor)
    tl.store(counts_ptr + TAKEN, taken.to(tl.int32))
    tl.store(counts_ptr + FAILED, failed.to(tl.int32))

    rate = tl.load(numbers_ptr + RATE)
    for start in range(0, num_tensors, BLOCK):
        tensors = start + lanes
        inside = tensors < num_tensors
        present = tl.load(gradients_ptr + tensors, mask=inside, other=0) != 0
        steps = tl.load(steps_ptr + tensors, mask=inside, other=0.0)
        steps += tl.where(present, taken.to(tl.float32), 0.0)
        tl.store(steps_ptr + tensors, steps, mask=inside)
        steps = tl.maximum(steps, 1.0)
        correction1 = _one_less_power(steps, tl.cast(log_beta1, tl.float32))
        correction2 = _one_less_power(steps, tl.cast(log_beta2, tl.float32))
        tl.store(scales_ptr + 2 * tensors, rate / correction1, mask=inside)
        tl.store(scales_ptr + 2 * tensors + 1, 1.0 / tl.sqrt_rn(correction2), mask=inside)


@triton.jit
def _adapt_scale(scale, finite, failed, good_loss, growth_interval, numbers_ptr, counts_ptr):
    """As torch.amp.GradScaler: half of it after an overflow, twice after enough good steps."""
    clean = tl.load(counts_ptr + CLEAN)
    longer = tl.where(finite, clean + 1, 0)
    grows = longer == growth_interval
    doubled = tl.where(scale * 2.0 < float("inf"), scale * 2.0, scale)
    changed = tl.where(finite, tl.where(grows, doubled, scale), scale * 0.5)
    counted = (failed == 0) & good_loss
    tl.store(numbers_ptr + SCALE, tl.where(counted, changed, scale))
    tl.store(counts_ptr + CLEAN, tl.where(counted, tl.where(grows, 0, longer), clean))
    skipped = tl.load(counts_ptr + SKIPPED)
    tl.store(counts_ptr + SKIPPED, skipped + (counted & (finite == 0)).to(tl.int32))


@triton.jit
def _one_less_power(steps, log_base):
    """1 - base^steps, for 0 <= base < 1.

    Near 0 the difference would lose most of its digits: there it is summed up as a series, which
    at -1/2 has lost less than fp32 can show after twelve terms.
    """
    x = steps * log_base
    series = tl.full(x.shape, 1.0, tl.float32)
    for term in tl.static_range(12, 1, -1):
        series = 1.0 + x * series / term
    return tl.where(x > -0.5, -x * series, 1.0 - tl.exp2(x * LOG2E))

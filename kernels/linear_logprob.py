"""Log-probability of a target, entropy and log-sum-exp of rows of logits, and their gradient.

A row of a vocabulary does not fit into a processor, so its statistics are kept while it is read
once: the largest number, the sum of the exponentials, and the sum of the exponentials times their
distance from the largest, which are rescaled when the largest grows (Milakov and Gimelshein, 2018).
They are kept per vector of 16 bytes: a thread reads, compares and adds alone, and the threads of a
program meet once, at the end of the row.

The gradient overwrites the logits, so a chunk of logits is the only large buffer of the op. It is
formed in fp32, the 1 of the target included, and rounded once. Where it is narrower than the logits
(`dtype`), it lies in the back half of their rows (`gradient_in`), so that products can read it.
Rows are written from their end to their beginning: what was read last is still in the cache, and a
narrow row never grows over numbers that are still to be read.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import config
from .launch import launch, num_processors, on_tensor_device
from .logit_rows import (
    PROPAGATE_NAN,
    capped,
    columns_of,
    known_column,
    scaled_target,
    sloped,
    statistics,
)
from .numerics import LN2, LOG2E, LOWEST, narrow

# Rows may have padding, and their gradient may be narrower than they are.
IN_PLACE = True
# Shared memory decides how many rows a processor holds at a time, and all rows together should fit
# into the second-level cache between the two passes of cross_entropy_kernel.
TUNABLE = {
    name: {
        "BLOCK": (2048, 4096, 8192, 16384, 32768),
        "STAGES": (1, 2, 3, 4, 5, 6),
        "num_warps": (4, 8, 16, 32),
        "num_stages": (1,),
    }
    for name in ("logprob_forward_kernel", "logprob_backward_kernel", "cross_entropy_kernel")
}
TUNABLE["scale_kernel"] = {"BLOCK": (2048, 4096, 8192), "num_warps": (4, 8), "num_stages": (1,)}
# Programs of scale_kernel on a processor: most of its launches have nothing to do.
_SCALING_PROGRAMS = 8


@on_tensor_device
def forward(
    logits: Tensor,
    targets: Tensor,
    temperature: float,
    softcap: float,
    vocabulary: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Statistics of softmax(z), z = softcap * tanh(logits / softcap) / temperature.

    Args:
        logits: [n, W], rows of any stride; targets: [n] int64. A target outside 0..V-1 gives NaN.
        softcap: 0 for z = logits / temperature.
        vocabulary: V; the columns from there to W are padding, which is read for nothing. All
            columns when None.

    Returns:
        z[target] - lse, the entropy in nats, and lse = logsumexp(z): [n] each, fp32.
    """
    rows, width = logits.shape
    logp, entropy, lse = _results(logits)
    if rows:
        launch(
            logprob_forward_kernel,
            (rows,),
            logits,
            targets,
            logp,
            entropy,
            lse,
            logits.stride(0),
            width,
            vocabulary or width,
            1.0 / temperature,
            softcap,
            HAS_SOFTCAP=softcap > 0,
            PADDED=vocabulary not in (None, width),
            VECTOR=16 // logits.element_size(),
            **config("logprob_forward_kernel", logits.dtype, width),
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
    vocabulary: int | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Overwrite the logits with the gradient with respect to them; 0 in the padding.

    Args:
        logits: [n, W], as given to `forward`; targets: [n] int64.
        lse, entropy: what `forward` returned [n].
        dlogp, dentropy: gradients of the two outputs [n], fp32.
        vocabulary: as for `forward`.
        dtype: of the gradient, which is then `gradient_in(logits, dtype)`.
    """
    rows, width = logits.shape
    if rows:
        gradient = gradient_in(logits, dtype)
        launch(
            logprob_backward_kernel,
            (rows,),
            logits,
            gradient,
            targets,
            lse,
            entropy,
            dlogp,
            dentropy,
            logits.stride(0),
            gradient.stride(0),
            width,
            1.0 / temperature,
            softcap,
            vocabulary or width,
            HAS_SOFTCAP=softcap > 0,
            PADDED=vocabulary not in (None, width),
            NARROWS=gradient.dtype != logits.dtype,
            VECTOR=16 // gradient.element_size(),
            **config("logprob_backward_kernel", logits.dtype, width),
        )


@on_tensor_device
def forward_backward_(
    logits: Tensor,
    targets: Tensor,
    dlogp: Tensor,
    temperature: float,
    softcap: float,
    vocabulary: int | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`forward`, then `backward_` with these `dlogp` [n] (fp32) and no `dentropy`, in one launch.

    Returns:
        What `forward` returns.
    """
    rows, width = logits.shape
    logp, entropy, lse = _results(logits)
    if rows:
        gradient = gradient_in(logits, dtype)
        launch(
            cross_entropy_kernel,
            (rows,),
            logits,
            gradient,
            targets,
            dlogp,
            logp,
            entropy,
            lse,
            logits.stride(0),
            gradient.stride(0),
            width,
            1.0 / temperature,
            softcap,
            vocabulary or width,
            HAS_SOFTCAP=softcap > 0,
            PADDED=vocabulary not in (None, width),
            NARROWS=gradient.dtype != logits.dtype,
            VECTOR=16 // gradient.element_size(),
            **config("cross_entropy_kernel", logits.dtype, width),
        )
    return logp, entropy, lse


@on_tensor_device
def scale_(x: Tensor, factor: Tensor) -> None:
    """x *= factor, in place; x is not read where the factor, a scalar on the device, is 1.

    Args:
        x: contiguous. factor: one element, fp32.
    """
    constants = config("scale_kernel", x.dtype, x.numel())
    programs = min(-(-x.numel() // constants["BLOCK"]), _programs(x))
    if programs:
        launch(scale_kernel, (programs,), x, factor, x.numel(), **constants)


def _programs(x: Tensor) -> int:
    return _SCALING_PROGRAMS * num_processors(x.device)


def _results(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Not rows of one tensor: those begin where no aligned access can, for most numbers of rows."""
    logp = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    return logp, torch.empty_like(logp), torch.empty_like(logp)


def gradient_in(logits: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Where the gradient of logits [n, W] lies: over them, or in `dtype` at the end of each row."""
    if dtype is None or dtype == logits.dtype:
        return logits
    return logits.view(dtype)[:, -logits.shape[1] :]


@triton.jit(do_not_specialize=["inverse_temperature", "softcap"])
def logprob_forward_kernel(
    logits_ptr,
    targets_ptr,
    logp_ptr,
    entropy_ptr,
    lse_ptr,
    row_stride,
    width,
    vocabulary,
    inverse_temperature,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
    PADDED: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * row_stride
    scale = tl.cast(inverse_temperature, tl.float32) * LOG2E
    target = tl.load(targets_ptr + row)
    z_target = scaled_target(row_ptr, target, vocabulary, scale, softcap, HAS_SOFTCAP)
    lse, entropy = statistics(
        row_ptr, width, vocabulary, scale, softcap, HAS_SOFTCAP, PADDED, VECTOR, BLOCK, STAGES
    )
    tl.store(logp_ptr + row, (z_target - lse) * LN2)
    tl.store(entropy_ptr + row, entropy)
    tl.store(lse_ptr + row, lse * LN2)


@triton.jit(do_not_specialize=["inverse_temperature", "softcap"])
def logprob_backward_kernel(
    logits_ptr,
    gradient_ptr,
    targets_ptr,
    lse_ptr,
    entropy_ptr,
    dlogp_ptr,
    dentropy_ptr,
    row_stride,
    gradient_stride,
    width,
    inverse_temperature,
    softcap,
    vocabulary,
    HAS_SOFTCAP: tl.constexpr,
    PADDED: tl.constexpr,
    NARROWS: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * row_stride
    gradient_ptr += row * gradient_stride
    inverse_temperature = tl.cast(inverse_temperature, tl.float32)
    target = known_column(tl.load(targets_ptr + row), vocabulary)
    lse, entropy = tl.load(lse_ptr + row), tl.load(entropy_ptr + row)
    dlogp, dentropy = tl.load(dlogp_ptr + row), tl.load(dentropy_ptr + row)

    blocks = tl.cdiv(width, BLOCK)
    for block in tl.range(0, blocks, num_stages=STAGES):
        columns = columns_of((blocks - 1 - block) * BLOCK, BLOCK, VECTOR)
        mask = columns < width
        logits = tl.load(logits_ptr + columns, mask=mask, other=float("-inf"))
        bounded = capped(logits.to(tl.float32), softcap, HAS_SOFTCAP)
        # Not in units of log2: the distance to lse decides how exact p is.
        log_p = tl.maximum(bounded * inverse_temperature - lse, LOWEST, PROPAGATE_NAN)
        p = tl.exp2(log_p * LOG2E)
        dz = dlogp * (tl.where(columns == target, 1.0, 0.0) - p)
        dz -= dentropy * p * (log_p + entropy)
        gradient = sloped(dz * inverse_temperature, bounded, softcap, HAS_SOFTCAP)
        if PADDED:
            gradient = tl.where(columns < vocabulary, gradient, 0.0)
        if NARROWS:
            tl.debug_barrier()  # every thread has read what is now written over
        gradient = narrow(gradient, gradient_ptr.dtype.element_ty)
        tl.store(gradient_ptr + columns, gradient, mask=mask)


@triton.jit(do_not_specialize=["inverse_temperature", "softcap"])
def cross_entropy_kernel(
    logits_ptr,
    gradient_ptr,
    targets_ptr,
    dlogp_ptr,
    logp_ptr,
    entropy_ptr,
    lse_ptr,
    row_stride,
    gradient_stride,
    width,
    inverse_temperature,
    softcap,
    vocabulary,
    HAS_SOFTCAP: tl.constexpr,
    PADDED: tl.constexpr,
    NARROWS: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * row_stride
    gradient_ptr += row * gradient_stride
    inverse_temperature = tl.cast(inverse_temperature, tl.float32)
    scale = inverse_temperature * LOG2E
    target = tl.load(targets_ptr + row)
    dlogp = tl.load(dlogp_ptr + row) * inverse_temperature
    # Read before the second pass writes over it: the sums at the end of the first are a barrier.
    z_target = scaled_target(logits_ptr, target, vocabulary, scale, softcap, HAS_SOFTCAP)
    lse, entropy = statistics(
        logits_ptr, width, vocabulary, scale, softcap, HAS_SOFTCAP, PADDED, VECTOR, BLOCK, STAGES
    )
    tl.store(logp_ptr + row, (z_target - lse) * LN2)
    tl.store(entropy_ptr + row, entropy)
    tl.store(lse_ptr + row, lse * LN2)

    target = known_column(target, vocabulary)
    blocks = tl.cdiv(width, BLOCK)
    for block in tl.range(0, blocks, num_stages=STAGES):
        columns = columns_of((blocks - 1 - block) * BLOCK, BLOCK, VECTOR)
        mask = columns < width
        logits = tl.load(logits_ptr + columns, mask=mask, other=float("-inf"))
        bounded = capped(logits.to(tl.float32), softcap, HAS_SOFTCAP)
        p = tl.exp2(bounded * scale - lse)
        gradient = dlogp * (tl.where(columns == target, 1.0, 0.0) - p)
        gradient = sloped(gradient, bounded, softcap, HAS_SOFTCAP)
        if PADDED:
            gradient = tl.where(columns < vocabulary, gradient, 0.0)
        if NARROWS:
            tl.debug_barrier()  # every thread has read what is now written over
        gradient = narrow(gradient, gradient_ptr.dtype.element_ty)
        tl.store(gradient_ptr + columns, gradient, mask=mask)


@triton.jit
def scale_kernel(x_ptr, factor_ptr, numel, BLOCK: tl.constexpr):
    factor = tl.load(factor_ptr)
    if factor != 1.0:
        first = tl.program_id(0).to(tl.int64) * BLOCK
        step = tl.num_programs(0).to(tl.int64) * BLOCK
        for start in range(first, numel, step):
            offsets = start + tl.arange(0, BLOCK)
            mask = offsets < numel
            x = tl.load(x_ptr + offsets, mask=mask).to(tl.float32) * factor
            tl.store(x_ptr + offsets, narrow(x, x_ptr.dtype.element_ty), mask=mask)

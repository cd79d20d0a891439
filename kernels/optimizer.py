"""AdamW (Loshchilov and Hutter, 2019) over all tensors of a model, without a word from the host.

Three launches make a step: sums of squares of the gradients, a single program that makes of them
the norm, the clip factor and whether the step is taken, and the update itself, one pass over
memory. The host says where the tensors are (a table of addresses) and reads nothing back.

What is known on the device only lies in two small tensors, `numbers` and `counts`: see
step_decision.py.

Stochastic rounding draws its bits from a hash of (seed, number of the tensor, step, element), so
they do not depend on blocks, chunks or what ran before.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .addresses import (
    CHUNK,
    COLUMNS,
    COPY_AT,
    FIRST,
    LENGTH,
    MEAN,
    PARAMETER_AT,
    SQUARE,
    addresses,
    pointer,
    tabulate,
)
from .configs import config
from .launch import launch, on_tensor_device
from .numerics import narrow
from .step_decision import FACTOR, RATE, SCALE, TAKEN, finish_
from .stochastic import GOLDEN, random_keys, random_word, rounded

__all__ = ["adamw_", "addresses", "finish_", "square_sums_", "tabulate"]

_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

TUNABLE = {
    "square_sums_kernel": {"BLOCK": (1024, 2048, 4096, 8192), "num_warps": (4, 8)},
    "finish_kernel": {"BLOCK": (4096, 8192), "num_warps": (16, 32)},
    "adamw_kernel": {"BLOCK": (512, 1024, 2048, 4096), "num_warps": (2, 4, 8)},
}


@on_tensor_device
def square_sums_(
    rows: Tensor,
    owners: Tensor,
    gradients: Tensor,
    numbers: Tensor,
    sums: Tensor,
    dtype: torch.dtype,
    scaled: bool,
) -> None:
    """Write the sum of squares of the gradient of each chunk.

    Args:
        rows, owners: from `tabulate`, on the device.
        gradients: their addresses [N], int64, 0 for none.
        numbers: the gradients are divided by its loss scale, if they are `scaled`.
        sums: [chunks], fp32.
        dtype: of the gradients.
    """
    if owners.numel():
        launch(
            square_sums_kernel,
            (owners.numel(),),
            rows,
            owners,
            gradients,
            numbers,
            sums,
            GRADIENT=_TYPES[dtype],
            SCALED=scaled,
            CHUNK=CHUNK,
            **config("square_sums_kernel", dtype, CHUNK),
        )


@on_tensor_device
def adamw_(
    rows: Tensor,
    owners: Tensor,
    gradients: Tensor,
    decays: Tensor,
    streams: Tensor,
    steps: Tensor,
    scales: Tensor,
    numbers: Tensor,
    counts: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    seed: int,
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype, torch.dtype | None],
    zero: bool,
) -> None:
    """Take the step, if it is to be taken.

    Args:
        rows, owners, gradients: as in `square_sums_`.
        decays: weight decay of each tensor [N], fp32.
        streams: number of each tensor [N], int32, for its random bits.
        steps, scales: as in `finish_`, of these tensors.
        dtypes: of parameters, gradients, moments and copies. Parameters and moments in bf16 are
            rounded stochastically; copies are rounded to the nearest.
        zero: leave zeros in the gradients.
    """
    parameter, gradient, moment, copy = dtypes
    if owners.numel():
        launch(
            adamw_kernel,
            (owners.numel(),),
            rows,
            owners,
            gradients,
            decays,
            streams,
            steps,
            scales,
            numbers,
            counts,
            beta2,
            1.0 - beta1,
            1.0 - beta2,
            eps,
            seed,
            PARAMETER=_TYPES[parameter],
            GRADIENT=_TYPES[gradient],
            MOMENT=_TYPES[moment],
            COPY=None if copy is None else _TYPES[copy],
            ZERO=zero,
            VECTOR=16 // max(dtype.itemsize for dtype in dtypes if dtype is not None),
            CHUNK=CHUNK,
            **config("adamw_kernel", parameter, CHUNK),
        )


@triton.jit(do_not_specialize_on_alignment=["gradients_ptr", "sums_ptr"])
def square_sums_kernel(
    rows_ptr,
    owners_ptr,
    gradients_ptr,
    numbers_ptr,
    sums_ptr,
    GRADIENT: tl.constexpr,
    SCALED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # From the end: what is read last is still in the cache where the update begins.
    chunk = tl.num_programs(0) - 1 - tl.program_id(0).to(tl.int64)
    tensor = tl.load(owners_ptr + chunk)
    row = rows_ptr + tensor * COLUMNS
    start = (chunk - tl.load(row + FIRST)) * CHUNK
    length = tl.load(row + LENGTH)
    address = tl.load(gradients_ptr + tensor)
    factor = tl.full((), 1.0, tl.float32)
    if SCALED:
        factor = 1.0 / tl.load(numbers_ptr + SCALE)

    total = tl.zeros((BLOCK,), tl.float32)
    if address != 0:
        gradient_ptr = pointer(address, GRADIENT, 128 // GRADIENT.primitive_bitwidth)
        if start + CHUNK <= length:
            for block in range(0, CHUNK, BLOCK):
                offsets = start + block + tl.arange(0, BLOCK)
                gradient = tl.load(gradient_ptr + offsets).to(tl.float32) * factor
                total += gradient * gradient
        else:
            for first in range(start, length, BLOCK):
                offsets = first + tl.arange(0, BLOCK)
                inside = offsets < length
                gradient = tl.load(gradient_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
                gradient *= factor
                total += gradient * gradient
    tl.store(sums_ptr + chunk, tl.sum(total, axis=0))


@triton.jit(
    do_not_specialize=["seed"],
    do_not_specialize_on_alignment=["gradients_ptr", "steps_ptr", "scales_ptr"],
)
def adamw_kernel(
    rows_ptr,
    owners_ptr,
    gradients_ptr,
    decays_ptr,
    streams_ptr,
    steps_ptr,
    scales_ptr,
    numbers_ptr,
    counts_ptr,
    beta2,
    mean_share,
    square_share,
    eps,
    seed,
    PARAMETER: tl.constexpr,
    GRADIENT: tl.constexpr,
    MOMENT: tl.constexpr,
    COPY: tl.constexpr,
    ZERO: tl.constexpr,
    VECTOR: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    chunk = tl.program_id(0).to(tl.int64)
    tensor = tl.load(owners_ptr + chunk)
    row = rows_ptr + tensor * COLUMNS
    start = (chunk - tl.load(row + FIRST)) * CHUNK
    length = tl.load(row + LENGTH)
    address = tl.load(gradients_ptr + tensor)
    taken = tl.load(counts_ptr + TAKEN) != 0
    if address == 0:
        return
    gradient_ptr = pointer(address, GRADIENT, VECTOR)
    copy = tl.load(row + COPY_AT)
    places = (
        pointer(tl.load(row + PARAMETER_AT), PARAMETER, VECTOR),
        gradient_ptr,
        pointer(tl.load(row + MEAN), MOMENT, VECTOR),
        pointer(tl.load(row + SQUARE), MOMENT, VECTOR),
        pointer(copy, COPY, VECTOR) if COPY is not None else None,
        copy != 0,
    )
    rate = tl.load(numbers_ptr + RATE)
    scalars = (
        tl.load(numbers_ptr + FACTOR),
        rate * tl.load(decays_ptr + tensor),
        tl.load(scales_ptr + 2 * tensor),
        tl.load(scales_ptr + 2 * tensor + 1),
        tl.cast(mean_share, tl.float32),
        tl.cast(beta2, tl.float32),
        tl.cast(square_share, tl.float32),
        tl.cast(eps, tl.float32),
    )
    step = tl.load(steps_ptr + tensor)
    keys = random_keys(seed, tl.load(streams_ptr + tensor), step, start >> 32)
    whole = start + CHUNK <= length
    if taken:
        if whole:
            for block in range(0, CHUNK, BLOCK):
                offsets = start + block + tl.arange(0, BLOCK)
                _update(places, offsets, None, scalars, keys, ZERO)
        else:
            for first in range(start, length, BLOCK):
                offsets = first + tl.arange(0, BLOCK)
                _update(places, offsets, offsets < length, scalars, keys, ZERO)
    elif ZERO:
        for first in range(start, tl.minimum(start + CHUNK, length), BLOCK):
            offsets = first + tl.arange(0, BLOCK)
            nothing = tl.zeros((BLOCK,), GRADIENT)
            tl.store(gradient_ptr + offsets, nothing, mask=offsets < length)


@triton.jit
def _update(places, offsets, inside, scalars, keys, ZERO: tl.constexpr):
    """AdamW on one block; `inside` is a mask, or None for a whole block."""
    parameter_ptr, gradient_ptr, mean_ptr, square_ptr, copy_ptr, has_copy = places
    factor, decay, size, root, mean_share, beta2, square_share, eps = scalars
    gradient = tl.load(gradient_ptr + offsets, mask=inside).to(tl.float32) * factor
    mean = tl.load(mean_ptr + offsets, mask=inside).to(tl.float32)
    square = tl.load(square_ptr + offsets, mask=inside).to(tl.float32)
    parameter = tl.load(parameter_ptr + offsets, mask=inside).to(tl.float32)

    mean += (gradient - mean) * mean_share
    square = square * beta2 + gradient * gradient * square_share
    # Not parameter * (1 - decay): a decay of 1e-6 would lose most of its digits.
    change = parameter * decay + mean / (tl.sqrt(square) * root + eps) * size
    parameter -= change

    word = random_word(offsets.to(tl.uint32), keys)
    tl.store(mean_ptr + offsets, rounded(mean, (word * GOLDEN) >> 16, mean_ptr), mask=inside)
    tl.store(square_ptr + offsets, rounded(square, word >> 16, square_ptr), mask=inside)
    kept = rounded(parameter, word & 0xFFFF, parameter_ptr)
    tl.store(parameter_ptr + offsets, kept, mask=inside)
    if copy_ptr is not None:  # noqa: SIM102, the compiler decides this one
        if has_copy:
            copy = narrow(parameter, copy_ptr.dtype.element_ty)
            tl.store(copy_ptr + offsets, copy, mask=inside)
    if ZERO:
        nothing = tl.zeros(gradient.shape, gradient_ptr.dtype.element_ty)
        tl.store(gradient_ptr + offsets, nothing, mask=inside)

"""Arithmetic that every kernel means in the same way: products, rounding, constants.

Two things differ under the interpreter (TRITON_INTERPRET=1), both for bf16, which numpy lacks: its
tl.dot multiplies bit patterns, and its conversion from fp32 cuts bits off instead of rounding.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import INTERPRETING, is_cuda

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# A finite stand-in for -inf as the maximum of nothing: exp2(-inf - LOWEST) is 0, where
# exp2(-inf - -inf) would be NaN.
LOWEST = tl.constexpr(-1e30)


def dot_precision(dtype: torch.dtype) -> str:
    """How `dot` multiplies: fp32 keeps its accuracy, in three TF32 products on tensor cores."""
    return "tf32x3" if dtype == torch.float32 and is_cuda() else "ieee"


@triton.jit
def dot(a, b, accumulator, PRECISION: tl.constexpr):
    """accumulator + a b in fp32; None for no accumulator."""
    if INTERPRETING:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, accumulator, input_precision=PRECISION)


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """fp32 numbers in `dtype`, rounded to nearest even."""
    if INTERPRETING and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        # Without the bits that are cut: denormal numbers, of which 0 would become one, are not.
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    return x.to(dtype)

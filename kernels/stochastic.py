"""Stochastic rounding to bf16, with random bits that depend on what is rounded and on nothing else.

A weight in bf16 has 8 bits: most updates are smaller than half of the last one, and rounding to the
nearest would lose them. Rounded up with the probability of the part that is cut off, the expected
weight is the exact one.

The bits are a hash of (seed, number of the tensor, step, element): they do not depend on how work
is divided, and a resumed run draws the same.
"""

from __future__ import annotations

import triton
import triton.language as tl

# 2^32 over the golden ratio: its multiples are spread evenly.
GOLDEN = tl.constexpr(0x9E3779B9)


@triton.jit
def rounded(x, random, pointer):
    """fp32 numbers as they are stored there; bf16 stochastically, with 16 random bits each."""
    if pointer.dtype.element_ty == tl.bfloat16:
        # The probability of the next larger magnitude is the part that is cut off.
        bits = (x.to(tl.uint32, bitcast=True) + random) >> 16
        bits = tl.where(x == x, bits, 0x7FC0).to(tl.uint16)
        return bits.to(tl.bfloat16, bitcast=True)
    else:
        return x


@triton.jit
def random_keys(seed, stream, step, part):
    """Two random words for a tensor, a step, and a part of 2^32 elements."""
    key = _mixed(seed.to(tl.uint32) + step.to(tl.uint32) * GOLDEN)
    key = _mixed(key ^ (stream.to(tl.uint32) * 0x85EBCA6B + part.to(tl.uint32)))
    return key, _mixed(key + GOLDEN)


@triton.jit
def _mixed(x):
    """A bijection of 32-bit words (Wellons' lowbias32) in which every bit depends on every one."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def random_word(index, keys):
    """The same, with a key before each of its halves: 32 random bits for each element."""
    first, second = keys
    x = index ^ first
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15) ^ second) * 0x846CA68B
    return x ^ (x >> 16)

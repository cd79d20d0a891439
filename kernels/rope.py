"""Rotary position embedding (Su et al., 2021) of queries and keys in one launch, half-split pairs.

One program rotates every head of one token, so a row of the tables is read once for all of them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import num_warps, on_tensor_device, schedule
from .numerics import narrow

# Pairs that are rotated at once.
_TILE = 1024


@on_tensor_device
def forward(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, inverse: bool
) -> tuple[Tensor, Tensor]:
    """Rotate q and k by their positions, or back when `inverse` (which is also the backward pass).

    Args:
        q: [T, H, D]; k: [T, K, D].
        cos, sin: [P, D/2] fp32; positions: [T] int32, values in 0..P-1.
    """
    tokens, heads, head_dim = q.shape
    rotated_q, rotated_k = torch.empty_like(q), torch.empty_like(k)
    if tokens:
        half_block = triton.next_power_of_2(head_dim // 2)
        most_heads = triton.next_power_of_2(max(heads, k.shape[1], 1))
        head_block = min(most_heads, max(1, _TILE // half_block))
        rope_kernel[(tokens,)](
            q,
            k,
            cos,
            sin,
            positions,
            rotated_q,
            rotated_k,
            INVERSE=inverse,
            H=heads,
            K=k.shape[1],
            HALF=head_dim // 2,
            HALF_BLOCK=half_block,
            HEAD_BLOCK=head_block,
            **schedule(num_warps(head_block * half_block, per_thread=8)),
        )
    return rotated_q, rotated_k


@triton.jit
def rope_kernel(
    q_ptr,
    k_ptr,
    cos_ptr,
    sin_ptr,
    positions_ptr,
    rotated_q_ptr,
    rotated_k_ptr,
    INVERSE: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    HALF: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    pairs = tl.arange(0, HALF_BLOCK)[None, :]
    angles = tl.load(positions_ptr + token).to(tl.int64) * HALF + pairs
    cos = tl.load(cos_ptr + angles, mask=pairs < HALF, other=0.0)
    sin = tl.load(sin_ptr + angles, mask=pairs < HALF, other=0.0)
    if INVERSE:
        sin = -sin
    q_offset, k_offset = token * (H * 2 * HALF), token * (K * 2 * HALF)
    rotate_heads(
        q_ptr + q_offset,
        rotated_q_ptr + q_offset,
        cos,
        sin,
        H,
        HALF,
        HALF_BLOCK,
        HEAD_BLOCK,
    )
    rotate_heads(
        k_ptr + k_offset,
        rotated_k_ptr + k_offset,
        cos,
        sin,
        K,
        HALF,
        HALF_BLOCK,
        HEAD_BLOCK,
    )


@triton.jit
def rotate_heads(
    in_ptr,
    out_ptr,
    cos,
    sin,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
):
    """Rotates the pairs (i, i + HALF) of every head of one token."""
    pairs = tl.arange(0, HALF_BLOCK)[None, :]
    for first in range(0, HEADS, HEAD_BLOCK):
        heads = first + tl.arange(0, HEAD_BLOCK)[:, None]
        offsets = heads * (2 * HALF) + pairs
        mask = (heads < HEADS) & (pairs < HALF)
        a = tl.load(in_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(in_ptr + offsets + HALF, mask=mask, other=0.0).to(tl.float32)
        dtype = out_ptr.dtype.element_ty
        tl.store(out_ptr + offsets, narrow(a * cos - b * sin, dtype), mask=mask)
        tl.store(out_ptr + offsets + HALF, narrow(b * cos + a * sin, dtype), mask=mask)

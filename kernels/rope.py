"""Rotary position embedding (Su et al., 2021), half-split pairs, with an RMSNorm of heads in front.

One launch serves queries and keys, whose tiles may be parts of a token, so that a few tokens still
occupy a GPU. The rotation's transpose is the rotation by the opposite angle; with norms, the
backward pass is a kernel of its own.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .head_pairs import (
    angles_of,
    heads_of,
    load_pairs,
    normalised,
    num_tiles,
    rotated,
    store_pairs,
    tile_constants,
)
from .launch import launch, on_tensor_device, target
from .numerics import narrow
from .rope_backward import backward

__all__ = ["NORMS", "READS_STRIDES", "TUNABLE", "backward", "forward", "forward_into_cache"]

READS_STRIDES = True
# Queries and keys may have rows and positions of their own, and are normalised in the same launch.
NORMS = True

TUNABLE = {
    "rope_kernel": {"PAIRS": (512, 1024, 2048, 4096), "num_warps": (1, 2, 4, 8)},
    "rope_into_cache_kernel": {"PAIRS": (128, 256, 512, 1024), "num_warps": (1, 2, 4)},
}


@on_tensor_device
def forward(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    inverse: bool,
    k_positions: Tensor | None = None,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Normalise q and k where there are norms, and rotate them by their positions.

    Args:
        q: [T, H, D]; k: [T, K, D], or as many rows as `k_positions`. Rows and heads of any stride.
        cos, sin: [P, D/2] fp32.
        positions: [T] integers in 0..P-1; the number of the row when None.
        inverse: rotate back, which is also the backward pass; without norms.
        k_positions: those of the keys, where they differ.
        q_norm, k_norm: weights [D] of the norms, both or none.
    """
    heads, head_dim = q.shape[1:]
    constants = tile_constants("rope_kernel", q.dtype, head_dim, target())
    q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape)
    programs = num_tiles(q, constants) + num_tiles(k, constants)
    if programs:
        launch(
            rope_kernel,
            (programs,),
            q,
            k,
            cos,
            sin,
            positions,
            positions if k_positions is None else k_positions,
            q_norm,
            k_norm,
            q_out,
            k_out,
            q.stride(0),
            q.stride(1),
            k.stride(0),
            k.stride(1),
            q.shape[0],
            k.shape[0],
            eps,
            INVERSE=inverse,
            H=heads,
            K=k.shape[1],
            **constants,
        )
    return q_out, k_out


@on_tensor_device
def forward_into_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    block: Tensor,
    place: Tensor,
    keys: Tensor,
    values: Tensor,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """One token for each sequence: `forward`, with k and v written straight into the cache.

    Args:
        q: [B, H, D]; k, v: [B, K, D]. The others as in `forward`.
        block, place: where the token goes [B], integers.
        keys: [N, K, D, 64]; values: [N, K, 64, D]; contiguous, written in place.

    Returns:
        q, normalised and rotated.
    """
    heads, head_dim = q.shape[1:]
    constants = tile_constants("rope_into_cache_kernel", q.dtype, head_dim, target())
    q_out = q.new_empty(q.shape)
    programs = num_tiles(q, constants) + num_tiles(k, constants)
    if programs:
        launch(
            rope_into_cache_kernel,
            (programs,),
            q,
            k,
            v,
            cos,
            sin,
            positions,
            block,
            place,
            q_norm,
            k_norm,
            q_out,
            keys,
            values,
            q.stride(0),
            q.stride(1),
            k.stride(0),
            k.stride(1),
            v.stride(0),
            v.stride(1),
            q.shape[0],
            eps,
            H=heads,
            K=k.shape[1],
            PLACES=keys.shape[3],
            **constants,
        )
    return q_out


@triton.jit(do_not_specialize=["num_queries", "num_keys"])
def rope_kernel(
    q_ptr,
    k_ptr,
    cos_ptr,
    sin_ptr,
    q_positions_ptr,
    k_positions_ptr,
    q_norm_ptr,
    k_norm_ptr,
    q_out_ptr,
    k_out_ptr,
    q_stride,
    q_head_stride,
    k_stride,
    k_head_stride,
    num_queries,
    num_keys,
    eps,
    INVERSE: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tile = tl.program_id(0).to(tl.int64)
    q_tiles = tl.cdiv(num_queries * H, ROWS)
    pairs = tl.arange(0, BLOCK)[None, :]
    if tile < q_tiles:
        token, head, mask = heads_of(tile, num_queries, pairs, H, HALF, ROWS)
        a, b = load_pairs(q_ptr + token * q_stride + head * q_head_stride, pairs, mask, HALF)
        a, b = normalised(a, b, q_norm_ptr, head, pairs, mask, eps, HALF)
        cos, sin = angles_of(
            cos_ptr, sin_ptr, q_positions_ptr, token, num_queries, pairs, mask, HALF
        )
        a, b = rotated(a, b, cos, sin, INVERSE)
        store_pairs(q_out_ptr + (token * H + head) * (2 * HALF), a, b, pairs, mask, HALF)
    else:
        token, head, mask = heads_of(tile - q_tiles, num_keys, pairs, K, HALF, ROWS)
        a, b = load_pairs(k_ptr + token * k_stride + head * k_head_stride, pairs, mask, HALF)
        a, b = normalised(a, b, k_norm_ptr, head, pairs, mask, eps, HALF)
        cos, sin = angles_of(cos_ptr, sin_ptr, k_positions_ptr, token, num_keys, pairs, mask, HALF)
        a, b = rotated(a, b, cos, sin, INVERSE)
        store_pairs(k_out_ptr + (token * K + head) * (2 * HALF), a, b, pairs, mask, HALF)


@triton.jit(do_not_specialize=["num_tokens"])
def rope_into_cache_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    cos_ptr,
    sin_ptr,
    positions_ptr,
    block_ptr,
    place_ptr,
    q_norm_ptr,
    k_norm_ptr,
    q_out_ptr,
    keys_ptr,
    values_ptr,
    q_stride,
    q_head_stride,
    k_stride,
    k_head_stride,
    v_stride,
    v_head_stride,
    num_tokens,
    eps,
    H: tl.constexpr,
    K: tl.constexpr,
    PLACES: tl.constexpr,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tile = tl.program_id(0).to(tl.int64)
    q_tiles = tl.cdiv(num_tokens * H, ROWS)
    pairs = tl.arange(0, BLOCK)[None, :]
    if tile < q_tiles:
        token, head, mask = heads_of(tile, num_tokens, pairs, H, HALF, ROWS)
        a, b = load_pairs(q_ptr + token * q_stride + head * q_head_stride, pairs, mask, HALF)
        a, b = normalised(a, b, q_norm_ptr, head, pairs, mask, eps, HALF)
        cos, sin = angles_of(cos_ptr, sin_ptr, positions_ptr, token, num_tokens, pairs, mask, HALF)
        a, b = rotated(a, b, cos, sin, False)
        store_pairs(q_out_ptr + (token * H + head) * (2 * HALF), a, b, pairs, mask, HALF)
    else:
        token, head, mask = heads_of(tile - q_tiles, num_tokens, pairs, K, HALF, ROWS)
        block = tl.load(block_ptr + token, mask=token < num_tokens, other=0).to(tl.int64)
        place = tl.load(place_ptr + token, mask=token < num_tokens, other=0).to(tl.int64)
        a, b = load_pairs(k_ptr + token * k_stride + head * k_head_stride, pairs, mask, HALF)
        va, vb = load_pairs(v_ptr + token * v_stride + head * v_head_stride, pairs, mask, HALF)
        a, b = normalised(a, b, k_norm_ptr, head, pairs, mask, eps, HALF)
        cos, sin = angles_of(cos_ptr, sin_ptr, positions_ptr, token, num_tokens, pairs, mask, HALF)
        a, b = rotated(a, b, cos, sin, False)
        # Keys of a block lie channel by channel, values token by token.
        in_cache = (block * K + head) * (2 * HALF * PLACES)
        key = keys_ptr + in_cache + place + pairs * PLACES
        tl.store(key, narrow(a, keys_ptr.dtype.element_ty), mask=mask)
        tl.store(key + HALF * PLACES, narrow(b, keys_ptr.dtype.element_ty), mask=mask)
        store_pairs(values_ptr + in_cache + place * (2 * HALF), va, vb, pairs, mask, HALF)

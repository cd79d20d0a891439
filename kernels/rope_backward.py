"""The way back through rotation and norm of the heads, where there are norms; see rope.py.

A fixed number of programs walk over the heads, and keep the gradients of the norms' weights in
registers; their sums are added up in a fixed order.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.backends.compiler import GPUTarget

from .head_pairs import (
    angles_of,
    heads_of,
    load_pairs,
    num_tiles,
    rotated,
    rstd_of,
    store_pairs,
    tile_constants,
)
from .launch import launch, num_processors, on_tensor_device, target
from .rms_norm import sum_rows

TUNABLE = {
    "rope_backward_kernel": {
        "PAIRS": (512, 1024, 2048),
        "STAGES": (1, 2, 3),
        "PROGRAMS": (2, 3, 4, 5, 6, 8),
        "num_warps": (2, 4, 8),
    },
}


@on_tensor_device
def backward(
    dq: Tensor,
    dk: Tensor,
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    k_positions: Tensor | None,
    q_norm: Tensor,
    k_norm: Tensor,
    eps: float,
    weight_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q and k, and of the weights of both norms, where there are norms.

    Args:
        dq, dk: gradients of what `forward` returned; q, k and the others: what it was given.

    Returns:
        dq, dk, and [2, D] in fp32, or [0, D] unless `weight_grad`.
    """
    heads, head_dim = q.shape[1:]
    constants, most = _plan("rope_backward_kernel", q.dtype, head_dim, target())
    q_tiles, k_tiles = num_tiles(q, constants), num_tiles(k, constants)
    q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape)
    if not q_tiles + k_tiles:
        return q_out, k_out, cos.new_zeros((2 if weight_grad else 0, head_dim))
    programs = most * num_processors(q.device)
    # As many for each as it has work; at least one, which then has nothing but zeros to tell.
    for_keys = max(1, min(k_tiles, programs * k_tiles // (q_tiles + k_tiles)))
    for_queries = max(1, min(q_tiles, programs - for_keys))
    programs = for_queries + for_keys
    partial = cos.new_empty((programs, 2 * head_dim)) if weight_grad else None
    launch(
        rope_backward_kernel,
        (programs,),
        dq,
        dk,
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
        partial,
        dq.stride(0),
        dq.stride(1),
        dk.stride(0),
        dk.stride(1),
        q.stride(0),
        q.stride(1),
        k.stride(0),
        k.stride(1),
        q.shape[0],
        k.shape[0],
        for_queries,
        eps,
        H=heads,
        K=k.shape[1],
        **constants,
    )
    dnorms = (
        cos.new_empty((0, head_dim)) if partial is None else sum_rows(partial).view(2, head_dim)
    )
    return q_out, k_out, dnorms


@functools.cache
def _plan(
    kernel: str, dtype: torch.dtype, head_dim: int, gpu: GPUTarget
) -> tuple[dict[str, Any], int]:
    constants = dict(tile_constants(kernel, dtype, head_dim, gpu))
    return constants, constants.pop("PROGRAMS")


@triton.jit(do_not_specialize=["num_queries", "num_keys", "q_programs"])
def rope_backward_kernel(
    dq_ptr,
    dk_ptr,
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
    partial_ptr,
    dq_stride,
    dq_head_stride,
    dk_stride,
    dk_head_stride,
    q_stride,
    q_head_stride,
    k_stride,
    k_head_stride,
    num_queries,
    num_keys,
    q_programs,
    eps,
    H: tl.constexpr,
    K: tl.constexpr,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    sums_ptr = None if partial_ptr is None else partial_ptr + program * (4 * HALF)
    if program < q_programs:
        norm_backward(
            dq_ptr,
            dq_stride,
            dq_head_stride,
            q_ptr,
            q_stride,
            q_head_stride,
            cos_ptr,
            sin_ptr,
            q_positions_ptr,
            q_norm_ptr,
            q_out_ptr,
            sums_ptr,
            0,
            num_queries,
            program,
            q_programs,
            eps,
            H,
            HALF,
            ROWS,
            BLOCK,
            STAGES,
        )
    else:
        norm_backward(
            dk_ptr,
            dk_stride,
            dk_head_stride,
            k_ptr,
            k_stride,
            k_head_stride,
            cos_ptr,
            sin_ptr,
            k_positions_ptr,
            k_norm_ptr,
            k_out_ptr,
            sums_ptr,
            2 * HALF,
            num_keys,
            program - q_programs,
            tl.num_programs(0) - q_programs,
            eps,
            K,
            HALF,
            ROWS,
            BLOCK,
            STAGES,
        )


@triton.jit
def norm_backward(
    dy_ptr,
    dy_stride,
    dy_head_stride,
    x_ptr,
    x_stride,
    x_head_stride,
    cos_ptr,
    sin_ptr,
    positions_ptr,
    norm_ptr,
    dx_ptr,
    sums_ptr,
    sums_at: tl.constexpr,
    num_tokens,
    first,
    step,
    eps,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Every `step`-th tile of the heads of q or of k."""
    pairs = tl.arange(0, BLOCK)[None, :]
    da_weight = tl.zeros((ROWS, BLOCK), tl.float32)
    db_weight = tl.zeros((ROWS, BLOCK), tl.float32)
    in_head = (pairs < HALF) & (tl.arange(0, ROWS)[:, None] >= 0)
    wa, wb = load_pairs(norm_ptr + tl.zeros((ROWS, 1), tl.int32), pairs, in_head, HALF)
    for tile in tl.range(first, tl.cdiv(num_tokens * HEADS, ROWS), step, num_stages=STAGES):
        token, head, mask = heads_of(tile, num_tokens, pairs, HEADS, HALF, ROWS)
        da, db = load_pairs(dy_ptr + token * dy_stride + head * dy_head_stride, pairs, mask, HALF)
        a, b = load_pairs(x_ptr + token * x_stride + head * x_head_stride, pairs, mask, HALF)
        cos, sin = angles_of(cos_ptr, sin_ptr, positions_ptr, token, num_tokens, pairs, mask, HALF)
        rstd = rstd_of(a, b, eps, HALF)
        a, b = a * rstd, b * rstd
        da, db = rotated(da, db, cos, sin, True)
        if sums_ptr is not None:
            da_weight += da * a
            db_weight += db * b
        da, db = da * wa, db * wb
        projection = tl.sum(da * a + db * b, axis=1)[:, None] / (2 * HALF)
        da, db = (da - a * projection) * rstd, (db - b * projection) * rstd
        store_pairs(dx_ptr + (token * HEADS + head) * (2 * HALF), da, db, pairs, mask, HALF)
    if sums_ptr is not None:
        # The other half belongs to the other programs: nothing to add.
        other = 2 * HALF - sums_at
        in_row = pairs < HALF
        tl.store(sums_ptr + sums_at + pairs, tl.sum(da_weight, axis=0)[None, :], mask=in_row)
        tl.store(sums_ptr + sums_at + HALF + pairs, tl.sum(db_weight, axis=0)[None, :], mask=in_row)
        tl.store(sums_ptr + other + pairs, tl.zeros((1, BLOCK), tl.float32), mask=in_row)
        tl.store(sums_ptr + other + HALF + pairs, tl.zeros((1, BLOCK), tl.float32), mask=in_row)

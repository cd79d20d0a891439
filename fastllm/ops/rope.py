"""Rotary position embedding (Su et al., 2021) on packed positions, half-split pairing.

Models that normalise each head of the queries and keys do that here too: on a GPU both, and in
decoding the step into the cache, are one launch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import backend
from .inputs import as_heads, needs_grad
from .rms_norm import rms_norm, rms_norm_reference


def rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None = None,
    *,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
    k_positions: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys by their positions.

    Channel i is paired with channel i + D/2, as in Hugging Face's models.

    Args:
        q: [T, H, D]. k: [T, K, D]. fp32, bf16 or fp16; the rotation is computed in fp32.
        cos, sin: tables [P, D/2], fp32.
        positions: row of the tables for each token [T], integer; 0..T-1 when None. Values
            must lie in 0..P-1.
        q_norm, k_norm: weights [D] of an RMSNorm of each head in front; both or none.
        eps: of the norms.
        k_positions: positions of the keys, where these are not of the same tokens as the queries;
            k may then have more or fewer tokens.

    Returns:
        The rotated q and k.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    _check(q, k, cos, sin, positions, k_positions)
    _check_norms(q, q_norm, k_norm)
    raw = backend.kernels("rope", q, k, cos, sin)
    if raw is None:
        return rope_reference(
            q,
            k,
            cos,
            sin,
            positions,
            q_norm=q_norm,
            k_norm=k_norm,
            eps=eps,
            k_positions=k_positions,
        )
    if q_norm is not None and k_norm is not None and not one_launch(raw):
        q, k = rms_norm(q, q_norm, eps), rms_norm(k, k_norm, eps)  # type: ignore[assignment]
        q_norm = k_norm = None
    given = _angles(cos, sin, positions, k_positions, q, raw)
    if q_norm is None or k_norm is None:
        return _Rope.apply(q, k, *given, raw) if needs_grad(q, k) else rotate(raw, q, k, *given)
    norms = q_norm.contiguous(), k_norm.contiguous()
    if needs_grad(q, k, *norms):
        return _NormedRope.apply(q, k, *given, *norms, eps, raw)
    return rotate(raw, q, k, *given, *norms, eps=eps)


def rope_into_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    keys: Tensor,
    values: Tensor,
    block: Tensor,
    place: Tensor,
    *,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """`rope` for one new token of each sequence, its key and value written to the cache.

    Not differentiable.

    Args:
        q: [B, H, D]. k, v: [B, K, D]. cos, sin, positions, q_norm, k_norm, eps: as in `rope`.
        keys: the cache [N, K, D, 64], values: [N, K, 64, D]; contiguous, written in place.
        block, place: where each token goes: its block and its place there [B], integers.

    Returns:
        The rotated q.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    _check(q, k, cos, sin, positions, None)
    _check_norms(q, q_norm, k_norm)
    _check_cache(k, v, keys, values, block, place)
    norms: dict[str, Any] = {"q_norm": q_norm, "k_norm": k_norm, "eps": eps}
    with torch.no_grad():
        raw = backend.kernels("rope", q, k, cos, sin)
        if raw is not None and one_launch(raw):
            cos, sin, positions, _ = _angles(cos, sin, positions, None, q, raw)
            q, k, v = (as_heads(x, raw) for x in (q, k, v))
            places = block.contiguous(), place.contiguous(), keys, values
            return raw.forward_into_cache(
                q, k, v, cos, sin, positions, *places, q_norm, k_norm, eps
            )
        q, k = rope(q, k, cos, sin, positions, **norms)
        block, place = block.long(), place.long()
        keys[block, :, :, place] = k
        values[block, :, place] = v
        return q


def rope_reference(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None = None,
    *,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
    k_positions: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition of `rope` in PyTorch."""

    def rotated(x: Tensor, norm: Tensor | None, positions: Tensor | None) -> Tensor:
        if norm is not None:
            x = rms_norm_reference(x, norm, eps)  # type: ignore[assignment]
        rows = slice(0, x.shape[0]) if positions is None else positions.long()
        cosines, sines = cos[rows].unsqueeze(1), sin[rows].unsqueeze(1)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        a, b = wide.chunk(2, dim=-1)
        return torch.cat((a * cosines - b * sines, b * cosines + a * sines), dim=-1).to(x.dtype)

    of_keys = positions if k_positions is None else k_positions
    return rotated(q, q_norm, positions), rotated(k, k_norm, of_keys)


def one_launch(raw: Any) -> bool:
    """Whether the kernels `raw` take norms, and positions of the keys' own: those in Triton do."""
    return getattr(raw, "NORMS", False)


def rotate(
    raw: Any,
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    k_positions: Tensor | None,
    *norms: Tensor,
    eps: float = 0.0,
    inverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """What `rope` does on its kernels, or the way back. Norms only where `one_launch`."""
    q, k = as_heads(q, raw), as_heads(k, raw)
    if one_launch(raw):
        return raw.forward(q, k, cos, sin, positions, inverse, k_positions, *norms, eps=eps)
    if k_positions is None:
        return raw.forward(q, k, cos, sin, positions, inverse)
    # Each is rotated with no partner.
    rotated_q, _ = raw.forward(q, q[:, :0], cos, sin, positions, inverse)
    _, rotated_k = raw.forward(k[:, :0], k, cos, sin, k_positions, inverse)
    return rotated_q, rotated_k


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, *given: Any) -> tuple[Tensor, Tensor]:
        *angles, ctx.raw = given
        ctx.save_for_backward(*angles)
        return rotate(ctx.raw, q, k, *angles)

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
        # A rotation's transpose is the rotation by the opposite angle.
        dq, dk = rotate(ctx.raw, dq, dk, *ctx.saved_tensors, inverse=True)
        return dq, dk, None, None, None, None, None


class _NormedRope(torch.autograd.Function):
    """On kernels that do it in one launch; elsewhere it is two ops."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, *given: Any) -> tuple[Tensor, Tensor]:
        *tensors, ctx.eps, ctx.raw = given
        ctx.save_for_backward(q, k, *tensors)
        return rotate(ctx.raw, q, k, *tensors, eps=ctx.eps)

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
        q, k, *angles, q_norm, k_norm = ctx.saved_tensors
        raw, needed = ctx.raw, ctx.needs_input_grad[6:8]
        dq, dk, q, k = (as_heads(x, raw) for x in (dq, dk, q, k))
        dq, dk, norms = raw.backward(dq, dk, q, k, *angles, q_norm, k_norm, ctx.eps, any(needed))
        dq_norm = norms[0].to(q_norm.dtype) if needed[0] else None
        dk_norm = norms[1].to(k_norm.dtype) if needed[1] else None
        return dq, dk, None, None, None, None, dq_norm, dk_norm, None, None


def _angles(
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    k_positions: Tensor | None,
    q: Tensor,
    raw: Any,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Tables and positions as the kernels `raw` read them."""
    tables = cos.float().contiguous(), sin.float().contiguous()
    if one_launch(raw):
        of_queries = None if positions is None else positions.contiguous()
        return *tables, of_queries, None if k_positions is None else k_positions.contiguous()
    if positions is None:
        positions = torch.arange(q.shape[0], dtype=torch.int32, device=q.device)
    of_keys = None if k_positions is None else k_positions.to(torch.int32).contiguous()
    return *tables, positions.to(torch.int32).contiguous(), of_keys


def _check(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    k_positions: Tensor | None,
) -> None:
    tokens, _, head_dim = q.shape
    wrong_rows = k_positions is None and k.shape[0] != tokens
    if wrong_rows or k.shape[2] != head_dim or k.dtype != q.dtype:
        raise ValueError(
            f"rope: k must be {q.dtype} [{tokens}, K, {head_dim}] to go with q, "
            f"found {k.dtype} {tuple(k.shape)}"
        )
    if head_dim % 2:
        raise ValueError(f"rope: the head size must be even, found {head_dim}")
    if cos.shape != sin.shape or cos.dim() != 2 or cos.shape[1] != head_dim // 2:
        raise ValueError(
            f"rope: cos and sin must be [P, {head_dim // 2}], "
            f"found {tuple(cos.shape)} and {tuple(sin.shape)}"
        )
    if positions is None and tokens > cos.shape[0]:
        raise ValueError(f"rope: {tokens} tokens, but tables for {cos.shape[0]} positions")
    for name, found, x in (("positions", positions, q), ("k_positions", k_positions, k)):
        if found is not None and (found.shape != x.shape[:1] or found.is_floating_point()):
            raise ValueError(
                f"rope: {name} must be integers [{x.shape[0]}], "
                f"found {found.dtype} {tuple(found.shape)}"
            )


def _check_norms(q: Tensor, q_norm: Tensor | None, k_norm: Tensor | None) -> None:
    if q_norm is None and k_norm is None:
        return
    if q_norm is None or k_norm is None or not q_norm.shape == k_norm.shape == q.shape[2:]:
        found = [None if norm is None else tuple(norm.shape) for norm in (q_norm, k_norm)]
        raise ValueError(
            f"rope: q_norm and k_norm must both be [{q.shape[2]}] or None, "
            f"found {found[0]} and {found[1]}"
        )


def _check_cache(
    k: Tensor, v: Tensor, keys: Tensor, values: Tensor, block: Tensor, place: Tensor
) -> None:
    tokens, key_heads, head_dim = k.shape
    blocks, places = keys.shape[0], keys.shape[-1]
    fitting = (
        v.shape == k.shape
        and keys.shape == (blocks, key_heads, head_dim, places)
        and values.shape == (blocks, key_heads, places, head_dim)
        and k.dtype == v.dtype == keys.dtype == values.dtype
        and keys.is_contiguous()
        and values.is_contiguous()
        and block.shape == place.shape == (tokens,)
    )
    if not fitting:
        shapes = ", ".join(
            f"{x.dtype} {tuple(x.shape)}" for x in (k, v, keys, values, block, place)
        )
        raise ValueError(
            "rope_into_cache: expected k, v [B, K, D], contiguous keys [N, K, D, 64] and values "
            f"[N, K, 64, D] of one dtype, and block, place [B]; found {shapes}"
        )

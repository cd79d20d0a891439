"""Attention of one new token per sequence over the KV cache of a rollout.

The cache is a shared part and a private part: the keys of every prompt lie packed in one row,
stored once however many sequences continue the prompt, and each sequence has a tail for the
tokens that it generated.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import backend
from .inputs import as_heads


def decode_attention(
    q: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    prefix_starts: Tensor,
    group: Tensor,
    tail_k: Tensor,
    tail_v: Tensor,
    tail_rows: Tensor,
    tail_lengths: Tensor,
    scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    """softmax(q k^T * scale) v over a sequence's prompt and tail.

    Args:
        q: [B, H, D], the new token of each sequence.
        prefix_k, prefix_v: packed prompts [Tp, K, D].
        prefix_starts: first row of each prompt, and Tp at the end [G + 1], int32.
        group: prompt of each sequence [B], int32.
        tail_k, tail_v: [R, M, K, D]; the new token's keys and values are already in.
        tail_rows: row of the tails that belongs to each sequence [B], int32.
        tail_lengths: tokens in each tail, the new one included [B], int32.
        scale: factor of the scores; 1 / sqrt(D) when None.
        window: the new token at position p sees positions > p - window; None for all.

    Returns:
        [B, H, D] in the dtype of q. There is no backward pass: sampling is not differentiated.

    Raises:
        ValueError: shapes that do not fit.
        RuntimeError: gradients are asked for.
    """
    _check(q, prefix_k, prefix_v, tail_k, tail_v, group, tail_rows, tail_lengths)
    if window is not None and window < 1:
        raise ValueError(f"decode_attention: window must be at least 1 or None, found {window}")
    floats = q, prefix_k, prefix_v, tail_k, tail_v
    if torch.is_grad_enabled() and any(t.requires_grad for t in floats):
        raise RuntimeError("decode_attention has no backward pass: call it under torch.no_grad()")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    cache = prefix_k, prefix_v, prefix_starts, group, tail_k, tail_v, tail_rows, tail_lengths
    raw = backend.kernels("decode_attention", q, *cache)
    if raw is None:
        return decode_attention_reference(q, *cache, scale, window)
    if not all(tensor.is_contiguous() for tensor in cache):
        # A silent copy of a whole cache for each token would be worse than an error.
        raise ValueError("decode_attention: the caches and their indices must be contiguous")
    return raw.forward(as_heads(q, raw), *cache, scale, window or 0)


def decode_attention_reference(
    q: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    prefix_starts: Tensor,
    group: Tensor,
    tail_k: Tensor,
    tail_v: Tensor,
    tail_rows: Tensor,
    tail_lengths: Tensor,
    scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    """The definition of `decode_attention` in PyTorch: caches gathered to a padded batch."""
    if q.shape[0] == 0:
        return torch.empty_like(q)
    first = prefix_starts[group.long()].long()
    prompt = prefix_starts[group.long() + 1].long() - first
    tail = tail_lengths.long()
    before, after = int(prompt.max()), int(tail.max())
    column = torch.arange(before, device=q.device)
    # Columns past the end of a prompt read some other row; the mask below hides them.
    rows = (first[:, None] + column).clamp_(max=max(prefix_k.shape[0] - 1, 0))
    generated = tail_rows.long()
    keys = torch.cat((prefix_k[rows], tail_k[generated, :after]), dim=1)
    values = torch.cat((prefix_v[rows], tail_v[generated, :after]), dim=1)

    column = torch.arange(before + after, device=q.device)
    in_prompt = column < before
    position = torch.where(in_prompt, column, prompt[:, None] + column - before)
    newest = (prompt + tail - 1)[:, None]
    visible = torch.where(in_prompt, column < prompt[:, None], column - before < tail[:, None])
    if window is not None:
        visible &= position > newest - window
    # What nobody sees may be uninitialised memory, and 0 * NaN is NaN.
    unseen = ~visible[:, :, None, None]
    out = F.scaled_dot_product_attention(
        q.unsqueeze(2),
        keys.masked_fill(unseen, 0).transpose(1, 2),
        values.masked_fill(unseen, 0).transpose(1, 2),
        attn_mask=visible[:, None, None, :],
        scale=scale,
        enable_gqa=True,
    )
    return out.squeeze(2)


def _check(
    q: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    tail_k: Tensor,
    tail_v: Tensor,
    *per_sequence: Tensor,
) -> None:
    batch, heads, head_dim = q.shape
    if prefix_k.shape != prefix_v.shape or tail_k.shape != tail_v.shape:
        raise ValueError(
            "decode_attention: keys and values must have the same shape, found "
            f"{tuple(prefix_k.shape)}, {tuple(prefix_v.shape)} (prefix) and "
            f"{tuple(tail_k.shape)}, {tuple(tail_v.shape)} (tail)"
        )
    if prefix_k.shape[1:] != tail_k.shape[2:] or prefix_k.shape[2] != head_dim:
        raise ValueError(
            f"decode_attention: expected prefix [Tp, K, {head_dim}] and "
            f"tail [R, M, K, {head_dim}], found {tuple(prefix_k.shape)} and {tuple(tail_k.shape)}"
        )
    if heads % prefix_k.shape[1]:
        raise ValueError(
            f"decode_attention: {heads} query heads do not divide over {prefix_k.shape[1]}"
        )
    for tensor in per_sequence:
        if tensor.shape != (batch,):
            raise ValueError(
                f"decode_attention: group, tail_rows and tail_lengths must be [{batch}], "
                f"found {tuple(tensor.shape)}"
            )

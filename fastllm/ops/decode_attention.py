"""Attention of one new token per sequence over the KV cache.

The cache is a pool of blocks of 64 tokens. A prompt's blocks are stored once, however many
sequences continue the prompt, and each sequence has blocks of its own for the tokens that it
generated: its tail. Keys lie transposed in a block, tokens along memory, so that the products of a
query with many keys are vector instructions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import backend
from .inputs import as_heads

BLOCK = 64
"""Tokens of a block."""


def decode_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    prefix_blocks: Tensor,
    prefix_lengths: Tensor,
    group: Tensor,
    tail_blocks: Tensor,
    tail_lengths: Tensor,
    scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    """softmax(q k^T * scale) v over a sequence's prompt and tail.

    Args:
        q: [B, H, D], the new token of each sequence.
        keys: blocks of keys [N, K, D, 64].
        values: blocks of values [N, K, 64, D]; the new token's key and value are already in.
        prefix_blocks: blocks of each prompt [G, ?], int32; not read past the prompt's length.
        prefix_lengths: tokens of each prompt [G], int32.
        group: prompt of each sequence [B], int32; fastest when equal ones are neighbours.
        tail_blocks: blocks of each tail [B, ?], int32; not read past the tail's length.
        tail_lengths: tokens in each tail, the new one included [B], int32.
        scale: factor of the scores; 1 / sqrt(D) when None.
        window: the new token at position p sees positions > p - window; None for all.

    Returns:
        [B, H, D] in the dtype of q. There is no backward pass: sampling is not differentiated.

    Raises:
        ValueError: shapes that do not fit.
        RuntimeError: gradients are asked for.
    """
    _check(q, keys, values)
    _check_tables(q.shape[0], prefix_blocks, prefix_lengths, group, tail_blocks, tail_lengths)
    if window is not None and window < 1:
        raise ValueError(f"decode_attention: window must be at least 1 or None, found {window}")
    if torch.is_grad_enabled() and any(t.requires_grad for t in (q, keys, values)):
        raise RuntimeError("decode_attention has no backward pass: call it under torch.no_grad()")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    tables = (
        prefix_blocks.contiguous(),
        prefix_lengths.contiguous(),
        group.contiguous(),
        tail_blocks.contiguous(),
        tail_lengths.contiguous(),
    )
    raw = backend.kernels("decode_attention", q, keys, values, *tables)
    if raw is None:
        return decode_attention_reference(q, keys, values, *tables, scale, window)
    if not (keys.is_contiguous() and values.is_contiguous()):
        # A silent copy of a whole cache for each token would be worse than an error.
        raise ValueError("decode_attention: keys and values must be contiguous")
    return raw.forward(as_heads(q, raw), keys, values, *tables, scale, window or 0)


def decode_attention_reference(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    prefix_blocks: Tensor,
    prefix_lengths: Tensor,
    group: Tensor,
    tail_blocks: Tensor,
    tail_lengths: Tensor,
    scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    """The definition of `decode_attention` in PyTorch: blocks gathered to a padded batch."""
    if q.shape[0] == 0:
        return torch.empty_like(q)
    prompt, tail = prefix_lengths[group.long()].long(), tail_lengths.long()
    before, place = _tokens(prefix_blocks[group.long()], prompt)
    after, tail_place = _tokens(tail_blocks, tail)
    blocks = torch.cat((before, after), dim=1)
    position = torch.cat((place, tail_place + prompt[:, None]), dim=1)
    visible = torch.cat((place < prompt[:, None], tail_place < tail[:, None]), dim=1)
    if window is not None:
        visible &= position >= (prompt + tail - window)[:, None]
    # What nobody sees may be uninitialised memory, and 0 * NaN is NaN.
    unseen = ~visible[:, None, :, None]
    out = F.scaled_dot_product_attention(
        q.unsqueeze(2),
        keys[blocks].permute(0, 2, 1, 4, 3).flatten(2, 3).masked_fill(unseen, 0),
        values[blocks].transpose(1, 2).flatten(2, 3).masked_fill(unseen, 0),
        attn_mask=visible[:, None, None, :],
        scale=scale,
        enable_gqa=True,
    )
    return out.squeeze(2)


def _tokens(blocks: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """The blocks of runs of tokens [B, J], any where a run has no more, and the place of each
    token in its run [B, 64 J]."""
    blocks = blocks[:, : -(-int(lengths.max()) // BLOCK)].long()
    first = torch.arange(blocks.shape[1], device=blocks.device) * BLOCK
    place = torch.arange(blocks.shape[1] * BLOCK, device=blocks.device).expand(len(blocks), -1)
    return blocks.masked_fill(first >= lengths[:, None], 0), place


def _check(q: Tensor, keys: Tensor, values: Tensor) -> None:
    _, heads, head_dim = q.shape
    blocks, key_heads = keys.shape[0], keys.shape[1]
    expected = (blocks, key_heads, head_dim, BLOCK), (blocks, key_heads, BLOCK, head_dim)
    if (keys.shape, values.shape) != expected:
        raise ValueError(
            f"decode_attention: expected keys [N, K, {head_dim}, {BLOCK}] and values "
            f"[N, K, {BLOCK}, {head_dim}], found {tuple(keys.shape)} and {tuple(values.shape)}"
        )
    if heads % key_heads:
        raise ValueError(f"decode_attention: {heads} query heads do not divide over {key_heads}")


def _check_tables(
    batch: int,
    prefix_blocks: Tensor,
    prefix_lengths: Tensor,
    group: Tensor,
    tail_blocks: Tensor,
    tail_lengths: Tensor,
) -> None:
    groups = prefix_blocks.shape[0]
    if prefix_blocks.dim() != 2 or prefix_lengths.shape != (groups,):
        raise ValueError(
            "decode_attention: expected prefix_blocks [G, ?] and prefix_lengths [G], found "
            f"{tuple(prefix_blocks.shape)} and {tuple(prefix_lengths.shape)}"
        )
    if tail_blocks.dim() != 2 or tail_blocks.shape[0] != batch:
        raise ValueError(
            f"decode_attention: expected tail_blocks [{batch}, ?], found {tuple(tail_blocks.shape)}"
        )
    for name, tensor in ("group", group), ("tail_lengths", tail_lengths):
        if tensor.shape != (batch,):
            raise ValueError(
                f"decode_attention: {name} must be [{batch}], found {tuple(tensor.shape)}"
            )

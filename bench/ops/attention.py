"""attention: 4 D flops for each visible pair of tokens and head, 3.5 times that with backward."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases import Case, Peer, Suite
from fastllm.layout import PackedLayout
from fastllm.ops import attention, attention_reference


def case(
    label: str,
    lengths: list[int],
    prefix: list[int] | None,
    heads: int,
    key_heads: int,
    head_dim: int,
    window: int | None = None,
    memory: bool = False,
) -> Case:
    """A packed row."""
    layout = PackedLayout(lengths, prefix)
    pairs = sum(
        min(position + 1, window or position + 1)
        for segment, length in enumerate(lengths)
        for position in range(layout.prefix_length(segment), layout.prefix_length(segment) + length)
    )
    tokens = layout.total_tokens
    return Case(
        f"{label} {heads}/{key_heads}x{head_dim}",
        lambda: {
            "q": torch.randn(tokens, heads, head_dim),
            "k": torch.randn(tokens, key_heads, head_dim),
            "v": torch.randn(tokens, key_heads, head_dim),
            "layout": layout,
            "window": window,
        },
        ("q", "k", "v"),
        flops=4 * pairs * heads * head_dim,
        both=3.5,
        memory=memory,
    )


def sdpa(q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, window: int | None) -> Tensor:
    """One causal call on a batch: only for segments of one length that share nothing."""
    if window is not None:
        raise NotImplementedError
    return _batched(q, k, v, layout, is_causal=True)


def sdpa_whole(q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, window: int | None) -> Tensor:
    """What the window is spared: the whole causal attention."""
    if window is None:
        raise NotImplementedError
    return _batched(q, k, v, layout, is_causal=True)


def sdpa_mask(q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, mask: Tensor) -> Tensor:
    """The same with the window as a mask, as models of transformers do it."""
    return _batched(q, k, v, layout, attn_mask=mask)


def with_mask(arguments: dict[str, Any]) -> dict[str, Any]:
    """The mask is made once for all layers, so here it exists already."""
    given = dict(arguments)
    window, length = given.pop("window"), given["layout"].lengths[0]
    if window is None:
        raise NotImplementedError
    position = torch.arange(length, device=given["q"].device)
    distance = position[:, None] - position
    return given | {"mask": (distance >= 0) & (distance < window)}


def _batched(q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, **how: Any) -> Tensor:
    length = layout.lengths[0]
    if set(layout.lengths) != {length} or max(layout.prefix_of) >= 0:
        raise NotImplementedError
    q, k, v = (t.unflatten(0, (-1, length)).transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **how)
    return out.transpose(1, 2).flatten(0, 1)


PAIRS = [prefix for first in range(0, 24, 3) for prefix in (-1, first, first)]

SUITE = Suite(
    attention,
    attention_reference,
    (
        case("16x256", [256] * 16, None, 4, 2, 32),
        case("8 pairs 128+64+64", [128, 64, 64] * 8, PAIRS, 4, 2, 32),
        case("4x512", [512] * 4, None, 12, 4, 64),
        case("group 512+16x128", [512, *[128] * 16], [-1, *[0] * 16], 12, 4, 64),
        case("1x2048", [2048], None, 32, 8, 64, memory=True),
        case("1x2048 window 256", [2048], None, 32, 8, 64, window=256),
    ),
    {
        "F.sdpa": Peer(sdpa),
        "F.sdpa with mask": Peer(sdpa_mask, with_mask),
        "F.sdpa without window": Peer(sdpa_whole, same=False),
    },
    compiled=None,
)

"""attention: 4 D flops for each visible pair of tokens and head, 3.5 times that with backward."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import Case, Suite
from fastllm.layout import PackedLayout
from fastllm.ops import attention, attention_reference


def case(
    label: str,
    lengths: list[int],
    prefix: list[int] | None,
    heads: int,
    key_heads: int,
    head_dim: int,
) -> Case:
    """A packed row."""
    layout = PackedLayout(lengths, prefix)
    pairs = sum(
        n * (n + 1) // 2 + n * layout.prefix_length(segment) for segment, n in enumerate(lengths)
    )
    tokens = layout.total_tokens
    return Case(
        f"{label} {heads}/{key_heads}x{head_dim}",
        lambda: {
            "q": torch.randn(tokens, heads, head_dim),
            "k": torch.randn(tokens, key_heads, head_dim),
            "v": torch.randn(tokens, key_heads, head_dim),
            "layout": layout,
        },
        ("q", "k", "v"),
        flops=4 * pairs * heads * head_dim,
        both=3.5,
    )


def torch_function(q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout) -> Tensor:
    """One causal call on a batch: only for segments of one length that share nothing."""
    length = layout.lengths[0]
    if set(layout.lengths) != {length} or max(layout.prefix_of) >= 0:
        raise NotImplementedError
    q, k, v = (t.unflatten(0, (-1, length)).transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
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
        case("1x2048", [2048], None, 32, 8, 64),
    ),
    {"F.sdpa": torch_function},
)

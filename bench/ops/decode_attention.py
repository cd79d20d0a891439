"""decode_attention: each key and value that some sequence sees is read once."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases import Case, Peer, Suite
from fastllm.ops import decode_attention, decode_attention_reference


def case(
    prompts: int, group_size: int, prompt: int, tail: int, heads: int, key_heads: int, head_dim: int
) -> Case:
    """`prompts` prompts with `group_size` sequences each, `tail` tokens into their answers."""
    size = prompts * group_size

    def inputs() -> dict[str, torch.Tensor]:
        prefix = torch.randn(2, prompts * prompt, key_heads, head_dim)
        tails = torch.randn(2, size, tail, key_heads, head_dim)
        return {
            "q": torch.randn(size, heads, head_dim),
            "prefix_k": prefix[0],
            "prefix_v": prefix[1],
            "prefix_starts": torch.arange(prompts + 1, dtype=torch.int32) * prompt,
            "group": torch.arange(prompts, dtype=torch.int32).repeat_interleave(group_size),
            "tail_k": tails[0],
            "tail_v": tails[1],
            "tail_rows": torch.arange(size, dtype=torch.int32),
            "tail_lengths": torch.full((size,), tail, dtype=torch.int32),
        }

    cached = prompts * prompt + size * tail
    return Case(
        f"{prompts}x{group_size} {prompt}+{tail} {heads}/{key_heads}x{head_dim}",
        inputs,
        elements=2 * cached * key_heads * head_dim + 2 * size * heads * head_dim,
    )


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's op on a cache [B, K, L, D], which has the prompt once for each sequence."""
    return F.scaled_dot_product_attention(q[:, :, None], k, v, enable_gqa=True)[:, :, 0]


def grouped_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The heads that share a key head as the rows of one product."""
    size, key_heads, _, head_dim = k.shape
    grouped = q.view(size, key_heads, -1, head_dim)
    weights = (grouped @ k.transpose(2, 3) * head_dim**-0.5).float().softmax(-1)
    return (weights.to(q.dtype) @ v).view_as(q)


def cache(arguments: dict[str, Any]) -> dict[str, Any]:
    """The cache that a generating program keeps: [B, K, L, D], prompt and tail in one piece."""
    starts, group = arguments["prefix_starts"].tolist(), arguments["group"].tolist()

    def whole(name: str) -> Tensor:
        prefix, tail = arguments[f"prefix_{name}"], arguments[f"tail_{name}"]
        rows = [
            torch.cat((prefix[starts[g] : starts[g + 1]], tail[i])) for i, g in enumerate(group)
        ]
        return torch.stack(rows).transpose(1, 2).contiguous()

    return {"q": arguments["q"], "k": whole("k"), "v": whole("v")}


SUITE = Suite(
    decode_attention,
    decode_attention_reference,
    (
        case(8, 8, 32, 32, 4, 2, 32),
        case(32, 1, 768, 256, 32, 8, 64),
        case(4, 8, 768, 256, 32, 8, 64),
        case(32, 1, 768, 256, 32, 8, 128),
    ),
    {"F.sdpa": Peer(sdpa, cache), "grouped products": Peer(grouped_products, cache)},
    compiled="grouped products",
)

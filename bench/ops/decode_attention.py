"""decode_attention: each key and value that some sequence sees is read once."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases import Case, Peer, Suite
from fastllm.ops import decode_attention, decode_attention_reference

BLOCK = 64


def case(
    prompts: int, group_size: int, prompt: int, tail: int, heads: int, key_heads: int, head_dim: int
) -> Case:
    """`prompts` prompts with `group_size` sequences each, `tail` tokens into their answers."""
    size = prompts * group_size
    prompt_blocks, tail_blocks = -(-prompt // BLOCK), -(-tail // BLOCK)
    used = prompts * prompt_blocks

    def inputs() -> dict[str, torch.Tensor]:
        blocks = torch.randperm(used + size * tail_blocks).int()
        return {
            "q": torch.randn(size, heads, head_dim),
            "keys": torch.randn(blocks.numel(), key_heads, head_dim, BLOCK),
            "values": torch.randn(blocks.numel(), key_heads, BLOCK, head_dim),
            "prefix_blocks": blocks[:used].view(prompts, prompt_blocks),
            "prefix_lengths": torch.full((prompts,), prompt, dtype=torch.int32),
            "group": torch.arange(prompts, dtype=torch.int32).repeat_interleave(group_size),
            "tail_blocks": blocks[used:].view(size, tail_blocks),
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
    group = arguments["group"].long()
    runs = [
        (arguments["prefix_blocks"][group].long(), int(arguments["prefix_lengths"][0])),
        (arguments["tail_blocks"].long(), int(arguments["tail_lengths"][0])),
    ]
    keys = arguments["keys"].transpose(2, 3)
    k, v = (
        torch.cat([pool[at].transpose(1, 2).flatten(2, 3)[:, :, :n] for at, n in runs], dim=2)
        for pool in (keys, arguments["values"])
    )
    return {"q": arguments["q"], "k": k.contiguous(), "v": v.contiguous()}


SUITE = Suite(
    decode_attention,
    decode_attention_reference,
    (
        case(8, 8, 32, 32, 4, 2, 32),
        case(8, 8, 512, 64, 4, 2, 32),
        case(64, 1, 128, 64, 4, 2, 32),
        case(32, 1, 512, 128, 12, 4, 64),
        case(1, 1, 1984, 64, 12, 4, 64),
        case(32, 1, 768, 256, 32, 8, 64),
        case(4, 8, 768, 256, 32, 8, 64),
        case(32, 1, 768, 256, 32, 8, 128),
    ),
    {"F.sdpa": Peer(sdpa, cache), "grouped products": Peer(grouped_products, cache)},
    compiled="grouped products",
)

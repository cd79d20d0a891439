"""decode_attention: each key and value that some sequence sees is read once."""

from __future__ import annotations

import torch

from bench.cases import Case, Suite
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


SUITE = Suite(
    decode_attention,
    decode_attention_reference,
    (
        case(8, 8, 32, 32, 4, 2, 32),
        case(32, 1, 768, 256, 32, 8, 64),
        case(4, 8, 768, 256, 32, 8, 64),
        case(32, 1, 768, 256, 32, 8, 128),
    ),
)

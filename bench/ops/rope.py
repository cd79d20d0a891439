"""rope on packed rows: moves q and k in and out, and as much again back."""

from __future__ import annotations

import torch

from bench.harness import Case, Suite
from fastllm.layout import PackedLayout
from fastllm.ops import rope, rope_reference


def case(sequences: int, heads: int, key_heads: int, length: int, head_dim: int) -> Case:
    """Sequences of one length, packed into one row."""
    tokens = sequences * length

    def inputs() -> dict[str, torch.Tensor]:
        frequencies = 10000.0 ** (-torch.arange(0, head_dim, 2) / head_dim)
        angles = torch.arange(length)[:, None] * frequencies
        return {
            "q": torch.randn(tokens, heads, head_dim),
            "k": torch.randn(tokens, key_heads, head_dim),
            "cos": angles.cos(),
            "sin": angles.sin(),
            "positions": PackedLayout([length] * sequences).positions,
        }

    return Case(
        f"{sequences}x{heads}/{key_heads}x{length}x{head_dim}",
        inputs,
        ("q", "k"),
        elements=2 * tokens * (heads + key_heads) * head_dim,
    )


SUITE = Suite(
    rope,
    rope_reference,
    (case(16, 4, 2, 256, 32), case(4, 12, 4, 512, 64), case(2, 32, 8, 2048, 64)),
    fp32=("cos", "sin"),
)

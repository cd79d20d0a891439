"""rope on packed rows: moves q and k in and out, and as much again back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bench.cases import Case, Peer, Suite
from fastllm.layout import PackedLayout
from fastllm.ops import rope, rope_reference


def case(sequences: int, heads: int, key_heads: int, length: int, head_dim: int) -> Case:
    """Sequences of one length, packed into one row."""
    tokens = sequences * length

    def inputs() -> dict[str, Tensor]:
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


def rotate_half(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """As models of transformers do it: whole tables of D columns, and a copy with halves swapped.

    A model makes the tables of its positions once for all layers, so here they exist already.
    """
    return _rotated(q, cos, sin), _rotated(k, cos, sin)


def tables(arguments: dict[str, Any]) -> dict[str, Any]:
    """cos and sin of every token, [T, 1, D], in the dtype of q."""
    at = arguments["positions"].long()
    whole = {n: torch.cat([arguments[n][at]] * 2, -1)[:, None] for n in ("cos", "sin")}
    q, k = arguments["q"], arguments["k"]
    return {"q": q, "k": k, **{name: table.to(q.dtype) for name, table in whole.items()}}


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-high, low), dim=-1) * sin


SUITE = Suite(
    rope,
    rope_reference,
    (case(16, 4, 2, 256, 32), case(4, 12, 4, 512, 64), case(2, 32, 8, 2048, 64)),
    {"rotate_half": Peer(rotate_half, tables)},
    compiled="rotate_half",
    fp32=("cos", "sin"),
)

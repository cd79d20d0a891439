"""matmul and the linear layer made of it: 2 M K N flops, three times that with backward."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases import Case, Peer, Suite
from fastllm.ops import linear, matmul, use_backend
from fastllm.ops.matmul import choice


def product(rows: int, depth: int, columns: int, transposed: bool = False) -> Case:
    """[M, K] x [K, N]; transposed: a lies in memory as the gradient of a weight needs it."""

    def inputs() -> dict[str, Any]:
        a = torch.randn(depth, rows).t() if transposed else torch.randn(rows, depth)
        return {"a": a, "b": torch.randn(depth, columns), "layer": False}

    label = f"{rows}x{depth}x{columns}" + " dW" * transposed
    return Case(label, inputs, flops=2 * rows * depth * columns)


def layer(rows: int, channels: int, outputs: int) -> Case:
    """[N, C] through a linear layer of C x O."""
    return Case(
        f"linear {rows}x{channels}x{outputs}",
        lambda: {
            "a": torch.randn(rows, channels),
            "b": torch.randn(outputs, channels) * channels**-0.5,
            "layer": True,
        },
        ("a", "b"),
        flops=2 * rows * channels * outputs,
        both=3.0,
    )


def ours(a: Tensor, b: Tensor, layer: bool) -> Tensor:
    """What serves by itself: C++ where it is the faster one."""
    return linear(a, b) if layer else matmul(a, b)


def reference(a: Tensor, b: Tensor, layer: bool) -> Tensor:
    """PyTorch's product, of its vendor libraries."""
    return F.linear(a, b) if layer else torch.mm(a, b)


def always_cpp(a: Tensor, b: Tensor, layer: bool) -> Tensor:
    """The C++ product, where it is not what serves by itself: what the choice rejected."""
    if a.device.type != "cpu" or choice(a.dtype)[0]:
        raise NotImplementedError
    with use_backend("cpp"):
        return ours(a, b, layer)


def in_fp32(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same matrices in fp32: on many processors PyTorch's faster product."""
    a, b = arguments["a"], arguments["b"]
    if a.dtype == torch.float32 or arguments["layer"]:
        raise NotImplementedError
    return arguments | {"a": a.float(), "b": b.float()}


SUITE = Suite(
    ours,
    reference,
    (
        product(512, 1024, 2816),
        product(4096, 128, 344),
        product(2048, 768, 2048),
        product(128, 4096, 344, transposed=True),
        layer(4096, 128, 344),
        layer(2048, 768, 2048),
    ),
    {"torch.mm in fp32": Peer(reference, in_fp32), "C++ product": Peer(always_cpp)},
    compiled=None,
)

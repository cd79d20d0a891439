"""Matrix products, and the linear layer made of them.

A GPU's are its vendor's, through PyTorch. On a CPU, the C++ product (csrc/matmul.cpp) serves where
it is the faster one: `choice` has the rule, docs/decisions.md the measurements.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import backend, cpp
from .inputs import needs_grad
from .tracing import traced_as_constant
from .working import working

# Below this, copying b into blocks costs more than the faster inner loop saves.
_FEWEST_ROWS = 32

_in_order = False


@contextlib.contextmanager
def same_order() -> Iterator[None]:
    """Form every sum of a product in the order of its depth, however many rows there are.

    Outside, the fastest product for a number of rows serves, and their orders differ. Inside, a
    row of a product is the same to the last bit in a batch of any size, and the same as in the
    token step of generation (csrc/packed_matmul.cpp): what samples and what trains agree.

    Raises:
        ValueError: the C++ backend cannot serve; inside, a product that is not fp32 on the CPU.
    """
    global _in_order
    if not cpp.available():
        raise ValueError(f"same_order: expected the C++ kernels, but {cpp.reason()}")
    if backend.requested() not in ("auto", "cpp"):
        raise ValueError(f"same_order: expected the C++ backend, found {backend.requested()}")
    before, _in_order = _in_order, True
    try:
        yield
    finally:
        _in_order = before


def matmul(
    a: Tensor,
    b: Tensor,
    out: Tensor | None = None,
    add: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """a b, or out + a b; not differentiable. Sums are in fp32 (fp64 for fp64).

    Args:
        a: [M, K]. b: [K, N]. fp32, bf16 or fp16, not necessarily the same; any strides.
        out: [M, N], contiguous rows, written in place.
        add: add to `out` instead of replacing it.
        dtype: of a new result; the wider dtype of a and b when None.

    Returns:
        `out`, or a new [M, N].

    Raises:
        ValueError: shapes that do not fit, or `add` without `out`.
        RuntimeError: the C++ backend was requested and cannot serve.
    """
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[0]:
        raise ValueError(
            f"matmul: expected a [M, K] and b [K, N], found {tuple(a.shape)} and {tuple(b.shape)}"
        )
    if out is not None:
        dtype = out.dtype
    elif add:
        raise ValueError("matmul: add=True needs the tensor to add to (out)")
    else:
        dtype = dtype or torch.promote_types(a.dtype, b.dtype)
    in_cpp = _served_by_cpp(a, b, dtype)
    if out is None:
        if a.is_cuda and _as_they_are(a, b, dtype):
            return _new_product(a, b, dtype)
        out = a.new_empty(a.shape[0], b.shape[1], dtype=dtype)
    if a.shape[1] == 0:
        return out if add else out.zero_()
    if not in_cpp:
        return _torch_matmul(a, b, out, add)
    cpp.matmul.product_(_dense(a), _dense(b), out, add, _in_order)
    return out


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias.

    Args:
        x: [..., C]. weight: [O, C]. bias: [O]. Weight and bias may be wider than x: they are read
            in its dtype (`working.working`). On a GPU their gradients are then sums over the rows
            that were never rounded to that of x.

    Returns:
        [..., O] in the dtype of x.

    Raises:
        RuntimeError: shapes or dtypes that do not fit.
    """
    mixed = x.is_cuda and weight.dtype != x.dtype and not _in_order
    if mixed and needs_grad(weight, bias):
        rows = _MixedLinear.apply(x.reshape(-1, x.shape[-1]), weight, bias)
        return rows.view(*x.shape[:-1], weight.shape[0])
    weight = working(weight, x.dtype)
    bias = None if bias is None else working(bias, x.dtype)
    if not _served_by_cpp(x, weight, x.dtype) or not x.numel():
        return F.linear(x, weight, bias)
    rows = _Linear.apply(x.reshape(-1, x.shape[-1]), weight, bias)
    return rows.view(*x.shape[:-1], weight.shape[0])


def choice(dtype: torch.dtype) -> tuple[bool, str]:
    """Whether the C++ product serves this dtype on the CPU, and why."""
    if not cpp.available():
        return False, cpp.reason()
    if dtype not in backend.KERNEL_DTYPES:
        return False, f"the C++ product takes float32, bfloat16 and float16, found {dtype}"
    if dtype == torch.float32:
        if cpp.isa().startswith("avx512"):
            return True, "AVX-512: at least as fast as PyTorch's, twice as fast on AMD"
        return False, "PyTorch's libraries know this processor"
    if cpp.isa() == "baseline":
        return False, "no vectors to speak of: PyTorch converts and multiplies"
    if dtype == torch.bfloat16 and cpp.fast_bf16_dot():
        return False, "the processor multiplies bf16 faster than fp32, and PyTorch knows how"
    return True, "PyTorch's is slower than fp32 on this processor"


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        out = matmul(x, weight.t())
        return out if bias is None else out.add_(bias)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            matmul(dout, weight) if needs_x else None,
            matmul(dout.t(), x) if needs_weight else None,
            dout.sum(0) if needs_bias else None,
        )


class _MixedLinear(torch.autograd.Function):
    """Weights wider than what they multiply, as in training in bf16 with weights in fp32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        narrow = working(weight, x.dtype)
        ctx.save_for_backward(x, narrow)
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        return F.linear(x, narrow, None if bias is None else working(bias, x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        weight_dtype, bias_dtype = ctx.dtypes
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            matmul(dout, weight) if needs_x else None,
            matmul(dout.t(), x, dtype=weight_dtype) if needs_weight else None,
            dout.sum(0, dtype=bias_dtype) if needs_bias else None,
        )


def _served_by_cpp(a: Tensor, b: Tensor, dtype: torch.dtype) -> bool:
    if _in_order:
        found = {t.device.type for t in (a, b)}, {a.dtype, b.dtype, dtype}
        if found != ({"cpu"}, {torch.float32}):
            raise ValueError(f"same_order: expected float32 on the CPU, found {found}")
        return True
    if a.device.type != "cpu":
        return False
    requested = _requested()
    if requested == "cpp":
        return backend.kernels("matmul", a, b) is not None
    if requested != "auto" or a.numel() < _FEWEST_ROWS * a.shape[-1]:
        return False
    return _wins(a.dtype, b.dtype, dtype)


@traced_as_constant
def _requested() -> str:
    return backend.requested()


@traced_as_constant
def _wins(a: torch.dtype, b: torch.dtype, out: torch.dtype) -> bool:
    return _known_to_win(a, b, out)


@cache
def _known_to_win(a: torch.dtype, b: torch.dtype, out: torch.dtype) -> bool:
    if a == b == out:
        return choice(a)[0]
    # PyTorch would have to convert whole matrices first.
    return choice(torch.float32)[0] and {a, b, out} <= set(backend.KERNEL_DTYPES)


def _torch_matmul(a: Tensor, b: Tensor, out: Tensor, add: bool) -> Tensor:
    # torch.compile cannot trace products into parts of tensors, nor those that widen into one.
    directly = not torch.compiler.is_compiling()
    if directly and a.dtype == b.dtype == out.dtype:
        return out.addmm_(a, b) if add else torch.mm(a, b, out=out)
    if a.is_cuda and _as_they_are(a, b, out.dtype):
        if directly:
            return _widening_product(a, b, out, add)
        product = _new_product(a, b, out.dtype)
    else:
        wide = torch.promote_types(torch.promote_types(a.dtype, b.dtype), out.dtype)
        a, b = a.to(wide), b.to(wide)
        if directly and a.is_cuda and out.dtype == wide:
            return out.addmm_(a, b) if add else torch.mm(a, b, out=out)
        product = torch.mm(a, b)
    return out.add_(product) if add else out.copy_(product)


def _new_product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.mm(a, b) if dtype == a.dtype else torch.mm(a, b, out_dtype=dtype)


def _widening_product(a: Tensor, b: Tensor, out: Tensor, add: bool) -> Tensor:
    """out = a b, or out += a b, of bf16 or fp16 into fp32, by the product itself."""
    if add:
        return torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
    return torch.mm(a, b, out_dtype=torch.float32, out=out)


def _as_they_are(a: Tensor, b: Tensor, dtype: torch.dtype) -> bool:
    """Whether a GPU's product takes a and b and makes this dtype; their sums are in fp32."""
    return a.dtype == b.dtype and (
        dtype == a.dtype or (dtype == torch.float32 and a.dtype in (torch.bfloat16, torch.float16))
    )


def _dense(matrix: Tensor) -> Tensor:
    """The matrix itself if its neighbours in memory are neighbours in a row or a column."""
    return matrix if 1 in matrix.stride() else matrix.contiguous()

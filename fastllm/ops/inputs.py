"""How ops hand tensors to kernels: which need copying first, and whether autograd must know."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether a result of these tensors gets a gradient.

    Where it does not, calling the kernel without an autograd node saves more time than a kernel
    takes on the few rows of a decoding step.
    """
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def as_rows(x: Tensor, raw: Any) -> Tensor:
    """x [..., C] as the rows [N, C] that the kernels `raw` read.

    The C++ kernels read rows where they are: slices of a wider buffer, or one row expanded.
    Copied is what they cannot read: elements that do not lie side by side, leading dimensions
    that are no even sequence of rows, and for Triton everything that has gaps.
    """
    if x.dim() != 2:
        x = x.reshape(1, x.numel()) if x.dim() < 2 else x.flatten(0, -2)
    if x.is_contiguous() or (_reads_strides(raw) and x.stride(1) == 1):
        return x
    return x.contiguous()


def as_heads(x: Tensor, raw: Any) -> Tensor:
    """x [T, H, D] as the kernels `raw` read it: in place where channels lie side by side."""
    if x.is_contiguous() or (_reads_strides(raw) and x.stride(2) == 1):
        return x
    return x.contiguous()


def _reads_strides(raw: Any) -> bool:
    """A property of the kernels of an op in `cpp`; the Triton modules do not have it."""
    return getattr(raw, "READS_STRIDES", False)

"""Tables of addresses: one launch for all tensors of a model, wherever each of them lies."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

# Elements of a tensor that one program works on; it divides 2^32.
CHUNK = 8192

# Columns of a row.
PARAMETER_AT, MEAN, SQUARE, COPY_AT, LENGTH, FIRST = (tl.constexpr(i) for i in range(6))
COLUMNS = tl.constexpr(6)


def tabulate(
    parameters: Sequence[Tensor],
    means: Sequence[Tensor],
    squares: Sequence[Tensor],
    copies: Sequence[Tensor | None],
) -> tuple[Tensor, Tensor]:
    """Where tensors are, and which of them each program works on.

    Args:
        parameters, means, squares, copies: one for each tensor, all contiguous and with addresses
            that are multiples of 16.

    Returns:
        rows [N, 6], int64: addresses of parameter, mean, square and copy, the number of elements,
        and the first chunk; the owner of each chunk [chunks], int32. Both on the CPU.
    """
    rows, owners, first = [], [], 0
    for index, tensors in enumerate(zip(parameters, means, squares, copies, strict=True)):
        length = tensors[0].numel()
        chunks = triton.cdiv(length, CHUNK)
        rows.append([*addresses(tensors), length, first])
        owners.append(torch.full((chunks,), index, dtype=torch.int32))
        first += chunks
    return torch.tensor(rows, dtype=torch.int64), torch.cat(owners)


def addresses(tensors: Sequence[Tensor | None]) -> list[int]:
    """The address of each tensor, 0 for None.

    Raises:
        ValueError: a tensor that the kernels cannot read.
    """
    found = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
    if any(address % 16 for address in found):
        raise ValueError("optimizer: expected tensors that begin at multiples of 16 bytes")
    if not all(tensor is None or tensor.is_contiguous() for tensor in tensors):
        raise ValueError("optimizer: expected contiguous tensors")
    return found


@triton.jit
def pointer(address, dtype: tl.constexpr, VECTOR: tl.constexpr):
    """The address, a multiple of 16, of elements of `dtype`, to be read VECTOR at a time.

    The compiler takes the widest access that it knows to be aligned. Beside fp32, bf16 is read in
    halves of that: then each thread has the same elements of both, and none go through shared
    memory to find the others.
    """
    return tl.multiple_of(
        address.to(tl.pointer_type(dtype)), VECTOR * dtype.primitive_bitwidth // 8
    )

"""Weights in the dtype of the arithmetic: copies that are kept beside wider weights.

Training in bf16 keeps its weights in fp32, and every layer reads them in bf16. Converting them in
each pass costs more traffic than the optimizer's writing the copy while it holds the new weight
anyway. The copy hangs on the weight itself; what else writes the weight is noticed by PyTorch's
count of writes, and the copy is made again, in the same memory.

PyTorch does not count what is written through `weight.data`: after that, call `refresh_copies`
with `changed=True`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

_ATTRIBUTE = "_working_copy"


class _Copy:
    """A copy, and which state of which memory it is a copy of.

    A deep copy or a pickle of the weight has none: it would follow the wrong weight.
    """

    __slots__ = ("address", "tensor", "version")

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        with torch.inference_mode(False), torch.no_grad():
            self.tensor = torch.empty_like(weight, dtype=dtype, requires_grad=False)
        self.update(weight)

    def update(self, weight: Tensor) -> None:
        with torch.no_grad():
            self.tensor.copy_(weight)
        self.mark(weight)

    def mark(self, weight: Tensor) -> None:
        """The copy is that of the weight as it is now."""
        self.version, self.address = weight._version, weight.data_ptr()

    def is_current(self, weight: Tensor) -> bool:
        return self.version == weight._version and self.address == weight.data_ptr()

    def fits(self, weight: Tensor) -> bool:
        """Whether the weight, which may have moved, can be copied to the same memory."""
        copy = self.tensor
        same_place = copy.device == weight.device and copy.shape == weight.shape
        return same_place and copy.stride() == weight.stride()

    def __deepcopy__(self, memo: Any) -> None:
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


class _Narrowed(torch.autograd.Function):
    """weight -> its copy; the gradient comes back in the weight's dtype."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, copy: Tensor) -> Tensor:
        ctx.dtype = weight.dtype
        return copy.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.to(ctx.dtype), None


def working(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """`weight.to(dtype)`: the weight itself, its copy where one is kept, else a new tensor.

    Where the weight gets a gradient (outside `torch.no_grad` and `autograd.Function`), the result
    is differentiable, and its gradient reaches the weight as with `.to`. It must not be written.
    """
    if weight.dtype is dtype:
        return weight
    if torch.compiler.is_compiling():
        return weight.to(dtype)
    copy = getattr(weight, _ATTRIBUTE, None)
    if copy is None or copy.tensor.dtype is not dtype:
        return weight.to(dtype)
    if copy.version != weight._version or copy.address != weight.data_ptr():
        copy = _renewed(weight, copy)
    if weight.requires_grad and torch.is_grad_enabled():
        return _Narrowed.apply(weight, copy.tensor)
    return copy.tensor


def keep_copies(parameters: Iterable[Tensor], dtype: torch.dtype) -> None:
    """Keep a copy in `dtype` beside each of these weights that is wider; a weight that has one in
    another dtype loses that, so that copies in the dtype of the weights give their memory back.

    Raises:
        ValueError: a weight made under `torch.inference_mode`, whose writes PyTorch does not count.
    """
    for weight in parameters:
        if weight.is_inference():
            raise ValueError("keep_copies: expected weights made outside torch.inference_mode")
        wider = weight.is_floating_point() and weight.element_size() > dtype.itemsize
        copy = getattr(weight, _ATTRIBUTE, None)
        if not wider:
            _attach(weight, None)
        elif copy is None or copy.tensor.dtype is not dtype:
            _attach(weight, _Copy(weight, dtype))


def narrow_frozen(parameters: Iterable[Tensor], dtype: torch.dtype) -> None:
    """Keep weights that nothing trains in `dtype` alone, where that holds every one exactly: those
    of a model that was stored in it."""
    for weight in parameters:
        if weight.requires_grad or not weight.is_floating_point():
            continue
        narrow = weight.detach().to(dtype)
        if narrow.element_size() < weight.element_size() and torch.equal(
            narrow.to(weight.dtype), weight
        ):
            weight.data = narrow


def refresh_copies(parameters: Iterable[Tensor], changed: bool = False) -> None:
    """Bring copies up to date where they lie: for readers that go by address, as CUDA graphs do.

    Args:
        parameters: weights, with or without copies.
        changed: the weights were written in a way that PyTorch does not count.
    """
    for weight in parameters:
        copy = getattr(weight, _ATTRIBUTE, None)
        if copy is not None and (changed or not copy.is_current(weight)):
            _renewed(weight, copy)


def copy_of(weight: Tensor) -> Tensor | None:
    """The copy that is kept beside a weight, up to date, for who will write both; or None."""
    copy = getattr(weight, _ATTRIBUTE, None)
    if copy is None:
        return None
    return (copy if copy.is_current(weight) else _renewed(weight, copy)).tensor


def mark_written(parameters: Iterable[Tensor]) -> None:
    """Say that a kernel, unseen by PyTorch, has written these weights and their copies alike."""
    parameters = list(parameters)
    copies = [getattr(weight, _ATTRIBUTE, None) for weight in parameters]
    torch.autograd.graph.increment_version(
        [*parameters, *(copy.tensor for copy in copies if copy is not None)]
    )
    for weight, copy in zip(parameters, copies, strict=True):
        if copy is not None:
            copy.mark(weight)


def _renewed(weight: Tensor, copy: _Copy) -> _Copy:
    if copy.fits(weight):
        copy.update(weight)
        return copy
    fresh = _Copy(weight, copy.tensor.dtype)
    _attach(weight, fresh)
    return fresh


def _attach(weight: Tensor, copy: _Copy | None) -> None:
    if copy is not None:
        setattr(weight, _ATTRIBUTE, copy)
    elif hasattr(weight, _ATTRIBUTE):
        delattr(weight, _ATTRIBUTE)

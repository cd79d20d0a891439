"""How kernels are launched, and what a launch asks: which GPU this is, how many processors it has.

There is no autotuning: constants come from the table in `tuned/` (see configs.py), so a run
compiles the same kernels every time, never times anything, and can be captured in a CUDA graph.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import Parameter
from triton.backends.compiler import GPUTarget

# True when kernels run on CPU tensors, one numpy operation at a time (TRITON_INTERPRET=1).
INTERPRETING = tl.constexpr(triton.knobs.runtime.interpret)

_INT32_MAX = 2**31 - 1
_ROCM = torch.version.hip is not None


def target() -> GPUTarget:
    """The GPU that kernels are compiled for: ("cuda", 90, 32), ("hip", "gfx942", 64), ..."""
    if INTERPRETING.value:
        return GPUTarget("cuda", 90, 32)
    return _target_of(triton.runtime.driver.active.get_current_device())


@functools.cache
def _target_of(_device: int) -> GPUTarget:
    return triton.runtime.driver.active.get_current_target()


def is_cuda(minimum_arch: int = 0) -> bool:
    """Whether kernels are compiled for an NVIDIA GPU of at least this compute capability."""
    current = target()
    return current.backend == "cuda" and int(current.arch) >= minimum_arch


@functools.cache
def num_processors(device: torch.device) -> int:
    """Streaming multiprocessors (compute units) of a device."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    # A program costs the interpreter milliseconds; meta tensors stand for an H200.
    return 2 if device.type == "cpu" else 132


class Launcher:
    """Launches kernels: `launch(kernel, grid, *args, **constants)`.

    Triton looks at every argument of every launch, binds it by name and hashes the result: 10 us
    and more on the host, as much as a small kernel takes. This keeps what Triton compiled under a
    key of its own, which says of each argument no more than Triton's choice of a kernel depends on:

    - tensors: the dtype, whether the address is a multiple of 16 bytes, and on AMD whether 32 bits
      reach all of their memory;
    - integers: whether they are 1, multiples of 16, and need 64 bits;
    - None and floats: that they are.
    """

    def __init__(self) -> None:
        self._ready: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}
        self._collected: list[Any] | None = None

    def __call__(self, kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
        """Launch a kernel.

        Args:
            kernel: a `triton.jit` function.
            grid: up to three sizes.
            args: its run-time arguments, the first of them a tensor on the current GPU.
            constants: its compile-time arguments, and num_warps, num_stages; at one place in the
                program always in the same order.
        """
        if INTERPRETING.value:
            kernel[grid](*args, **constants)
            return
        if self._collected is not None:
            self._collected.append(_run(kernel, grid, args, constants, warmup=True))
            return
        key = (id(kernel), args[0].get_device(), *_kinds(args), *constants.values())
        ready = self._ready.get(key)
        if ready is None:
            compiled = _run(kernel, grid, args, constants, warmup=False)
            names = kernel.arg_names[len(args) :]
            self._ready[key] = compiled, tuple(constants[name] for name in names)
            return
        compiled, constexprs = ready
        sizes = (*grid, 1, 1)
        compiled[sizes](*args, *constexprs)

    @contextlib.contextmanager
    def compiling(self) -> Iterator[list[Any]]:
        """Inside, launches compile and nothing runs; the list gets the compiled kernels."""
        before, self._collected = self._collected, []
        try:
            yield self._collected
        finally:
            self._collected = before


launch = Launcher()


def _run(
    kernel: Any, grid: tuple[int, ...], args: Any, constants: dict[str, Any], warmup: bool
) -> Any:
    # Fused multiply-add is asked for by name, because Triton 3.10 no longer does it by default.
    return kernel.run(*args, grid=grid, warmup=warmup, enable_fp_fusion=True, **constants)


def _kinds(args: tuple[Any, ...]) -> list[Any]:
    """What Triton's choice of a compiled kernel depends on, for each argument."""
    kinds: list[Any] = []
    for arg in args:
        kind = type(arg)
        if (kind is Tensor or kind is Parameter) and not _ROCM:
            kinds.append((arg.dtype,) if arg.data_ptr() & 15 else arg.dtype)
        elif kind is int:
            shape = (1 if arg == 1 else 0) if arg & 15 else 16
            kinds.append(shape if -_INT32_MAX <= arg <= _INT32_MAX else shape + 64)
        elif kind is float or arg is None:
            kinds.append(kind)
        elif isinstance(arg, Tensor):
            small = not _ROCM or arg.untyped_storage().size() <= _INT32_MAX
            kinds.append((arg.dtype, bool(arg.data_ptr() & 15), small))
        else:  # a tensor descriptor
            kinds.append((kind, arg.base.dtype, *arg.block_shape))
    return kinds


def on_tensor_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """Makes the first argument's GPU current: Triton launches on the current one."""

    @functools.wraps(function)
    def wrapper(first: torch.Tensor, *args: Any, **keywords: Any) -> Any:
        if not first.is_cuda or first.device.index == torch.cuda.current_device():
            return function(first, *args, **keywords)
        with torch.cuda.device(first.device):
            return function(first, *args, **keywords)

    return wrapper

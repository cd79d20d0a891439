"""What every launch asks: which GPU this is, how large a tile, how many warps.

There is no autotuning: sizes come from short rules on the shape, so a run compiles the same
kernels every time, never times anything, and can be captured in a CUDA graph.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget

# True when kernels run on CPU tensors, one numpy operation at a time (TRITON_INTERPRET=1).
INTERPRETING = tl.constexpr(triton.knobs.runtime.interpret)

# A block holds at most 1024 threads, on NVIDIA and on AMD.
_MAX_THREADS = 1024


def target() -> GPUTarget:
    """The GPU that kernels are compiled for: ("cuda", 90, 32), ("hip", "gfx942", 64), ..."""
    if INTERPRETING.value:
        return GPUTarget("cuda", 90, 32)
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


def num_warps(elements: int, per_thread: int = 16) -> int:
    """Warps for a tile of `elements`, a power of two, with about `per_thread` in each thread."""
    lanes = target().warp_size
    return max(1, min(elements // (per_thread * lanes), _MAX_THREADS // lanes))


def schedule(warps: int, stages: int = 2) -> dict[str, Any]:
    """Compiler options of a launch: warps of a program, stages of its pipelined loops.

    Fused multiply-add is asked for by name, because Triton 3.10 no longer does it by default.
    """
    return {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}


def on_tensor_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """Makes the first argument's GPU current: Triton launches on the current one."""

    @functools.wraps(function)
    def wrapper(first: torch.Tensor, *args: Any) -> Any:
        if not first.is_cuda or first.device.index == torch.cuda.current_device():
            return function(first, *args)
        with torch.cuda.device(first.device):
            return function(first, *args)

    return wrapper

"""Which implementation serves an op, and why.

`auto` picks by device: Triton on CUDA/ROCm, C++ on the CPU, PyTorch elsewhere and for dtypes
that no kernel has. An explicit request (`use_backend`, or the environment variable
FASTLLM_BACKEND) that cannot be met raises: only `auto` chooses.
"""

from __future__ import annotations

import contextlib
import contextvars
import importlib
import importlib.util
import logging
import os
from collections.abc import Iterator
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import cpp, registered, varlen
from .tracing import traced_as_constant

OPS = (
    "rms_norm",
    "rope",
    "attention",
    "decode_attention",
    "swiglu",
    "linear_logprob",
    "pairwise_loss",
)
BACKENDS = ("torch", "cpp", "triton")
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_log = logging.getLogger("fastllm")
_requested: contextvars.ContextVar[str | None] = contextvars.ContextVar("backend", default=None)


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Serve every op inside the block with `name`: "torch", "cpp", "triton" or "auto".

    Raises:
        ValueError: an unknown name.
        RuntimeError: (from the op) a tensor that this backend cannot serve.
    """
    token = _requested.set(_checked(name, "use_backend"))
    try:
        yield
    finally:
        _requested.reset(token)


def requested() -> str:
    """The backend asked for by `use_backend`, else by FASTLLM_BACKEND, else "auto"."""
    name = _requested.get()
    return name if name is not None else _from_environment()


def kernels(op: str, *tensors: Tensor | None) -> Any | None:
    """The raw kernels of `op` for these tensors, or None where PyTorch serves.

    The result has the functions of `kernels/<op>.py` (`forward`, `backward`, ...).

    Raises:
        RuntimeError: an explicitly requested backend cannot serve these tensors.
    """
    first = tensors[0]
    assert first is not None
    device = first.device
    for tensor in tensors:
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{op}: all tensors must be on {device}, found one on {tensor.device}")
    if torch.compiler.is_compiling():
        return _registered(op, device.type, first.dtype)
    return _kernels(op, requested(), device.type, first.dtype)


def kernels_for(op: str, device: str, dtype: torch.dtype) -> Any | None:
    """The same for tensors of a kind that are still to come."""
    return _kernels(op, requested(), device, dtype)


@cache
def _kernels(op: str, name: str, device: str, dtype: torch.dtype) -> Any | None:
    backend = _choose(name, device, dtype)
    if backend == "torch":
        return None
    return getattr(cpp, op) if backend == "cpp" else _triton_module(op)


def _registered(op: str, device: str, dtype: torch.dtype) -> Any | None:
    """The same as operators that the compiler knows."""
    backend = _serving(op, device, dtype)
    if backend == "torch":
        return None
    if backend == "cpp":
        return registered.cpp_attention if op == "attention" else getattr(cpp, op)
    return getattr(registered, op)


@traced_as_constant
def _serving(op: str, device: str, dtype: torch.dtype) -> str:
    """Which backend serves; a compiled function keeps the one that it was compiled with."""
    backend = _choose(requested(), device, dtype)
    if backend == "triton":
        registered.register(op)
    if backend == "cpp" and op == "attention":
        registered.register("cpp_attention")
    return backend


def report() -> dict[str, dict[str, str]]:
    """What serves each op on each device here, and why.

    Returns:
        ``{op: {device: "backend: reason"}}`` for the devices of this machine.
    """
    devices = ["cpu"]
    devices += ["cuda"] if torch.cuda.is_available() else []
    devices += ["mps"] if torch.backends.mps.is_available() else []
    found = {op: {device: _explain(device) for device in devices} for op in OPS}
    if varlen.requested() and "cuda" in devices:
        found["attention"]["cuda"] = varlen.explain()
    return found


def _explain(device: str) -> str:
    name = requested()
    asked = "" if name == "auto" else f" (requested: {name})"
    try:
        backend = _choose(name, device, torch.float32)
    except RuntimeError as error:
        return f"none{asked}: {error}"
    return f"{backend}{asked}: {_reason(backend, device)}"


def _reason(backend: str, device: str) -> str:
    match backend:
        case "cpp":
            return cpp.reason()
        case "triton":
            return _triton_status(device)[1]
        case _ if device == "cpu":
            return f"C++: {cpp.reason()}"
        case _ if device == "cuda":
            return f"Triton: {_triton_status(device)[1]}"
        case _:
            return f"no kernels for {device}"


@cache
def _choose(name: str, device: str, dtype: torch.dtype) -> str:
    if name == "torch":
        return "torch"
    if name == "auto":
        backend = _automatic(device, dtype)
        _log.debug("ops on %s %s: %s (%s)", device, dtype, backend, _reason(backend, device))
        return backend
    problem = _cannot(name, device, dtype)
    if problem:
        raise RuntimeError(f"backend {name!r} was requested but cannot serve: {problem}")
    return name


def _automatic(device: str, dtype: torch.dtype) -> str:
    natural = {"cpu": "cpp", "cuda": "triton"}.get(device)
    return "torch" if natural is None or _cannot(natural, device, dtype) else natural


def _cannot(backend: str, device: str, dtype: torch.dtype) -> str | None:
    """Why `backend` cannot serve tensors of this device and dtype, or None."""
    if dtype not in KERNEL_DTYPES:
        return f"its kernels take float32, bfloat16 and float16, found {dtype}"
    if backend == "cpp":
        if device != "cpu":
            return f"the C++ kernels run on the CPU, found a tensor on {device}"
        return None if cpp.available() else cpp.reason()
    usable, reason = _triton_status(device)
    return None if usable else reason


@cache
def _triton_status(device: str) -> tuple[bool, str]:
    if importlib.util.find_spec("triton") is None:
        return False, "the package triton is not installed"
    if device == "cuda":
        return True, f"Triton kernels on {torch.cuda.get_device_name()}"
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return True, "Triton kernels under the interpreter (TRITON_INTERPRET=1: for tests, slow)"
    return False, f"Triton needs a CUDA or ROCm device (or TRITON_INTERPRET=1), found {device}"


@cache
def _triton_module(op: str) -> ModuleType:
    return importlib.import_module(f"fastllm.kernels.{op}")


def _from_environment() -> str:
    name = os.environ.get("FASTLLM_BACKEND")
    return "auto" if name is None else _checked(name, "FASTLLM_BACKEND")


def _checked(name: str, source: str) -> str:
    if name not in (*BACKENDS, "auto"):
        raise ValueError(f"{source}: expected one of {', '.join(BACKENDS)}, auto; found {name!r}")
    return name

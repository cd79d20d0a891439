"""Attention by PyTorch's own `varlen_attn`, where it is asked for.

The kernels behind it (FlashAttention-2; 3 or 4 where their packages are installed and activated)
know neither shared prefixes nor selected queries, so ours serve unless FASTLLM_ATTENTION says
otherwise: "varlen", or "varlen:FA3" and "varlen:FA4" to activate an implementation first.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..layout import NO_PREFIX, PackedLayout
from .tracing import traced_as_constant

VARIABLE = "FASTLLM_ATTENTION"
_CHOICES = ("auto", "varlen", "varlen:FA3", "varlen:FA4")
_LARGEST_HEAD = 256


def requested() -> bool:
    """Whether FASTLLM_ATTENTION asks for `varlen_attn`.

    Raises:
        ValueError: it has a value that is no choice.
    """
    return _choice() != "auto"


def explain() -> str:
    """What serves attention on CUDA, as far as it can be said without a batch."""
    problem = _missing()
    serves = f"torch varlen_attn (requested: {VARIABLE}={_choice()})"
    return serves if problem is None else f"none ({VARIABLE}={_choice()}): {problem}"


def attend(
    q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, scale: float, window: int | None
) -> Tensor:
    """`attention` by PyTorch, differentiable.

    Raises:
        RuntimeError: it cannot serve this batch here, and why.
    """
    problem = _missing() or _unfit(q, k, layout)
    if problem is not None:
        raise RuntimeError(f"attention: {VARIABLE}={_choice()} was requested, but {problem}")
    _activate(_choice().partition(":")[2])
    longest = max(layout.lengths, default=0)
    grouped = {"enable_gqa": True} if q.shape[1] != k.shape[1] else {}
    return _function()(
        q,
        k,
        v,
        layout.starts,
        layout.starts,
        longest,
        longest,
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),
        **grouped,
    )


def _unfit(q: Tensor, k: Tensor, layout: PackedLayout) -> str | None:
    """Why `varlen_attn` cannot serve these tensors, or None."""
    if any(prefix != NO_PREFIX for prefix in layout.prefix_of):
        return "it knows no shared prefixes, and segments of this batch continue others"
    if layout.num_queries != layout.total_tokens:
        return f"only {layout.num_queries} of {layout.total_tokens} rows have a query"
    if q.device.type != "cuda":
        return f"it runs on CUDA, found tensors on {q.device}"
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"it takes bfloat16 and float16, found {q.dtype}"
    if q.shape[2] > _LARGEST_HEAD or q.shape[2] % 8:
        return f"it takes heads of multiples of 8 up to {_LARGEST_HEAD}, found {q.shape[2]}"
    if q.shape[1] != k.shape[1] and "enable_gqa" not in _parameters():
        return f"that of torch {torch.__version__} takes no grouped heads"
    return None


def _missing() -> str | None:
    """Why there is no `varlen_attn` to call, or None."""
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return f"torch {torch.__version__} has no torch.nn.attention.varlen"
    if "window_size" not in _parameters():
        return f"varlen_attn of torch {torch.__version__} takes no window_size"
    return None


@cache
def _parameters() -> frozenset[str]:
    return frozenset(inspect.signature(_function()).parameters)


@cache
def _function() -> Any:
    return importlib.import_module("torch.nn.attention.varlen").varlen_attn


@cache
def _activate(implementation: str) -> None:
    if not implementation:
        return
    attention = importlib.import_module("torch.nn.attention")
    try:
        attention.activate_flash_attention_impl(implementation)
    except (ImportError, AttributeError, RuntimeError, ValueError) as error:
        raise RuntimeError(
            f"attention: {VARIABLE}={_choice()} was requested, but {implementation} "
            f"cannot be activated: {error}"
        ) from error


@traced_as_constant
def _choice() -> str:
    choice = os.environ.get(VARIABLE, "auto")
    if choice not in _CHOICES:
        raise ValueError(f"{VARIABLE}: expected one of {', '.join(_CHOICES)}; found {choice!r}")
    return choice

"""Who takes part: fastllm, and its peers with their defaults and at their best."""

from __future__ import annotations

from typing import Any

from ..peers.environment import LLAMA
from ..records import OURS as NAME
from .workers import OURS, PEER, Contender

FLOAT, BFLOAT = "float32", "bfloat16"


def fastllm(
    name: str = NAME,
    dtype: str = FLOAT,
    settings: dict[str, Any] | None = None,
    **more: Any,
) -> Contender:
    """This project, in fp32 or with bf16 arithmetic; `settings` as the worker reads them."""
    own = {"dtype": "bf16" if dtype == BFLOAT else "fp32", **(settings or {})}
    return Contender(name, OURS, own, **more)


def fastllm_with_glibc(dtype: str = FLOAT) -> Contender:
    """The same with the C library's own allocator settings, as TRL's defaults have them."""
    return fastllm("fastllm, default allocator", dtype, keep_memory=False)


def trl_defaults(**settings: Any) -> Contender:
    """What TRL does when nothing is said about speed: bf16, activations recomputed."""
    settings = {"by": "trl", "dtype": "amp", "defaults": True, **settings}
    return Contender("trl, defaults", PEER, settings, keep_memory=False, tolerance=ROUNDED)


def trl(name: str = "trl", dtype: str = "fp32", **settings: Any) -> Contender:
    """TRL tuned; `dtype` fp32 or amp."""
    return _peer(name, "trl", dtype, settings)


def loop(name: str = "transformers", dtype: str = "fp32", **settings: Any) -> Contender:
    """A plain loop; `dtype` fp32, amp or bf16."""
    return _peer(name, "transformers", dtype, settings)


def llama(weights: str) -> Contender:
    """llama.cpp with weights in one of its formats: f32, bf16 or q8_0; its cache is fp16."""
    settings = {"by": "llama.cpp", "weights": weights}
    tolerance = HALF if weights == "f32" else None
    return Contender(f"llama.cpp {weights}", PEER, settings, tolerance=tolerance, package=LLAMA)


# What a loss may be off by where the arithmetic is bf16, and a log-probability where keys and
# values are fp16.
ROUNDED, HALF = 2e-2, 5e-3


def _peer(name: str, by: str, dtype: str, settings: dict[str, Any]) -> Contender:
    return Contender(name, PEER, {"by": by, "dtype": dtype, **settings})

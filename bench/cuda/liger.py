"""Liger-Kernel's ops as contenders, where it is installed."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .contest import Contender
from .exact import Inputs

NAME = "Liger"


def installed() -> bool:
    """Whether it can be imported."""
    return importlib.util.find_spec("liger_kernel") is not None


def add_rms_norm() -> list[Contender]:
    """The norm with the residual add fused in."""

    def function(x: Tensor, weight: Tensor, residual: Tensor) -> Any:
        apply = _function("fused_add_rms_norm", "LigerFusedAddRMSNormFunction")
        return apply(x, residual, weight, 1e-6, 0.0, "llama", False)

    return _contender(function)


def swiglu() -> list[Contender]:
    """Gate and up as two tensors, which is what it takes."""

    def function(gate: Tensor) -> Tensor:
        apply = _function("swiglu", "LigerSiLUMulFunction")
        first, second = (part.contiguous() for part in gate.chunk(2, dim=-1))
        return apply(first, second)

    return _contender(function, equal=False)


def rope() -> list[Contender]:
    """[B, H, T, D], and in place."""

    def function(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
        return _function("rope", "LigerRopeFunction")(q, k, cos, sin)

    def prepare(inputs: Inputs) -> Inputs:
        tables = {n: torch.cat([inputs[n]] * 2, -1)[None].contiguous() for n in ("cos", "sin")}
        return {name: lay(inputs[name]).contiguous() for name in ("q", "k")} | tables

    def lay(tensor: Tensor) -> Tensor:
        return tensor.transpose(0, 1)[None]

    return _contender(function, prepare=prepare, lay=lay, unlay=lambda t: t[0].transpose(0, 1))


def linear_cross_entropy() -> list[Contender]:
    """The chunked head."""

    def function(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        apply = _function("fused_linear_cross_entropy", "LigerFusedLinearCrossEntropyFunction")
        found = apply(hidden, weight, targets, None, None, -100, 0.0, 0.0, "sum")
        return found[0] if isinstance(found, tuple) else found

    return _contender(function)


def _contender(function: Callable[..., Any], **options: Any) -> list[Contender]:
    return [Contender(NAME, function, **options)] if installed() else []


def _function(module: str, name: str) -> Callable[..., Any]:
    return getattr(importlib.import_module(f"liger_kernel.ops.{module}"), name).apply

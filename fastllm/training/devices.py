"""Where a run computes, and in which dtype."""

from __future__ import annotations

import logging
import os

import torch

from ..ops import cpp
from . import distributed
from .config import TrainingConfig

_log = logging.getLogger("fastllm")


def pick_device(config: TrainingConfig) -> torch.device:
    """The device a config asks for; auto is CUDA, then MPS, then the CPU.

    Raises:
        ValueError: a device that this machine does not have.
    """
    if config.use_cpu:
        return torch.device("cpu")
    if config.device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", distributed.local_rank())
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    device = torch.device(config.device)
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available.get(device.type, True):
        raise ValueError(f"device {config.device!r} was requested, but this machine has none")
    return device


def keep_memory(device: torch.device) -> None:
    """On the CPU, let the process keep the memory of one step for the next one.

    FASTLLM_KEEP_MEMORY=0 leaves the allocator alone: for programs that train and then need the
    memory for something else.
    """
    if device.type != "cpu" or os.environ.get("FASTLLM_KEEP_MEMORY") == "0":
        return
    if cpp.keep_memory():
        _log.info("freed memory is kept for the next step (FASTLLM_KEEP_MEMORY=0: give it back)")


def exact_sums(device: torch.device) -> None:
    """On a GPU, let matrix products of bf16 and fp16 form their sums in fp32 alone: PyTorch allows
    parts of a sum to be added up in the narrow type."""
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


def pick_dtype(config: TrainingConfig, device: torch.device) -> torch.dtype:
    """The dtype of a step's arithmetic; see `TrainingConfig.dtype`."""
    name = "fp16" if config.fp16 else "bf16" if config.bf16 else config.dtype
    if name == "auto":
        natural = device.type == "cuda" and torch.cuda.is_bf16_supported()
        name = "bf16" if natural and config.bf16 is not False else "fp32"
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]

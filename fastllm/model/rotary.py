"""Tables of rotary angles, grown on demand."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .config import ModelConfig


class RotaryTable:
    """cos and sin for every position up to the longest sequence seen so far."""

    def __init__(self, config: ModelConfig) -> None:
        self._config = config
        self._tables: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def __call__(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Tables for positions 0..length-1 or more: cos, sin [P, D/2], fp32."""
        tables = self._tables.get(device)
        if tables is None or tables[0].shape[0] < length:
            size = max(256, 1 << (length - 1).bit_length())
            positions = torch.arange(size, dtype=torch.float32, device=device)
            angles = torch.outer(positions, _frequencies(self._config).to(device))
            tables = self._tables[device] = (angles.cos(), angles.sin())
        return tables


def _frequencies(config: ModelConfig) -> Tensor:
    """Angle per position of each channel pair [D/2], with the checkpoint's scaling rule."""
    # On the CPU whatever the default device is: a model may be built on the meta device.
    channels = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu")
    exponents = channels / config.head_dim
    frequencies = 1.0 / (config.rope_theta**exponents)
    scaling = config.rope_scaling or {}
    match config.rope_type:
        case "linear":
            return frequencies / scaling["factor"]
        case "llama3":
            return _llama3(frequencies, scaling)
        case _:
            return frequencies


def _llama3(frequencies: Tensor, scaling: dict[str, float]) -> Tensor:
    """Llama 3.1: long wavelengths are stretched, short ones kept, those between blended."""
    old_context = scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = old_context * frequencies / (2 * math.pi)
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return keep * frequencies + (1 - keep) * frequencies / scaling["factor"]

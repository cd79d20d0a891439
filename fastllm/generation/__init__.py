"""Rollouts and text generation with the weights and the kernels of training."""

from .engine import Completion, generate
from .sampling import SamplingParams

__all__ = ["Completion", "SamplingParams", "generate"]

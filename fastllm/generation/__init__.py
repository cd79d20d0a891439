"""Rollouts and text generation with the weights and the kernels of training."""

from .engine import Engine
from .generate import generate
from .requests import Completion, Output, Stats
from .sampling import SamplingParams

__all__ = ["Completion", "Engine", "Output", "SamplingParams", "Stats", "generate"]

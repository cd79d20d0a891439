"""Models: a causal transformer and a reward model on one trunk."""

from .config import ModelConfig
from .reward import RewardModel
from .transformer import Transformer

__all__ = ["ModelConfig", "RewardModel", "Transformer"]

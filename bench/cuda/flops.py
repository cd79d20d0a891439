"""Operations and bytes of a model, counted from its configuration."""

from __future__ import annotations

from collections.abc import Sequence

from fastllm import ModelConfig


def layer_weights(config: ModelConfig) -> int:
    """Numbers in the matrices of a layer."""
    heads = config.num_attention_heads + config.num_key_value_heads
    attention = 2 * config.hidden_size * heads * config.head_dim
    return attention + 3 * config.hidden_size * config.intermediate_size


def head_weights(config: ModelConfig) -> int:
    """Numbers in the matrix from hidden states to the vocabulary."""
    return config.hidden_size * config.vocab_size


def training(config: ModelConfig, lengths: Sequence[int]) -> float:
    """Of a step of SFT, forward and backward; what is recomputed is not counted."""
    tokens = sum(lengths)
    numbers = config.num_hidden_layers * layer_weights(config) + head_weights(config)
    pairs = sum(length * (length + 1) / 2 for length in lengths)
    width = config.num_attention_heads * config.head_dim
    # Attention has two products forward and five backward.
    return 6.0 * numbers * tokens + 14.0 * pairs * width * config.num_hidden_layers


def decoding_bytes(config: ModelConfig, batch: int, cached: float, itemsize: int = 2) -> float:
    """What a token step reads: all weights, and the keys and values of `cached` tokens each."""
    numbers = config.num_hidden_layers * layer_weights(config) + head_weights(config)
    width = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return float(itemsize) * (numbers + batch * cached * width)

"""Bytes that a pass keeps for its backward pass, part by part of a model.

Widths are those of model/transformer.py and model/fused.py: T rows of a layer's input, N rows that
the last layer computes, e bytes of a number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..model.lora import LoRALinear
from ..model.reward import RewardModel
from ..ops.logit_chunks import rows_at_once


@dataclass(frozen=True)
class PassSize:
    """How large a pass is."""

    tokens: int
    """Packed rows (T)."""
    rows: int
    """Rows whose hidden state is read (N)."""
    targets: int
    """Targets of the vocabulary head (M); 0 without one."""


def of_layer(model: Any, index: int, size: PassSize, recomputed: bool = False) -> int:
    """What layer `index` keeps; where it is recomputed, its input alone."""
    config, e = model.config, _itemsize(model)
    width = config.hidden_size
    if recomputed:
        return (1 if index == 0 else 2) * size.tokens * width * e
    layer = model.model.layers[index]
    every, asked = size.tokens, _rows(model, index, size)
    query, key = _head_widths(config)
    # The residual stream before each norm and the two scales, queries, keys, values, what
    # attention made of them and its log-sum-exp, gate and up.
    numbers = (every + asked) * width + 2 * asked * query + 2 * every * key
    numbers += 2 * asked * config.intermediate_size
    wide = every + asked + asked * config.num_attention_heads
    if is_fused(layer):
        return numbers * e + 4 * wide
    # The normalised rows and the product of SwiGLU, which the fused halves compute again.
    numbers += (every + asked) * width + asked * config.intermediate_size
    numbers += asked * width if asked != every else 0
    if hasattr(layer.self_attn, "q_norm"):
        numbers += asked * query + every * key
        wide += asked * config.num_attention_heads + every * config.num_key_value_heads
    masks = 0
    for module in layer.modules():
        if isinstance(module, LoRALinear):
            rows = every if module in layer.self_attn.projections()[1:3] else asked
            numbers += rows * module.lora_A.out_features
            masks += rows * module.in_features if module.dropout.p > 0 else 0
    return numbers * e + 4 * wide + masks


def is_fused(layer: Any) -> bool:
    """Whether a layer's halves are single autograd nodes; see model/fused.py."""
    return layer._is_plain()


def of_stream(model: Any, size: PassSize) -> int:
    """The residual stream and its gradient."""
    return 2 * size.tokens * model.config.hidden_size * _itemsize(model)


def of_embedding(model: Any, size: PassSize) -> int:
    """The token ids, and the rows' indices."""
    return 8 * (size.tokens + size.rows)


def of_end(model: Any, size: PassSize) -> int:
    """The final norm's input, its result, and their scale; a reward head's fp32 rows."""
    rows, width, e = size.rows, model.config.hidden_size, _itemsize(model)
    wide = 4 * rows * width if isinstance(model, RewardModel) and e != 4 else 0
    return 2 * rows * width * e + 4 * rows + wide


def of_head(model: Any, size: PassSize) -> tuple[int, int]:
    """Buffers of the head while it computes, and its weight's gradient, which it makes then."""
    if isinstance(model, RewardModel):
        return 16 * size.rows, 0
    weight, e = model.lm_head.weight, _itemsize(model)
    of_logits = 2 if model.model.compute_dtype is torch.bfloat16 else 4
    rows = min(size.targets, rows_at_once(size.targets, weight.shape[0], of_logits, on_gpu=True))
    chunk = rows * weight.shape[0] * of_logits
    gradient_of_rows = size.targets * model.config.hidden_size * e
    return chunk + gradient_of_rows, weight.nbytes if weight.requires_grad else 0


def of_backward(model: Any, index: int, size: PassSize) -> int:
    """Buffers of layer `index` in its backward pass: the larger of its two halves."""
    config, e = model.config, _itemsize(model)
    every, asked = size.tokens, _rows(model, index, size)
    query, key = _head_widths(config)
    # Op by op, the product of SwiGLU was kept, and goes before the gradients of gate and up come.
    inner = (3 if is_fused(model.model.layers[index]) else 2) * config.intermediate_size
    mlp = asked * (4 * config.hidden_size + inner)
    attention = (2 * asked + 2 * every) * config.hidden_size + 2 * asked * query + 2 * every * key
    if hasattr(model.model.layers[index].self_attn, "q_norm"):
        attention += asked * query + every * key  # normalised and rotated once more
    return max(mlp, attention) * e + 4 * asked * config.num_attention_heads


def _rows(model: Any, index: int, size: PassSize) -> int:
    return size.rows if index == model.config.num_hidden_layers - 1 else size.tokens


def _head_widths(config: Any) -> tuple[int, int]:
    return (
        config.num_attention_heads * config.head_dim,
        config.num_key_value_heads * config.head_dim,
    )


def _itemsize(model: Any) -> int:
    dtype = model.model.compute_dtype or next(model.parameters()).dtype
    return torch.empty(0, dtype=dtype).element_size()

"""What the C++ ops return, for torch.compile and for checks without data.

The arguments are those of the ops in `cpp`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def register_shapes() -> None:
    """Tell PyTorch the shapes and dtypes of the results; the ops must be registered."""

    def float32(like: Tensor, *shape: int) -> Tensor:
        return like.new_empty(shape, dtype=torch.float32)

    def rms_norm_forward(x, weight, eps, residual):
        h = x.new_empty((0, 0) if residual is None else x.shape)
        return x.new_empty(x.shape), h, float32(x, x.shape[0])

    def rms_norm_backward(dy, dh, h, weight, rstd, weight_grad):
        return h.new_empty(h.shape), float32(h, h.shape[1] if weight_grad else 0)

    def attention_forward(q, *_arguments):
        return q.new_empty(q.shape), float32(q, *q.shape[:2])

    def linear_logprob_forward(logits, *_arguments):
        return tuple(float32(logits, logits.shape[0]) for _ in range(3))

    def sample(logits, *_arguments):
        rows = logits.shape[0]
        return (
            logits.new_empty(rows, dtype=torch.int64),
            float32(logits, rows),
            float32(logits, rows),
        )

    def pairwise_loss_forward(chosen, *_arguments):
        shape = chosen.shape
        return float32(chosen), float32(chosen, *shape), float32(chosen, *shape)

    shapes: dict[str, Callable[..., Any]] = {
        "matmul_": lambda *_: None,
        "rms_norm_forward": rms_norm_forward,
        "rms_norm_backward": rms_norm_backward,
        "rope_forward": lambda q, k, *_: (q.new_empty(q.shape), k.new_empty(k.shape)),
        "rope_into_": lambda *_: None,
        "swiglu_forward": lambda gate, _up: gate.new_empty(gate.shape),
        "swiglu_backward": lambda _dout, gate, up: (
            gate.new_empty(gate.shape),
            up.new_empty(up.shape),
        ),
        "swiglu_backward_into_": lambda *_: None,
        "attention_forward": attention_forward,
        "attention_backward_into_": lambda *_: None,
        "decode_attention_forward": lambda q, *_: q.new_empty(q.shape),
        "linear_logprob_forward": linear_logprob_forward,
        "linear_logprob_backward_": lambda *_: None,
        "sample": sample,
        "pairwise_loss_forward": pairwise_loss_forward,
        "gradient_norm": lambda gradients: gradients[0].new_empty((), dtype=torch.float64),
        "adamw_": lambda *_: None,
    }
    for name, shape in shapes.items():
        torch.library.register_fake(f"fastllm::{name}", shape)

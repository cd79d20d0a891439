"""The kernels as torch.compile sees them: registered operators with known shapes.

In eager mode the ops call the kernels directly, because PyTorch's dispatcher costs as much as a
small kernel takes. While torch.compile traces, `backend.kernels` gives the classes below in their
place: each function is an operator of `torch.ops.fastllm_triton`, which the compiler does not look
into. The C++ kernels are operators anyway (see cpp.py), but for attention, whose layout is no
tensor: on either backend it goes through the compiler as a ticket (see layout.py).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..layout import PackedLayout
from . import cpp

_LIBRARY = torch.library.Library("fastllm_triton", "DEF")


def _operator(name: str) -> Any:
    """Calls `torch.ops.fastllm_triton.<name>`; a layout passes as its ticket."""

    def call(*arguments: Any, **options: Any) -> Any:
        given = (a.ticket if isinstance(a, PackedLayout) else a for a in arguments)
        return getattr(torch.ops.fastllm_triton, name)(*given, **options)

    return staticmethod(call)


class rms_norm:
    READS_STRIDES = CASTS_WEIGHTS = True
    forward, backward = _operator("rms_norm_forward"), _operator("rms_norm_backward")


class rope:
    READS_STRIDES = NORMS = True
    forward, backward = _operator("rope_forward"), _operator("rope_backward")
    forward_into_cache = _operator("rope_forward_into_cache")


class swiglu:
    READS_STRIDES = True
    forward, backward = _operator("swiglu_forward"), _operator("swiglu_backward")
    forward_fused = _operator("swiglu_forward_fused")
    backward_fused = _operator("swiglu_backward_fused")


class attention:
    """On the Triton kernels."""

    READS_STRIDES = True
    forward, backward = _operator("attention_forward"), _operator("attention_backward")


class cpp_attention:
    """On the C++ kernels."""

    READS_STRIDES = True
    forward, backward = _operator("cpp_attention_forward"), _operator("cpp_attention_backward")


class decode_attention:
    READS_STRIDES = True
    forward = _operator("decode_attention_forward")


class linear_logprob:
    IN_PLACE = True
    forward, backward_ = _operator("linear_logprob_forward"), _operator("linear_logprob_backward_")
    forward_backward_ = _operator("linear_logprob_forward_backward_")
    scale_ = _operator("linear_logprob_scale_")


class pairwise_loss:
    forward = _operator("pairwise_loss_forward")


class reward_loss:
    forward, backward = _operator("reward_loss_forward"), _operator("reward_loss_backward")


# -- what each operator returns --------------------------------------------------------------------


def _float32(like: Tensor, *shape: Any) -> Tensor:
    return like.new_empty(shape, dtype=torch.float32)


def _new(*like: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in like)


def _rms_norm_forward(x, weight, eps, residual):
    h = x.new_empty(x.shape if residual is not None else (0, x.shape[1]))
    return x.new_empty(x.shape), h, _float32(x, x.shape[0])


def _rms_norm_backward(dy, dh, h, weight, rstd, weight_grad):
    return h.new_empty(h.shape), _float32(h, h.shape[1] if weight_grad else 0)


def _rope_backward(dq, dk, q, k, cos, sin, p, kp, q_norm, k_norm, eps, weight_grad):
    return *_new(q, k), _float32(q, 2 if weight_grad else 0, q.shape[2])


def _per_row(logits, *_arguments, **_options):
    return tuple(_float32(logits, logits.shape[0]) for _ in range(3))


def _pairwise_loss_forward(chosen, *_arguments):
    return _float32(chosen), *(_float32(chosen, chosen.shape[0]) for _ in range(2))


def _reward_loss_forward(hidden, *_arguments):
    rows = hidden.shape[0]
    return _float32(hidden), _float32(hidden, rows), _float32(hidden, 5), _float32(hidden, rows)


def _reward_loss_backward(dloss, dscores, hidden, weight, needs_weight):
    channels = hidden.shape[1]
    return hidden.new_empty(hidden.shape), _float32(hidden, channels if needs_weight else 0)


_SHAPES: dict[str, tuple[Callable[..., Any], tuple[str, ...]]] = {
    "rms_norm_forward": (_rms_norm_forward, ()),
    "rms_norm_backward": (_rms_norm_backward, ()),
    "rope_forward": (lambda q, k, *_, **__: _new(q, k), ()),
    "rope_backward": (_rope_backward, ()),
    "rope_forward_into_cache": (lambda q, *_: q.new_empty(q.shape), ("keys", "values")),
    "swiglu_forward": (lambda gate, up: gate.new_empty(gate.shape), ()),
    "swiglu_forward_fused": (lambda x: x.new_empty(x.shape[0], x.shape[1] // 2), ()),
    "swiglu_backward": (lambda dout, gate, up: _new(gate, up), ()),
    "swiglu_backward_fused": (lambda dout, gate_up: gate_up.new_empty(gate_up.shape), ()),
    "decode_attention_forward": (lambda q, *_: q.new_empty(q.shape), ()),
    "linear_logprob_forward": (_per_row, ()),
    "linear_logprob_backward_": (lambda *_, **__: None, ("logits",)),
    "linear_logprob_forward_backward_": (_per_row, ("logits",)),
    "linear_logprob_scale_": (lambda x, factor: None, ("x",)),
    "pairwise_loss_forward": (_pairwise_loss_forward, ()),
    "reward_loss_forward": (_reward_loss_forward, ()),
    "reward_loss_backward": (_reward_loss_backward, ()),
}
"""Operator -> what makes results of the right shapes, and the arguments that it writes."""


# -- registration ----------------------------------------------------------------------------------


@cache
def register(op: str) -> None:
    """Make the operators of an op known to PyTorch, where the compiler is about to meet them."""
    if op in ("attention", "cpp_attention"):
        _register_attention(op)
        return
    for name, (shapes, written) in _SHAPES.items():
        if name.startswith(f"{op}_"):
            kernel = getattr(_kernels(op), name.removeprefix(f"{op}_"))
            _define(name, kernel, shapes, written)


def _define(
    name: str, kernel: Callable[..., Any], shapes: Callable[..., Any], written: tuple[str, ...]
) -> None:
    schema = torch.library.infer_schema(kernel, mutates_args=written)
    _LIBRARY.define(name + schema)
    _LIBRARY.impl(name, _without_aliases(kernel), "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastllm_triton::{name}", shapes, lib=_LIBRARY)


def _without_aliases(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """The compiler believes that no two results share memory, where the kernels may share it."""

    def wrapper(*arguments: Any, **options: Any) -> Any:
        results = kernel(*arguments, **options)
        if not isinstance(results, tuple):
            return results
        seen: set[int] = set()
        own = []
        for result in results:
            memory = result.untyped_storage().data_ptr()
            own.append(result.clone() if memory in seen else result)
            seen.add(memory)
        return tuple(own)

    return wrapper


def _register_attention(op: str) -> None:
    raw = cpp.attention if op == "cpp_attention" else _kernels(op)

    def forward(
        q: Tensor, k: Tensor, v: Tensor, ticket: Tensor, scale: float, window: int
    ) -> tuple[Tensor, Tensor]:
        return raw.forward(q, k, v, PackedLayout.of_ticket(ticket), scale, window)

    def backward(
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        ticket: Tensor,
        scale: float,
        window: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        layout = PackedLayout.of_ticket(ticket)
        return raw.backward(dout, q, k, v, out, lse, layout, scale, window)

    def forward_shapes(q: Tensor, *_arguments: Any) -> tuple[Tensor, Tensor]:
        queries, heads = q.shape[:2]
        shape = (queries, heads) if raw is cpp.attention else (heads, queries)
        return q.new_empty(q.shape), _float32(q, *shape)

    _define(f"{op}_forward", forward, forward_shapes, ())
    _define(f"{op}_backward", backward, lambda dout, q, k, v, *_: _new(q, k, v), ())


@cache
def _kernels(op: str) -> Any:
    return importlib.import_module(f"fastllm.kernels.{op}")

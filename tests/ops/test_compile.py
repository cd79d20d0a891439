"""torch.compile(fullgraph=True) goes through every op, forward and backward, on every backend.

The backend "aot_eager" traces what Inductor would compile, and needs no compiler of its own.
"""

from __future__ import annotations

import pytest
import torch

from fastllm import PackedLayout, ops

pytest.importorskip("torch._dynamo")

LAYOUT = [9, 5, 6, 4], [-1, 0, 0, -1]
TOKENS = sum(LAYOUT[0])


def layout_on(device):
    layout = PackedLayout(*LAYOUT, device=device)
    ops.prepare_layout(layout, torch.float32, 4, 2, 16)
    return layout


def cases(device):
    """Op -> (function of the tensors that are differentiated, those tensors)."""
    generator = torch.Generator().manual_seed(3)

    def random(*shape):
        return torch.randn(shape, generator=generator).to(device).requires_grad_()

    cos, sin = torch.randn(2, 64, 8, generator=generator).to(device)
    positions = torch.arange(TOKENS, dtype=torch.int32, device=device)
    targets = torch.arange(TOKENS, device=device) % 40
    pairs = torch.arange(6, device=device).view(2, 3)
    layout = layout_on(device)
    norm = torch.ones(16, device=device).requires_grad_()
    heads = random(TOKENS, 4, 16), random(TOKENS, 2, 16)
    rows, weight = random(TOKENS, 32), random(40, 32)
    return {
        "rms_norm": (ops.rms_norm, (random(7, 32), random(32))),
        "rms_norm with residual": (
            lambda x, w, r: ops.rms_norm(x, w, residual=r),
            (random(7, 32), random(32), random(7, 32)),
        ),
        "rope": (lambda q, k: ops.rope(q, k, cos, sin, positions), heads),
        "rope with norms": (
            lambda q, k, w: ops.rope(q, k, cos, sin, positions, q_norm=w, k_norm=w.clone()),
            (*heads, norm),
        ),
        "attention": (
            lambda q, k, v: ops.attention(q, k, v, layout),
            (*heads, random(TOKENS, 2, 16)),
        ),
        "swiglu": (ops.swiglu, (random(7, 32), random(7, 32))),
        "swiglu of one buffer": (ops.swiglu, (random(7, 64),)),
        "linear_logprob": (lambda h, w: ops.linear_logprob(h, w, targets), (rows, weight)),
        "linear_cross_entropy": (
            lambda h, w: ops.linear_cross_entropy(h, w, targets)[0],
            (rows, weight),
        ),
        "pairwise_loss": (ops.pairwise_loss, (random(5), random(5))),
        "reward_loss": (
            lambda h, w: ops.reward_loss(h, w, pairs[0], pairs[1])[0],
            (random(6, 32), random(1, 32)),
        ),
        "lora_linear": (
            lambda x, a, b: ops.lora_linear(x, weight.detach(), None, a, b, 2.0),
            (rows, random(4, 32), random(40, 4)),
        ),
    }


@pytest.mark.parametrize("name", list(cases("cpu")))
def test_compiles_in_one_graph(name, backend, device):
    torch._dynamo.reset()
    function, leaves = cases(device)[name]
    expected = _with_gradients(function, leaves)
    found = _with_gradients(torch.compile(function, fullgraph=True, backend="aot_eager"), leaves)
    for value, right in zip(found, expected, strict=True):
        torch.testing.assert_close(value, right, atol=1e-5, rtol=1e-4)


def _with_gradients(function, leaves):
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    gradients = [torch.ones_like(t) for t in outputs]
    return *(t.detach() for t in outputs), *torch.autograd.grad(outputs, leaves, gradients)

"""The operators that stand for the kernels while torch.compile traces."""

from __future__ import annotations

import pytest
import torch

from fastllm import PackedLayout
from fastllm.ops import OPS, registered
from fastllm.ops.registered import register

KEPT: list[PackedLayout] = []
"""A ticket does not keep its layout."""


def operators(device):
    """Operator -> its arguments."""
    generator = torch.Generator().manual_seed(1)

    def random(*shape):
        return torch.randn(shape, generator=generator).to(device)

    layout = PackedLayout([6, 3, 4], [-1, 0, 0], device=device)
    KEPT.append(layout)
    q, k, v = random(13, 4, 16), random(13, 2, 16), random(13, 2, 16)
    rows, norm, logits = random(5, 32), random(16), random(5, 40)
    out, per_row = random(13, 4, 16), random(5)
    lse = random(4, 13)
    positions = torch.arange(13, dtype=torch.int32, device=device)
    angles = random(20, 8), random(20, 8), positions
    targets = torch.arange(5, device=device)
    pairs = torch.arange(2, device=device), torch.arange(2, 4, device=device)
    one, blocks = torch.ones(2, dtype=torch.int32, device=device), random(4, 2, 16, 64)
    tables = torch.zeros(2, 1, dtype=torch.int32, device=device)
    return {
        "rms_norm_forward": (rows, random(32), 1e-6, random(5, 32)),
        "rms_norm_backward": (rows, None, random(5, 32), random(32), per_row, True),
        "rope_forward": (q, k, *angles, False, None, norm, norm.clone(), 1e-6),
        "rope_backward": (q, k, out, v, *angles, None, norm, norm.clone(), 1e-6, True),
        "rope_forward_into_cache": (
            *(q[:2], k[:2], v[:2], *angles[:2], positions[:2]),
            *(one.clone(), one.clone(), blocks, blocks.transpose(2, 3).contiguous()),
        ),
        "swiglu_forward": (rows, random(5, 32)),
        "swiglu_forward_fused": (rows,),
        "swiglu_backward": (rows, random(5, 32), random(5, 32)),
        "swiglu_backward_fused": (random(5, 16), rows),
        "attention_forward": (q, k, v, layout.ticket, 0.2, 0),
        "attention_backward": (out, q, k, v, out.clone(), lse, layout.ticket, 0.2, 0),
        "decode_attention_forward": (
            *(q[:2], blocks, blocks.transpose(2, 3).contiguous(), tables, one, tables[:, 0]),
            *(tables.clone(), one.clone(), 0.2, 0),
        ),
        "linear_logprob_forward": (logits, targets, 0.7, 0.0),
        "linear_logprob_backward_": (
            logits,
            targets,
            *(per_row.clone() for _ in range(4)),
            1.0,
            0.0,
        ),
        "linear_logprob_forward_backward_": (logits, targets, per_row, 1.0, 30.0),
        "linear_logprob_scale_": (rows, per_row[0].clone()),
        "pairwise_loss_forward": (per_row, per_row.clone(), None, 0.1),
        "reward_loss_forward": (rows, random(32), *pairs, None, 0.1),
        "reward_loss_backward": (per_row[0].clone(), per_row, rows, random(32), True),
    }


def test_every_operator_has_a_case(backend):
    attention = {"attention_forward", "attention_backward"}
    assert set(operators("cpu")) == set(registered._SHAPES) | attention


@pytest.mark.parametrize("name", sorted(operators("cpu")))
def test_operators_are_registered_right(name, backend, device):
    if backend != "triton":
        pytest.skip("the other backends have operators of their own, or none")
    arguments = operators(device)[name]
    op = next(op for op in (*OPS, "reward_loss") if name.startswith(f"{op}_"))
    register(op)
    operator = getattr(torch.ops.fastllm_triton, name).default
    results = torch.library.opcheck(operator, arguments)
    assert set(results.values()) == {"SUCCESS"}, results

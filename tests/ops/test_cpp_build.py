"""The C++ extension as a library: what it was built for, how it is chosen, what it registers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastllm.layout import PackedLayout
from fastllm.ops import cpp

ROOT = Path(__file__).resolve().parents[2]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

pytestmark = [
    pytest.mark.reference,
    pytest.mark.skipif(not cpp.available(), reason=cpp.reason()),
]

# Every kind of arithmetic that the instruction sets do differently: conversions of all bf16 and
# fp16 numbers, exp and tanh, tails of vectors, and the matrix products of attention.
CHECK_ONE_LEVEL = """
import torch
from fastllm.layout import PackedLayout
from fastllm.ops import (attention, linear, linear_logprob, rms_norm, swiglu, use_backend,
                         attention_reference, decode_attention_reference, linear_logprob_reference,
                         rms_norm_reference, swiglu_reference)
from fastllm.ops import cpp

torch.manual_seed(0)

def compare(op, reference, *inputs, **options):
    leaves = [t.clone().requires_grad_(t.is_floating_point()) for t in inputs]
    wide = [t.detach().double().requires_grad_() if t.is_floating_point() else t for t in inputs]
    with use_backend("cpp"):
        found = op(*leaves, **options)
    expected = reference(*wide, **options)
    gradient = torch.randn(expected.shape)
    found.backward(gradient)
    expected.backward(gradient.double())
    for a, b in [(found, expected), *((x.grad, y.grad) for x, y in zip(leaves, wide))]:
        if a is not None:
            torch.testing.assert_close(a.double(), b, atol=2e-5, rtol=2e-5)

for dtype in (torch.bfloat16, torch.float16):
    every = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)
    cos, sin = torch.ones(1, 1), torch.zeros(1, 1)
    same, _ = cpp.rope.forward(every.view(1, -1, 2), every.view(1, -1, 2), cos, sin,
                               torch.zeros(1, dtype=torch.int32), False)
    finite = every.isfinite()
    assert torch.equal(same.flatten()[finite], every[finite]), dtype
    wide = torch.randn(5000, dtype=torch.float64) * torch.logspace(-9, 6, 5000, dtype=torch.float64)
    x = wide.float()
    gate = torch.full_like(x, 100.0).to(dtype)
    product = cpp.swiglu.forward(gate[None], x[None].to(dtype))
    assert torch.equal(product[0], (gate.float() * x.to(dtype).float()).to(dtype)), dtype

compare(linear, torch.nn.functional.linear, torch.randn(40, 300) / 9, torch.randn(70, 300) / 9)
compare(rms_norm, rms_norm_reference, torch.randn(5, 77), torch.randn(77))
compare(swiglu, swiglu_reference, torch.randn(3, 1001) * 20, torch.randn(3, 1001))
compare(linear_logprob, linear_logprob_reference, torch.randn(9, 16), torch.randn(1500, 16),
        torch.arange(9), softcap=3.0)
layout = PackedLayout([70, 3, 90, 1], [-1, 0, 0, -1])
for head_size in (2, 20, 64):
    compare(lambda q, k, v: attention(q, k, v, layout, window=50),
            lambda q, k, v: attention_reference(q, k, v, layout, window=50),
            torch.randn(164, 6, head_size), torch.randn(164, 2, head_size),
            torch.randn(164, 2, head_size))
from fastllm.generation.sampling import SamplingRows, sample_reference

def column(values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype).repeat(10)

rows = SamplingRows(
    temperature=column([0, 0.7, 1, 1, 2, 1], torch.float32),
    top_p=column([1, 0.8, 1, 0.5, 0.99, 1], torch.float32),
    min_p=column([0, 0, 0.05, 0, 0.01, 0], torch.float32),
    repetition_penalty=column([1, 1.2, 1, 1, 0.8, 1], torch.float32),
    top_k=column([0, 50, 0, 0, 700, 0]), key=torch.arange(60) << 40, count=column([3] * 6),
    min_count=column([4, 0] * 3), stop_tokens=torch.arange(3, dtype=torch.int32).repeat(60, 1),
    seen=(torch.rand(60, 2077) < 0.1).to(torch.uint8),
)
logits = 2 * torch.randn(60, 2077)
token, logp, sampling_logp = cpp.sampling.draw(logits, rows)
expected = sample_reference(logits.double(), rows)
same = token == expected.token_ids
assert same.sum() >= 59, same
for a, b in ((logp, expected.logprobs), (sampling_logp, expected.sampling_logprobs)):
    torch.testing.assert_close(a.double()[same], b[same], atol=1e-5, rtol=1e-5)
for row, temperature in ((0, 1.0), (1, rows.temperature[1].item()), (4, 2.0)):
    again = cpp.linear_logprob.forward(logits[row][None], token[row][None], temperature, 0.0)[0]
    assert torch.equal(again, logp[row][None])

# A prompt of 70 tokens in two blocks; a block for each of two tails.
keys, values = torch.randn(4, 2, 20, 64), torch.randn(4, 2, 64, 20)
def row(*numbers): return torch.tensor(numbers, dtype=torch.int32)
cache = keys, values, row(2, 1)[None], row(70), row(0, 0), row(3, 0)[:, None], row(3, 40)
q, rows = torch.randn(2, 6, 20), torch.tensor([72, 112])
found = cpp.decode_attention.forward(q, *cache, 0.3, 0)
wide = [t.double() if t.is_floating_point() else t for t in (q, *cache)]
torch.testing.assert_close(found.double(), decode_attention_reference(*wide, scale=0.3),
                           atol=2e-5, rtol=2e-5)
token = [torch.arange(64) + 128, torch.arange(6) + 64, torch.arange(3) + 192, torch.arange(40)]
k, v = (t.flatten(0, 1)[torch.cat(token)].contiguous()
        for t in (keys.permute(0, 3, 1, 2), values.transpose(1, 2)))
layout = PackedLayout([70, 3, 40], [-1, 0, 0]).select(rows.tolist())
assert torch.equal(found, cpp.attention.forward(q, k, v, layout, 0.3, 0)[0])
print(cpp.isa())
"""


def run(code: str, isa: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "FASTLLM_ISA": isa,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    environment.pop("FASTLLM_BACKEND", None)
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=ROOT
    )


def built() -> list[str]:
    from fastllm import _C

    return _C.isa_levels()


def test_reason_names_what_runs():
    assert cpp.isa() in built()
    assert built()[0] == "baseline"
    assert cpp.reason().endswith(f"running {cpp.isa()}")


@pytest.mark.parametrize("isa", built() if cpp.available() else [])
def test_every_instruction_set_is_right(isa):
    found = run(CHECK_ONE_LEVEL, isa)
    if "expected one that this CPU supports" in found.stderr:
        pytest.skip(f"this CPU has no {isa}")
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip() == isa


def test_unknown_instruction_set():
    found = run("from fastllm.ops import cpp; print(cpp.available(), cpp.reason())", "sse9")
    assert found.returncode == 0, found.stderr
    assert found.stdout.startswith("False C++ extension is broken: FASTLLM_ISA: expected one that")
    assert "found 'sse9'" in found.stdout
    assert "RuntimeWarning" in found.stderr


def test_wrong_arguments_are_named():
    x = torch.randn(3, 8)
    with pytest.raises(
        RuntimeError, match=r"rms_norm_forward: weight must be float32 \[8\], found"
    ):
        cpp.rms_norm.forward(x, torch.ones(7), 1e-6, None)
    with pytest.raises(RuntimeError, match=r"swiglu_forward: up must have rows whose elements lie"):
        cpp.swiglu.forward(torch.randn(4, 4), torch.randn(4, 4).t())
    with pytest.raises(RuntimeError, match=r"swiglu_backward: dup must not overlap itself"):
        cpp.swiglu.backward_into_(x, x, x, torch.empty(3, 8), torch.empty(1, 8).expand(3, 8))
    with pytest.raises(RuntimeError, match=r"adamw_: square 1 must be .* with 8 elements"):
        cpp.optimizer.adamw_(*([x, torch.ones(8)] for _ in range(3)), [x, x], [x, x], *[0.0] * 6)
    with pytest.raises(RuntimeError, match=r"must be float32, bfloat16 or float16, found float64"):
        cpp.swiglu.forward(x.double(), x.double())
    with pytest.raises(RuntimeError, match=r"targets must lie in 0..7, found 8 in row 1"):
        cpp.linear_logprob.forward(x, torch.tensor([0, 8, 1]), 1.0, 0.0)
    with pytest.raises(RuntimeError, match=r"positions must lie in 0..1, found -1 at token 2"):
        table = torch.zeros(2, 4)
        positions = torch.tensor([0, 1, -1], dtype=torch.int32)
        cpp.rope.forward(x.view(3, 1, 8), x.view(3, 1, 8), table, table, positions, False)
    with pytest.raises(
        RuntimeError, match=r"attention_forward: 3 query heads do not divide over 2"
    ):
        k = torch.randn(2, 2, 4)
        cpp.attention.forward(torch.randn(2, 3, 4), k, k, PackedLayout([2]), 1.0, 0)


def operators() -> list[tuple[str, tuple[object, ...]]]:
    """Every registered op with arguments that it takes."""
    x, weight, rstd = torch.randn(6, 8), torch.randn(8), torch.rand(6)
    logits, targets, per_row = torch.randn(6, 20), torch.arange(6), torch.randn(6)
    layout = PackedLayout([3, 2, 1], [-1, 0, 0])
    q, k = torch.randn(6, 4, 8), torch.randn(6, 2, 8)
    packed = (
        layout.starts,
        layout.prefix,
        layout.positions,
        layout.query_rows,
        layout.query_starts,
    )
    lse, table = torch.randn(6, 4), torch.randn(6, 4)
    index = torch.tensor([0, 1], dtype=torch.int32)
    cache, blocks = torch.randn(4, 2, 8, 64), torch.tensor([[2], [0]], dtype=torch.int32)
    children = (layout.children_starts, layout.children)
    return [
        ("rms_norm_forward", (x, weight, 1e-6, None)),
        ("rms_norm_forward", (x, weight, 1e-6, x.clone())),
        ("rms_norm_backward", (x, None, x.clone(), weight, rstd, True)),
        ("rms_norm_backward", (x, x.clone(), x.clone(), weight, rstd, False)),
        ("rope_forward", (q, k, table, table.clone(), layout.positions, False)),
        (
            "rope_into_",
            (q, k, table, table.clone(), layout.positions, True, q.clone(), k.clone()),
        ),
        ("swiglu_forward", (x, x.clone())),
        ("swiglu_backward", (x, x.clone(), x.clone())),
        ("swiglu_backward_into_", (x, x.clone(), x.clone(), x.clone(), x.clone())),
        ("attention_forward", (q, k, k.clone(), *packed, 0.3, 0)),
        (
            "attention_backward_into_",
            (
                *(q, q.clone(), k, k.clone(), q.clone(), lse, *packed, *children, 0.3, 2),
                *(q.clone(), k.clone(), k.clone()),
            ),
        ),
        (
            "decode_attention_forward",
            (
                *(q[:2], cache, cache.clone().view(4, 2, 64, 8)),
                *(blocks, index + 3, index, blocks + 1, index + 1, 0.3, 0),
            ),
        ),
        ("linear_logprob_forward", (logits, targets, 1.0, 0.0)),
        (
            "linear_logprob_backward_",
            (logits, targets, rstd, per_row, per_row.clone(), per_row.clone(), 1.0, 0.0),
        ),
        (
            "sample",
            (
                logits,
                *(torch.rand(6) + 0.1 for _ in range(4)),
                *(torch.ones(6, dtype=dtype) for dtype in (torch.int32, torch.int64)),
                *(torch.ones(6, dtype=torch.int32) for _ in range(2)),
                torch.ones(6, 2, dtype=torch.int32),
                torch.ones(6, 20, dtype=torch.uint8),
            ),
        ),
        ("pairwise_loss_forward", (per_row, per_row.clone(), None, 0.1)),
        ("gradient_norm", ([x, weight],)),
        (
            "adamw_",
            (
                *([torch.rand(3), torch.rand(2, 5)] for _ in range(4)),
                [torch.zeros(()), torch.ones(())],
                *(0.5, 1e-3, 0.9, 0.99, 1e-8, 0.1),
            ),
        ),
    ]


@pytest.mark.parametrize("case", range(len(operators())))
def test_operators_are_registered_right(case):
    name, arguments = operators()[case]
    operator = getattr(torch.ops.fastllm, name).default
    results = torch.library.opcheck(operator, arguments)
    assert set(results.values()) == {"SUCCESS"}, results


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_do_not_change_the_numbers(dtype):
    layout = PackedLayout([50, 7, 90, 33], [-1, 0, 0, -1])
    q, k, v = (torch.randn(180, heads, 24, dtype=dtype) for heads in (4, 2, 2))
    weight, x = torch.randn(512, dtype=dtype), torch.randn(180, 512, dtype=dtype)

    def everything() -> list[torch.Tensor]:
        out, lse = cpp.attention.forward(q, k, v, layout, 0.2, 0)
        y, _, rstd = cpp.rms_norm.forward(x, weight, 1e-6, None)
        gradients = cpp.attention.backward(q, q, k, v, out, lse, layout, 0.2, 0)
        return [out, lse, *gradients, y, *cpp.rms_norm.backward(y, None, x, weight, rstd, True)]

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = everything()
        torch.set_num_threads(3)
        for _ in range(3):
            assert all(map(torch.equal, everything(), expected))
    finally:
        torch.set_num_threads(threads)

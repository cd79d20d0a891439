"""The forms of the Triton kernels of attention: bulk copies, divided work, buckets, varlen_attn."""

from __future__ import annotations

import pytest
import torch

from fastllm.layout import PackedLayout
from fastllm.ops import attention, prepare_layout, varlen
from fastllm.ops.attention import attention_reference
from tests.ops.test_attention import CANCELLATION, inputs

GROUP = [21, 13, 6, 1, 30], [-1, 0, 0, -1, 3]


@pytest.fixture
def kernels(backend, monkeypatch):
    """The module of the kernels, for tests of what only they have."""
    if backend != "triton":
        pytest.skip("only the Triton kernels have forms")
    from fastllm.kernels import attention as module

    return module


@pytest.fixture
def divided(kernels, monkeypatch):
    """Divides work as if a few blocks were much."""
    from fastllm.kernels import schedules

    monkeypatch.setattr(schedules, "LEAST", 1)
    monkeypatch.setattr(schedules, "PROCESSORS", 32)


def test_forms_are_chosen_by_the_batch(kernels, monkeypatch):
    monkeypatch.setattr(kernels, "is_cuda", lambda minimum_arch=0: True)
    half, long = torch.bfloat16, PackedLayout([4000])
    assert kernels.form_of(half, 128, long) == "bulk"
    assert kernels.form_of(half, 80, long) == kernels.form_of(half, 96, long) == "bulk"
    assert kernels.form_of(half, 20, long) == kernels.form_of(torch.float32, 64, long) == "plain"
    assert kernels.form_of(half, 128, PackedLayout([1000])) == "plain"
    assert kernels.form_of(half, 128, long.select([3999])) == "few"
    monkeypatch.setattr(kernels, "is_cuda", lambda minimum_arch=0: minimum_arch < 90)
    assert kernels.form_of(half, 128, long) == "plain"


@pytest.mark.parametrize(
    ("head_dim", "parts"),
    [
        (2, (16, 0)),
        (16, (16, 0)),
        (20, (32, 0)),
        (64, (64, 0)),
        (72, (64, 16)),
        (80, (64, 16)),
        (96, (64, 32)),
        (112, (128, 0)),
        (128, (128, 0)),
        (160, (128, 32)),
        (256, (256, 0)),
    ],
)
def test_heads_in_two_parts(kernels, head_dim, parts):
    assert kernels.head_parts(head_dim) == parts


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [16, 80])
def test_bulk_copies(kernels, monkeypatch, matches_reference, device, head_dim, dtype, window):
    monkeypatch.setattr(kernels, "BULK_ROWS", 0)
    monkeypatch.setattr(kernels, "FEW", 0)
    layout = PackedLayout(*GROUP, device)
    given = inputs(layout, 4, 2, head_dim)
    matches_reference(
        attention,
        attention_reference,
        given,
        dtype,
        layout=layout,
        window=window,
        atol=CANCELLATION,
    )
    assert kernels.form_of(dtype, head_dim, layout) == "bulk"


@pytest.mark.parametrize("strides", ["inside", "every_other_row", "transposed", "expanded"])
def test_bulk_copies_of_strided_tensors(kernels, monkeypatch, matches_reference, device, strides):
    monkeypatch.setattr(kernels, "BULK_ROWS", 0)
    monkeypatch.setattr(kernels, "FEW", 0)
    layout = PackedLayout([7, 5, 9], [-1, 0, 0], device)
    matches_reference(
        attention,
        attention_reference,
        inputs(layout, 4, 2, 16),
        torch.float16,
        layout=layout,
        strides=strides,
        grad_strides=strides,
        atol=CANCELLATION,
    )


@pytest.mark.parametrize(("heads", "key_heads"), [(4, 1), (2, 2)])
def test_divided_work(divided, kernels, matches_reference, device, heads, key_heads):
    layout = PackedLayout(*GROUP, device)
    matches_reference(
        attention, attention_reference, inputs(layout, heads, key_heads), layout=layout
    )
    form, _, tables = kernels.prepare(layout, torch.float32, heads, key_heads, 8, 0, True)
    assert form == "few" and tables[4].shape[0], "no tile is a sum of parts"


def test_divided_work_is_deterministic(divided, device):
    layout = PackedLayout(*GROUP, device)
    given = {n: t.to(device).requires_grad_() for n, t in inputs(layout, 4, 1).items()}
    gradient = torch.randn(layout.num_queries, 4, 8, device=device)
    runs = [
        torch.autograd.grad(attention(**given, layout=layout), tuple(given.values()), gradient)
        for _ in range(2)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("rows", [None, [2, 20, 25, 39, 70]])
def test_a_bucket_gives_the_same(device, rows):
    """The filling is seen by nobody, and its own results are not read."""
    layout = PackedLayout(*GROUP, device)
    layout = layout if rows is None else layout.select(rows)
    filled = layout.bucketed(90, 9, None if rows is None else 8)
    given = {name: t.to(device) for name, t in inputs(filled, 4, 2).items()}
    asked, total = layout.num_queries, layout.total_tokens
    kept = {name: t[: asked if name == "q" else total] for name, t in given.items()}
    weights = torch.randn(filled.num_queries, 4, 8, device=device)
    weights[asked:] = 0
    results = []
    for tensors, over, weight in ((given, filled, weights), (kept, layout, weights[:asked])):
        leaves = {name: t.clone().requires_grad_() for name, t in tensors.items()}
        out = attention(**leaves, layout=over)
        gradients = torch.autograd.grad(out, tuple(leaves.values()), weight)
        results.append((out[:asked], gradients[0][:asked], *(g[:total] for g in gradients[1:])))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rows", [None, [3, 40]])
def test_prepared_layouts_make_no_more_tables(device, backend, rows):
    layout = PackedLayout(*GROUP, device)
    layout = layout if rows is None else layout.select(rows)
    given = {n: t.to(device).requires_grad_() for n, t in inputs(layout, 4, 2).items()}
    for window in (None, 5):
        prepare_layout(layout, torch.float32, 4, 2, 8, window=window)
    before = layout.tables()
    placed = layout.placed(device, before)
    for window in (None, 5):
        out = attention(**given, layout=placed, window=window)
        torch.autograd.grad(out.sum(), tuple(given.values()))
    after = placed.tables()
    assert after.keys() == before.keys() or backend == "torch"
    assert all(after[name] is before[name] for name in before)


# -- varlen_attn -----------------------------------------------------------------------------------


def test_varlen_is_not_asked_for_by_default(monkeypatch):
    monkeypatch.delenv(varlen.VARIABLE, raising=False)
    assert not varlen.requested()


def test_varlen_has_few_names(monkeypatch):
    monkeypatch.setenv(varlen.VARIABLE, "flash")
    with pytest.raises(ValueError, match=r"FASTLLM_ATTENTION: .*varlen.*'flash'"):
        varlen.requested()


@pytest.mark.parametrize(
    ("prefix", "rows", "message"),
    [
        ([-1, 0], None, "knows no shared prefixes"),
        (None, [1, 4], "only 2 of 9 rows have a query"),
        (None, None, "runs on CUDA, found tensors on cpu"),
    ],
)
def test_varlen_says_why_it_cannot_serve(monkeypatch, prefix, rows, message):
    monkeypatch.setenv(varlen.VARIABLE, "varlen")
    monkeypatch.setattr(varlen, "_missing", lambda: None)
    layout = PackedLayout([5, 4], prefix)
    layout = layout if rows is None else layout.select(rows)
    with pytest.raises(
        RuntimeError, match=f"FASTLLM_ATTENTION=varlen was requested, but .*{message}"
    ):
        attention(**inputs(layout), layout=layout)


def test_varlen_is_called_as_documented(monkeypatch):
    """The call itself, with a stand-in that computes what the documentation says."""
    monkeypatch.setenv(varlen.VARIABLE, "varlen")
    monkeypatch.setattr(varlen, "_missing", lambda: None)
    monkeypatch.setattr(varlen, "_unfit", lambda *_: None)
    layout = PackedLayout([5, 0, 4])

    def stand_in(q, k, v, starts, ends, longest, _, *, scale, window_size, enable_gqa):
        assert starts is ends is layout.starts and longest == 5 and enable_gqa
        assert window_size[1] == 0
        window = None if window_size[0] < 0 else window_size[0] + 1
        return attention_reference(q, k, v, layout, scale, window)

    monkeypatch.setattr(varlen, "_function", lambda: stand_in)
    given = inputs(layout, 4, 2)
    for window in (None, 1, 3):
        expected = attention_reference(**given, layout=layout, window=window)
        assert torch.equal(attention(**given, layout=layout, window=window), expected)


@pytest.mark.cuda
@pytest.mark.parametrize("window", [None, 100])
def test_varlen_equals_ours(monkeypatch, window):
    layout = PackedLayout([300, 1, 500], device="cuda")
    given = {n: t.cuda().bfloat16() for n, t in inputs(layout, 4, 4, 64).items()}
    expected = attention(**given, layout=layout, window=window)
    monkeypatch.setenv(varlen.VARIABLE, "varlen")
    found = attention(**given, layout=layout, window=window)
    torch.testing.assert_close(found, expected, atol=2e-2, rtol=2e-2)

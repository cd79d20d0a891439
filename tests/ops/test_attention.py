from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastllm.layout import PackedLayout
from fastllm.ops import attention, cpp
from fastllm.ops.attention import attention_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
large = pytest.mark.large

# The gradient of q is a difference that is exactly zero for a token that sees only itself.
CANCELLATION = 1e-6

# (lengths, prefix): lone tokens, empty segments, shared prefixes, prefixes of no tokens, prefixes
# stored after what continues them, and lengths around the sizes of the kernels' blocks.
LAYOUTS = {
    "one token": ([1], None),
    "one segment": ([7], None),
    "packed": ([5, 1, 3], None),
    "empty segments": ([0, 4, 0, 1, 0], None),
    "pair": ([6, 3, 4], [-1, 0, 0]),
    "two groups": ([3, 2, 1, 4, 1, 2, 0], [-1, 0, 0, -1, 3, 3, 3]),
    "mixed with plain": ([2, 5, 3, 3], [-1, -1, 0, -1]),
    "empty prefix": ([0, 3, 2], [-1, 0, 0]),
    "prefix comes later": ([3, 2, 4], [2, 2, -1]),
    "across blocks": ([17, 33, 5], [-1, 0, 0]),
    "long": pytest.param(([130, 63, 65, 1, 200], [-1, 0, 0, -1, 3]), marks=large),
    "many children": pytest.param(([40, *[9] * 24], [-1, *[0] * 24]), marks=large),
}
HEADS = [(1, 1, 8), (2, 1, 20), (4, 1, 32), (4, 2, 64), (3, 3, 80)]


def layouts(*names):
    chosen = {name: LAYOUTS[name] for name in names} if names else LAYOUTS
    return pytest.mark.parametrize(
        ("lengths", "prefix"),
        [
            pytest.param(*case.values[0], marks=case.marks, id=name)
            if hasattr(case, "marks")
            else pytest.param(*case, id=name)
            for name, case in chosen.items()
        ],
    )


def inputs(layout, heads=2, key_heads=1, head_dim=8):
    return {
        "q": torch.randn(layout.num_queries, heads, head_dim),
        "k": torch.randn(layout.total_tokens, key_heads, head_dim),
        "v": torch.randn(layout.total_tokens, key_heads, head_dim),
    }


def visible(lengths, prefix, window=None):
    """Which rows each row sees [T, T], spelled out token by token."""
    prefix = prefix or [-1] * len(lengths)
    tokens = [
        (segment, place + (lengths[prefix[segment]] if prefix[segment] >= 0 else 0))
        for segment, length in enumerate(lengths)
        for place in range(length)
    ]
    mask = torch.zeros(len(tokens), len(tokens), dtype=torch.bool)
    for row, (segment, position) in enumerate(tokens):
        for column, (other, place) in enumerate(tokens):
            related = other in (segment, prefix[segment])
            near = window is None or place > position - window
            mask[row, column] = related and place <= position and near
    return mask


def dense(q, k, v, mask, scale=None):
    """Softmax over a whole matrix of scores, in fp64 [N, H, D]."""
    repeats = q.shape[1] // k.shape[1]
    k, v = (t.double().repeat_interleave(repeats, dim=1) for t in (k, v))
    scores = torch.einsum("nhd,thd->hnt", q.double(), k) * (scale or q.shape[-1] ** -0.5)
    probabilities = scores.masked_fill(~mask.to(q.device), float("-inf")).softmax(-1)
    return torch.einsum("hnt,thd->nhd", probabilities, v)


@pytest.mark.parametrize("dtype", DTYPES)
@layouts()
def test_layouts(matches_reference, device, lengths, prefix, dtype):
    layout = PackedLayout(lengths, prefix, device)
    matches_reference(
        attention, attention_reference, inputs(layout), dtype, layout=layout, atol=CANCELLATION
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "key_heads", "head_dim"), HEADS)
def test_heads(matches_reference, device, heads, key_heads, head_dim, dtype):
    layout = PackedLayout([6, 3, 4], [-1, 0, 0], device)
    given = inputs(layout, heads, key_heads, head_dim)
    matches_reference(attention, attention_reference, given, dtype, layout=layout)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [2, 96, 128, 160, 256])
def test_other_head_sizes(matches_reference, device, head_dim, dtype):
    layout = PackedLayout([5, 3], [-1, 0], device)
    given = inputs(layout, 2, 2, head_dim)
    matches_reference(
        attention, attention_reference, given, dtype, layout=layout, atol=CANCELLATION
    )


@pytest.mark.parametrize("window", [1, 2, 4, 9, 70, 1000])
@layouts("packed", "two groups", "prefix comes later", "across blocks", "long")
def test_windows(matches_reference, device, lengths, prefix, window):
    layout = PackedLayout(lengths, prefix, device)
    given = inputs(layout)
    matches_reference(attention, attention_reference, given, layout=layout, window=window)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize(
    "rows", [[], [0], [11], [2, 3, 7, 12], [4, 5, 6, 7], list(range(0, 13, 2))], ids=str
)
def test_queries_of_some_rows(matches_reference, device, rows, window):
    layout = PackedLayout([3, 2, 1, 4, 1, 2, 0], [-1, 0, 0, -1, 3, 3, 3], device).select(rows)
    given = inputs(layout, 4, 2)
    found = matches_reference(
        attention, attention_reference, given, layout=layout, window=window, atol=CANCELLATION
    )
    seen = visible(layout.lengths, layout.prefix_of, window)[rows].any(0)
    for name in ("gradient_of_k", "gradient_of_v") if rows else ():
        assert not getattr(found, name)[~seen].any(), "a row that nobody sees has a gradient"


@large
@pytest.mark.parametrize("dtype", DTYPES)
def test_queries_of_some_rows_of_long_segments(matches_reference, device, dtype):
    layout = PackedLayout([130, 63, 200], [-1, 0, 0], device)
    layout = layout.select(torch.arange(3, 393, 7))
    matches_reference(
        attention, attention_reference, inputs(layout, 4, 2, 32), dtype, layout=layout
    )


@pytest.mark.parametrize("scale", [0.05, 1.0, 3.0])
def test_scale(matches_reference, device, scale):
    layout = PackedLayout([6, 3], [-1, 0], device)
    given = inputs(layout)
    matches_reference(attention, attention_reference, given, layout=layout, scale=scale)


@pytest.mark.parametrize(
    ("strides", "grad_strides"),
    [
        ("every_other_row", "contiguous"),
        ("every_other_column", "transposed"),
        ("transposed", "expanded"),
        ("inside", "every_other_row"),
        ("expanded", "every_other_column"),
    ],
)
def test_strided_tensors(matches_reference, device, strides, grad_strides):
    layout = PackedLayout([4, 2, 3], [-1, 0, 0], device)
    matches_reference(
        attention,
        attention_reference,
        inputs(layout, 4, 2),
        layout=layout,
        strides=strides,
        grad_strides=grad_strides,
    )


def test_parts_of_one_projection(device):
    layout = PackedLayout([4, 2], [-1, 0], device)
    fused = torch.randn(6, 8, 8, device=device)
    gradients = []
    for function, dtype in ((attention, torch.float32), (attention_reference, torch.float64)):
        leaf = fused.to(dtype, copy=True).requires_grad_()
        out = function(leaf[:, :4], leaf[:, 4:6], leaf[:, 6:], layout)
        out.square().sum().backward()
        gradients.append(leaf.grad.double())
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_into_parts_of_one_buffer(backend, dtype):
    """The kernels read and write slices of fused tensors: the same bits, and no others touched."""
    if backend != "cpp":
        pytest.skip("only the C++ kernels take strides")
    layout = PackedLayout([70, 9, 33], [-1, 0, 0])
    fused, dfused = (torch.randn(112, 8, 24).to(dtype) for _ in range(2))
    dfused[:, :, 20:] = 7
    dout = torch.randn(4, 112, 20).to(dtype).transpose(0, 1)
    parts = slice(0, 4), slice(4, 6), slice(6, 8)
    views = tuple(fused[:, part, :20] for part in parts)
    gradients = tuple(dfused[:, part, :20] for part in parts)
    out, lse = cpp.attention.forward(*views, layout, 0.3, 0)
    cpp.attention.backward_into_(dout, *views, out, lse, layout, 0.3, 0, *gradients)

    copies = tuple(view.contiguous() for view in views)
    expected, expected_lse = cpp.attention.forward(*copies, layout, 0.3, 0)
    assert torch.equal(out, expected) and torch.equal(lse, expected_lse)
    results = cpp.attention.backward(dout.contiguous(), *copies, out, lse, layout, 0.3, 0)
    for found, wanted in zip(gradients, results, strict=True):
        assert torch.equal(found, wanted)
    assert (dfused[:, :, 20:] == 7).all()


def test_gradients_must_not_overlap(backend):
    if backend != "cpp":
        pytest.skip("only the C++ kernels take strides")
    layout, x = PackedLayout([4]), torch.randn(4, 1, 8)
    out, lse = cpp.attention.forward(x, x, x, layout, 1.0, 0)
    one_row = torch.empty(1, 1, 8).expand(4, 1, 8)
    with pytest.raises(RuntimeError, match="dk must not overlap itself"):
        cpp.attention.backward_into_(x, x, x, x, out, lse, layout, 1.0, 0, x * 1, one_row, x * 1)


@pytest.mark.parametrize("frozen", [("q",), ("k", "v"), ("q", "k")])
def test_frozen_inputs_get_no_gradient(matches_reference, device, frozen):
    layout = PackedLayout([4, 2], [-1, 0], device)
    matches_reference(attention, attention_reference, inputs(layout), layout=layout, frozen=frozen)


@pytest.mark.parametrize("lengths", [[], [0], [0, 0]])
def test_no_tokens(matches_reference, device, lengths):
    layout = PackedLayout(lengths, device=device)
    matches_reference(attention, attention_reference, inputs(layout), layout=layout)


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_scores(matches_reference, device, dtype):
    layout = PackedLayout([6, 3], [-1, 0], device)
    given = inputs(layout, head_dim=16)
    given = {**given, "q": given["q"] * 300}
    matches_reference(
        attention, attention_reference, given, dtype, layout=layout, atol=CANCELLATION
    )


def test_scores_far_below_zero(matches_reference, device):
    """What is masked must not come in with score 0, the largest of all."""
    layout = PackedLayout([6, 3, 5], [-1, 0, 0], device)
    given = inputs(layout, head_dim=16)
    given = {**given, "q": given["q"] + 20, "k": given["k"] - 20}
    matches_reference(
        attention, attention_reference, given, layout=layout, atol=1e-4, rtol=2000 * 2.0**-23
    )


def test_equal_scores_average_the_values(device):
    layout = PackedLayout([40], device=device)
    v = torch.randn(40, 1, 8, device=device)
    out = attention(torch.zeros_like(v), torch.randn_like(v), v, layout)
    mean = v.double().cumsum(0) / torch.arange(1, 41, device=device)[:, None, None]
    torch.testing.assert_close(out.double(), mean, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("tokens", [1, 19, pytest.param(130, marks=large)])
def test_equals_torch_on_plain_causal_attention(device, tokens):
    layout = PackedLayout([tokens], device=device)
    q, k, v = (t.to(device) for t in inputs(layout, 4, 2, 20).values())
    expected = F.scaled_dot_product_attention(
        *(t.transpose(0, 1)[None] for t in (q, k, v)), is_causal=True, enable_gqa=True
    )
    found = attention(q, k, v, layout)
    torch.testing.assert_close(found, expected[0].transpose(0, 1), atol=1e-5, rtol=1e-5)


def test_equals_dense_attention(device):
    lengths, prefix = LAYOUTS["two groups"]
    layout = PackedLayout(lengths, prefix, device)
    q, k, v = (t.to(device) for t in inputs(layout, 4, 2, 20).values())
    for window in (None, 1, 3):
        expected = dense(q, k, v, visible(lengths, prefix, window))
        found = attention(q, k, v, layout, window=window)
        torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)


def test_sharing_a_prefix_equals_repeating_it(device):
    """Outputs are equal, and the prefix's gradients are the sum over its copies."""
    shared = PackedLayout([5, 3, 4], [-1, 0, 0], device)
    repeated = PackedLayout([8, 9], device=device)
    copies = torch.tensor([*range(5), 5, 6, 7, *range(5), 8, 9, 10, 11], device=device)
    given = {name: t.to(device).requires_grad_() for name, t in inputs(shared, 4, 2).items()}
    weights = torch.randn(12, 4, 8, device=device)
    weights[:5] = 0  # the prefix's own outputs are counted once in one, twice in the other

    out = attention(**given, layout=shared)
    gradients = torch.autograd.grad((out * weights).sum(), tuple(given.values()))
    out_copies = attention(**{name: t[copies] for name, t in given.items()}, layout=repeated)
    expected = torch.autograd.grad((out_copies * weights[copies]).sum(), tuple(given.values()))
    torch.testing.assert_close(out[copies], out_copies, atol=1e-5, rtol=1e-5)
    for found, sum_of_copies in zip(gradients, expected, strict=True):
        torch.testing.assert_close(found, sum_of_copies, atol=1e-5, rtol=1e-5)


@layouts("packed", "two groups", "prefix comes later", "across blocks")
def test_rows_that_are_not_seen_have_no_influence(device, lengths, prefix):
    """Not small: exactly zero, and not touched even by an infinity."""
    layout = PackedLayout(lengths, prefix, device)
    given = {name: t.to(device) for name, t in inputs(layout).items()}
    row = layout.offsets[1]
    hidden = ~visible(lengths, prefix)[row]
    leaves = {name: t.clone().requires_grad_() for name, t in given.items()}
    out = attention(**leaves, layout=layout)[row]
    gradients = torch.autograd.grad(out.sum(), tuple(leaves.values()))
    assert gradients[1][~hidden].any() or (~hidden).sum() == 1
    for gradient in gradients[1:]:
        assert (gradient[hidden] == 0).all()
    changed = {name: t.clone() for name, t in given.items()}
    changed["k"][hidden], changed["v"][hidden] = 1e30, 1e30
    assert torch.equal(attention(**changed, layout=layout)[row], out)


def test_two_runs_are_bitwise_equal(device):
    layout = PackedLayout([17, 5, 9, 4], [-1, 0, 0, -1], device)
    given = {name: t.to(device).requires_grad_() for name, t in inputs(layout, 4, 2).items()}
    gradient = torch.randn(35, 4, 8, device=device)
    runs = []
    for _ in range(2):
        out = attention(**given, layout=layout)
        runs.append((out, *torch.autograd.grad(out, tuple(given.values()), gradient)))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("lengths", "prefix"),
    [([150], None), ([90, 70, 3], [-1, 0, 0]), ([200, *[5] * 40], None)],
    ids=["one family", "shared prefix", "one long and many short"],
)
def test_the_number_of_threads_changes_no_bit(backend, lengths, prefix, dtype):
    """Few families are divided otherwise than many, and must add up the same."""
    layout = PackedLayout(lengths, prefix)
    given = {n: t.to(dtype).requires_grad_() for n, t in inputs(layout, 4, 2, 16).items()}
    gradient = torch.randn(layout.num_queries, 4, 16).to(dtype)
    threads, runs = torch.get_num_threads(), []
    try:
        for count in (1, 2, 7):
            torch.set_num_threads(count)
            out = attention(**given, layout=layout)
            runs.append((out, *torch.autograd.grad(out, tuple(given.values()), gradient)))
    finally:
        torch.set_num_threads(threads)
    if backend == "cpp":
        for run in runs[1:]:
            assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


@pytest.mark.parametrize("window", [None, 2])
def test_a_segment_gives_the_same_bits_wherever_it_lies(device, window):
    alone = PackedLayout([7], device=device)
    packed = PackedLayout([3, 7, 5], device=device)
    given = {name: t.to(device) for name, t in inputs(packed, 4, 2).items()}
    rows = slice(3, 10)
    expected = attention(*(t[rows] for t in given.values()), alone, window=window)
    found = attention(**given, layout=packed, window=window)[rows]
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


@st.composite
def packed_rows(draw):
    """A random layout, and which of its rows have a query."""
    lengths = draw(st.lists(st.integers(0, 9), min_size=1, max_size=6))
    roots = draw(st.lists(st.booleans(), min_size=len(lengths), max_size=len(lengths)))
    choices = [segment for segment, root in enumerate(roots) if root]
    prefix = [
        -1 if root or not choices else draw(st.sampled_from([-1, *choices])) for root in roots
    ]
    total = sum(lengths)
    rows = draw(st.none() | st.sets(st.integers(0, max(total - 1, 0)), max_size=total))
    return lengths, prefix, None if rows is None else sorted(rows)


@settings(
    derandomize=True,
    deadline=None,
    max_examples=25,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    case=packed_rows(),
    heads=st.sampled_from([(1, 1), (2, 1), (4, 2)]),
    window=st.none() | st.integers(1, 12),
)
def test_any_layout_equals_dense_attention(device, case, heads, window):
    lengths, prefix, rows = case
    layout = PackedLayout(lengths, prefix, device)
    layout = layout if rows is None else layout.select(rows)
    given = {n: t.to(device).requires_grad_() for n, t in inputs(layout, *heads).items()}
    mask = visible(lengths, prefix, window)
    expected = dense(**given, mask=mask if rows is None else mask[rows])
    found = attention(**given, layout=layout, window=window)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)
    weights = torch.randn_like(found)
    for gradient, exact in zip(
        torch.autograd.grad(found, tuple(given.values()), weights, materialize_grads=True),
        torch.autograd.grad(expected, tuple(given.values()), weights.double()),
        strict=True,
    ):
        torch.testing.assert_close(gradient, exact, atol=2e-5, rtol=1e-5)


@pytest.mark.reference
def test_reference_gradcheck():
    layout = PackedLayout([3, 2, 2], [-1, 0, 0])
    given = tuple(t.double().requires_grad_() for t in inputs(layout, 2, 1, 4).values())
    assert torch.autograd.gradcheck(
        lambda q, k, v: attention_reference(q, k, v, layout, window=3), given
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(4, 2, 8)}, "q has 4 rows, the layout has 5 queries"),
        ({"k": torch.zeros(4, 1, 8)}, r"\[5, K, 8\].*\(4, 1, 8\)"),
        ({"v": torch.zeros(5, 1, 6)}, r"\[5, K, 8\].*\(5, 1, 6\)"),
        ({"q": torch.zeros(5, 2, 6)}, r"\[5, K, 6\]"),
        (
            {"q": torch.zeros(5, 3, 8), "k": torch.zeros(5, 2, 8), "v": torch.zeros(5, 2, 8)},
            "3 .*2",
        ),
        ({"v": torch.zeros(5, 1, 8).half()}, "dtype.*float16"),
        ({"window": 0}, "window must be at least 1.*0"),
    ],
)
def test_wrong_arguments(device, change, message):
    layout = PackedLayout([3, 2], device=device)
    arguments = {name: t.to(device) for name, t in inputs(layout).items()} | change
    with pytest.raises(ValueError, match=message):
        attention(**arguments, layout=layout)


@pytest.mark.cuda
def test_offsets_past_2_to_the_31_elements(backend):
    lengths = [64] * (2**31 // (64 * 4096) + 2)
    layout = PackedLayout(lengths, device="cuda")
    q = torch.zeros(layout.total_tokens, 32, 128, dtype=torch.bfloat16, device="cuda")
    q[-64:].normal_()
    k, v = torch.zeros_like(q[:, :8]), torch.zeros_like(q[:, :8])
    k[-64:].normal_()
    v[-64:].normal_()
    expected = attention_reference(q[-64:], k[-64:], v[-64:], PackedLayout([64], device="cuda"))
    found = attention(q, k, v, layout)[-64:]
    torch.testing.assert_close(found, expected, atol=2e-2, rtol=2e-2)

"""matmul and linear: every format and stride against fp64, and who serves what."""

from __future__ import annotations

import importlib
import itertools

import pytest
import torch

from fastllm.ops import cpp, linear, matmul, use_backend, working

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Relative to the norm of the result: one rounding, and sums in fp32.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float64: 1e-14}
# Around the edges of tiles (14 or 6 rows, 8 to 32 columns), depths (256 or 512) and blocks (512).
SHAPES = [(1, 1, 1), (3, 5, 7), (14, 32, 32), (15, 33, 31), (100, 300, 70), (42, 1025, 513),
          (60, 513, 20), (37, 4096, 50), (9, 3001, 3)]  # fmt: skip

needs_cpp = pytest.mark.skipif(not cpp.available(), reason=cpp.reason())


def matrix(rows, columns, dtype, layout):
    """A matrix whose rows, columns or neither lie along memory."""
    if layout == "rows":
        return torch.randn(rows, columns + 3).to(dtype)[:, :columns]
    if layout == "columns":
        return torch.randn(columns, rows + 1).to(dtype)[:, :rows].t()
    return torch.randn(rows, 2 * columns).to(dtype)[:, ::2]


def assert_near(found, expected, dtype=None):
    error = (found.double() - expected).norm() / expected.norm().clamp(min=1e-30)
    assert error < TOLERANCE[dtype or found.dtype]


@needs_cpp
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("a_dtype", DTYPES)
@pytest.mark.parametrize("b_dtype", DTYPES)
def test_every_format_and_layout(shape, a_dtype, b_dtype):
    torch.manual_seed(0)
    rows, depth, columns = shape
    layouts = ("rows", "columns")
    for a_layout, b_layout, dtype in itertools.product(layouts, layouts, DTYPES):
        a, b = matrix(rows, depth, a_dtype, a_layout), matrix(depth, columns, b_dtype, b_layout)
        with use_backend("cpp"):
            found = matmul(a, b, dtype=dtype)
            wide = matrix(rows, columns, dtype, "rows")
            expected = a.double() @ b.double()
            total = wide.double() + expected
            beside = torch.as_strided(wide, (rows, 3), (columns + 3, 1), columns).clone()
            added = matmul(a, b, out=wide, add=True)
        assert found.dtype == dtype and added is wide
        assert_near(found, expected)
        # A sum may cancel: its error is that of its terms.
        scale = expected.norm() + 1
        assert (wide.double() - total).norm() < TOLERANCE[dtype] * scale * 4
        assert torch.equal(torch.as_strided(wide, (rows, 3), (columns + 3, 1), columns), beside)


@needs_cpp
def test_neighbours_nowhere():
    a, b = matrix(20, 30, torch.float32, "neither"), matrix(30, 40, torch.float32, "neither")
    with use_backend("cpp"):
        assert_near(matmul(a, b), a.double() @ b.double())


@pytest.mark.parametrize("server", ["torch", pytest.param("cpp", marks=needs_cpp)])
@pytest.mark.parametrize("shape", [(0, 4, 5), (3, 0, 5), (3, 4, 0)], ids=str)
def test_nothing_to_multiply(server, shape):
    rows, depth, columns = shape
    with use_backend(server):
        a, b = torch.randn(rows, depth), torch.randn(depth, columns)
        assert torch.equal(matmul(a, b), torch.zeros(rows, columns))
        kept = torch.ones(rows, columns)
        assert torch.equal(matmul(a, b, out=kept, add=True), torch.ones(rows, columns))


@needs_cpp
@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_do_not_change_the_numbers(dtype):
    a, b = torch.randn(300, 2500).to(dtype), torch.randn(2500, 700).to(dtype)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            with use_backend("cpp"):
                results.append([matmul(a, b), matmul(a[:64], b, dtype=torch.float32)])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize(
    ("server", "dtype"),
    [
        *[("torch", dtype) for dtype in (*DTYPES, torch.float64)],
        *[pytest.param("cpp", dtype, marks=needs_cpp) for dtype in DTYPES],
    ],
)
@pytest.mark.parametrize("bias", [False, True])
def test_linear_and_its_gradients(server, dtype, bias):
    torch.manual_seed(0)
    inputs = [torch.randn(3, 25, 70), torch.randn(45, 70)] + [torch.randn(45)] * bias
    leaves = [t.to(dtype).requires_grad_() for t in inputs]
    wide = [t.detach().double().requires_grad_() for t in leaves]
    gradient = torch.randn(3, 25, 45).to(dtype)
    with use_backend(server):
        out = linear(*leaves)
        found = torch.autograd.grad(out, leaves, gradient)
    reference = torch.nn.functional.linear(*wide)
    expected = torch.autograd.grad(reference, wide, gradient.double())
    assert out.dtype == dtype and out.shape == (3, 25, 45)
    for value, wanted in zip([out, *found], [reference, *expected], strict=True):
        # bf16 and fp16 gradients of a bias are PyTorch's own sums.
        assert_near(value, wanted.detach(), dtype)


@needs_cpp
@pytest.mark.parametrize("expand", [False, True])
def test_linear_takes_strided_gradients(expand):
    x, weight = torch.randn(64, 30, requires_grad=True), torch.randn(20, 30, requires_grad=True)
    gradient = torch.randn(1, 1).expand(64, 20) if expand else torch.randn(64, 40)[:, ::2]
    with use_backend("cpp"):
        found = torch.autograd.grad(linear(x, weight), (x, weight), gradient)
    expected = gradient @ weight, gradient.t() @ x
    for value, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(value, wanted.detach(), atol=1e-5, rtol=1e-5)


@needs_cpp
def test_linear_computes_only_wanted_gradients():
    x, weight = torch.randn(64, 30), torch.randn(20, 30, requires_grad=True)
    with use_backend("cpp"):
        linear(x, weight).sum().backward()
    assert weight.grad is not None and x.grad is None
    frozen = weight.detach()
    x.requires_grad_()
    with use_backend("cpp"):
        linear(x, frozen).sum().backward()
    torch.testing.assert_close(x.grad, frozen.sum(0).expand(64, 30))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("attached", [False, True])
def test_wide_weights_get_gradients_that_were_never_rounded(attached, bias):
    """What a GPU does with weights in fp32 and activations in bf16, on any device."""
    torch.manual_seed(0)
    x = torch.randn(64, 30).bfloat16().requires_grad_()
    weight, shift = torch.randn(20, 30, requires_grad=True), torch.randn(20, requires_grad=True)
    if attached:
        working.keep_copies([weight, shift], torch.bfloat16)
    gradient = torch.randn(64, 40).bfloat16()[:, ::2]
    given = (x, weight, shift) if bias else (x, weight, None)
    mixed = importlib.import_module("fastllm.ops.matmul")._MixedLinear
    out = mixed.apply(*given)
    narrow_shift = shift.bfloat16() if bias else None
    assert torch.equal(out, torch.nn.functional.linear(x, weight.bfloat16(), narrow_shift))
    found = torch.autograd.grad(out, [t for t in given if t is not None], gradient)
    assert [t.dtype for t in found] == [torch.bfloat16, torch.float32, torch.float32][: len(found)]
    exact = gradient.double()
    assert_near(found[0], exact @ weight.detach().bfloat16().double())
    assert_near(found[1], exact.t() @ x.detach().double())
    if bias:
        assert_near(found[2], exact.sum(0))


def test_linear_reads_wide_weights_in_the_dtype_of_x():
    x = torch.randn(40, 30).bfloat16()
    weight, bias = torch.randn(20, 30, requires_grad=True), torch.randn(20, requires_grad=True)
    expected = linear(x, weight.bfloat16(), bias.bfloat16())
    assert torch.equal(linear(x, weight, bias), expected) and expected.dtype == torch.bfloat16
    found = torch.autograd.grad(linear(x, weight, bias).sum(), (weight, bias))
    right = torch.autograd.grad(expected.sum(), (weight, bias))
    assert all(map(torch.equal, found, right))


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("out_dtype", ["same", torch.float32])
def test_a_gpu_writes_and_adds_in_place(dtype, out_dtype):
    """No product beside the result: the memory in use does not grow."""
    out_dtype = dtype if out_dtype == "same" else out_dtype
    a = torch.randn(1024, 512, device="cuda").to(dtype)
    b = torch.randn(1031, 512, device="cuda").to(dtype).t()
    exact = a.double() @ b.double()
    out = torch.zeros(1024, 1040, device="cuda", dtype=out_dtype)[:, :1031]
    matmul(a, b, out=out)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    assert matmul(a, b, out=out) is out
    assert_near(out, exact)
    assert matmul(a, b, out=out, add=True) is out
    assert torch.cuda.max_memory_allocated() - before < out.nbytes / 2
    assert_near(out, 2 * exact)
    found = matmul(a, b, dtype=out_dtype)
    assert found.dtype == out_dtype
    assert_near(found, exact)


@pytest.mark.cuda
@pytest.mark.parametrize("bias", [False, True])
def test_a_gpu_keeps_sums_of_wide_weights_wide(bias):
    x = torch.randn(3, 4096, 64, device="cuda").bfloat16().requires_grad_()
    leaves = [torch.randn(32, 64, device="cuda"), torch.randn(32, device="cuda")][: 1 + bias]
    leaves = [t.requires_grad_() for t in leaves]
    gradient = torch.randn(3, 4096, 32, device="cuda").bfloat16()
    found = torch.autograd.grad(linear(x, *leaves), leaves, gradient)
    flat = gradient.flatten(0, 1).double()
    assert found[0].dtype == torch.float32
    assert_near(found[0], flat.t() @ x.detach().flatten(0, 1).double(), torch.float32)
    if bias:
        assert_near(found[1], flat.sum(0), torch.float32)


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match=r"matmul: expected a \[M, K\] and b \[K, N\], found"):
        matmul(torch.ones(2, 3), torch.ones(2, 3))
    with pytest.raises(ValueError, match="add=True needs the tensor to add to"):
        matmul(torch.ones(2, 3), torch.ones(3, 2), add=True)


@needs_cpp
def test_wrong_arguments_of_the_raw_product():
    a, b = torch.ones(2, 3), torch.ones(3, 4)
    with pytest.raises(RuntimeError, match=r"matmul_: out must be \[2, 4\], found \[2, 5\]"):
        cpp.matmul.product_(a, b, torch.ones(2, 5), False, in_order=False)
    with pytest.raises(RuntimeError, match="matmul_: b must have 3 rows"):
        cpp.matmul.product_(a, torch.ones(4, 4), torch.ones(2, 4), False, in_order=False)
    with pytest.raises(RuntimeError, match="the rows of out must be contiguous"):
        cpp.matmul.product_(a, b, torch.ones(4, 2).t(), False, in_order=False)
    with pytest.raises(RuntimeError, match="a must be float32, bfloat16 or float16, found"):
        cpp.matmul.product_(a.double(), b, torch.ones(2, 4), False, in_order=False)


@needs_cpp
def test_more_than_two_to_the_31_elements():
    """Offsets pass 2^31: the last row of a matrix of 2^31 + 2^16 bf16 numbers, mostly untouched."""
    columns = 1 << 16
    rows = (1 << 15) + 1
    a = torch.empty(rows, columns, dtype=torch.bfloat16)
    a[-1] = 1
    b = torch.ones(columns, 1)
    with use_backend("cpp"):
        assert matmul(a[-1:], b).item() == columns
        tall = matmul(a.t()[:, -1:], torch.ones(1, 3))
    assert torch.equal(tall, torch.ones(columns, 3))

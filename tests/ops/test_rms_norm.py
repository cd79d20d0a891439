from __future__ import annotations

import pytest
import torch

from fastllm.ops import backend as backends
from fastllm.ops import rms_norm
from fastllm.ops.rms_norm import rms_norm_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [
    (1, 1),
    (3, 7),
    (5, 129),
    (2, 3, 20),
    (33, 344),
    pytest.param((257, 1024), marks=pytest.mark.large),
    pytest.param((3, 5120), marks=pytest.mark.large),
]


def inputs(*shape, residual=True):
    return {
        "x": torch.randn(shape),
        "weight": torch.randn(shape[-1]),
        "residual": torch.randn(shape) if residual else None,
    }


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_and_gradients(matches_reference, shape, dtype, residual):
    matches_reference(rms_norm, rms_norm_reference, inputs(*shape, residual=residual), dtype)


@pytest.mark.parametrize("frozen", [(), ("weight",)])
@pytest.mark.parametrize(("dtype", "columns"), [(torch.float32, 8195), (torch.bfloat16, 9216)])
def test_rows_too_wide_to_keep_a_gradient_beside(matches_reference, dtype, columns, frozen):
    matches_reference(
        rms_norm,
        rms_norm_reference,
        inputs(9, columns),
        dtype,
        frozen=frozen,
        grad_strides="expanded",
    )


def test_more_rows_than_programs(matches_reference):
    """Programs walk over the rows, and the last one of them has fewer."""
    matches_reference(rms_norm, rms_norm_reference, inputs(83, 130))


@pytest.mark.parametrize(
    ("strides", "grad_strides"),
    [
        ("every_other_row", "contiguous"),
        ("every_other_column", "transposed"),
        ("transposed", "expanded"),
        ("inside", "every_other_column"),
        ("contiguous", "expanded"),
    ],
)
@pytest.mark.parametrize("residual", [False, True])
def test_strided_tensors(matches_reference, strides, grad_strides, residual):
    matches_reference(
        rms_norm,
        rms_norm_reference,
        inputs(2, 3, 20, residual=residual),
        strides=strides,
        grad_strides=grad_strides,
    )


def test_expanded_input(matches_reference, restrided):
    given = inputs(5, 7)
    given["x"] = restrided(given["x"], "expanded")
    matches_reference(rms_norm, rms_norm_reference, given)


@pytest.mark.parametrize("only_output", [0, 1], ids=["only y", "only the sum"])
def test_gradient_of_one_output(matches_reference, only_output):
    matches_reference(rms_norm, rms_norm_reference, inputs(5, 20), only_output=only_output)


@pytest.mark.parametrize("frozen", [("weight",), ("x", "residual"), ("x", "weight"), ("residual",)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frozen_inputs_get_no_gradient(matches_reference, dtype, frozen):
    matches_reference(rms_norm, rms_norm_reference, inputs(5, 20), dtype, frozen=frozen)


def test_fp32_weight_for_bf16_rows(device):
    """Each gradient has the dtype of what it is a gradient of."""
    x = torch.randn(5, 20, device=device, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(20, device=device, requires_grad=True)
    y = rms_norm(x, weight)
    y.sum().backward()
    assert (y.dtype, x.grad.dtype, weight.grad.dtype) == (*[torch.bfloat16] * 2, torch.float32)
    exact_x, exact_weight = (t.detach().double().requires_grad_() for t in (x, weight))
    rms_norm_reference(exact_x, exact_weight).sum().backward()
    torch.testing.assert_close(x.grad.double(), exact_x.grad, atol=5e-2, rtol=2e-2)
    torch.testing.assert_close(weight.grad.double(), exact_weight.grad, atol=5e-2, rtol=2e-2)


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)])
@pytest.mark.parametrize("residual", [False, True])
def test_no_rows(matches_reference, shape, residual):
    found = matches_reference(rms_norm, rms_norm_reference, inputs(*shape, residual=residual))
    assert torch.equal(found.gradient_of_weight.cpu(), torch.zeros(8))


@pytest.mark.parametrize("dtype", DTYPES)
def test_squares_do_not_overflow_and_eps_counts(matches_reference, dtype):
    given = inputs(4, 24)
    scale = torch.tensor([[3e3], [1.0], [1e-3], [0.0]])
    given = {**given, "x": given["x"] * scale, "residual": given["residual"] * scale}
    matches_reference(rms_norm, rms_norm_reference, given, dtype, eps=1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sum_is_the_rounded_sum(request, device, dtype):
    if dtype == torch.bfloat16:
        request.getfixturevalue("rounds_bf16")
    x, residual = torch.randn(2, 5, 33, device=device).to(dtype)
    _, total = rms_norm(x, torch.ones(33, device=device, dtype=dtype), residual=residual)
    assert torch.equal(total, x + residual)


@pytest.mark.reference
def test_reference_equals_torch():
    x, weight = torch.randn(5, 12), torch.randn(12)
    expected = torch.nn.functional.rms_norm(x, (12,), weight, eps=1e-5)
    torch.testing.assert_close(rms_norm_reference(x, weight, eps=1e-5), expected)


@pytest.mark.reference
def test_reference_gradcheck():
    x, residual = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(rms_norm_reference, (x, weight, 1e-3, residual))


def test_two_runs_are_bitwise_equal(device):
    x, gradient = torch.randn(2, 70, 33, device=device)
    weight = torch.randn(33, device=device, requires_grad=True)
    x.requires_grad_()
    first, second = (
        torch.autograd.grad(rms_norm(x, weight), (x, weight), gradient) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_saved_tensors_are_not_aliased_by_the_outputs(device):
    """Writing to an output in place must raise or be harmless, never corrupt the gradient."""
    x = torch.randn(3, 8, device=device, requires_grad=True)
    weight = torch.randn(8, device=device, requires_grad=True)
    (expected,) = torch.autograd.grad(rms_norm(x, weight).sum(), x)
    y = rms_norm(x, weight)
    try:
        y.mul_(2.0)
    except RuntimeError as error:
        assert "inplace" in str(error)
    else:
        (found,) = torch.autograd.grad(y.sum(), x)
        torch.testing.assert_close(found, 2 * expected)


@pytest.mark.parametrize(
    ("x", "weight", "residual"),
    [
        ((4, 8), (7,), None),
        ((4, 8), (1, 8), None),
        ((4, 8), (8,), (4, 7)),
        ((4, 8), (8,), (8,)),
    ],
)
def test_wrong_shapes(device, x, weight, residual):
    residual = None if residual is None else torch.randn(residual, device=device)
    with pytest.raises(ValueError, match=r"rms_norm.*\d"):
        rms_norm(torch.randn(x, device=device), torch.randn(weight, device=device), 1e-6, residual)


@pytest.mark.cuda
def test_too_long_rows_are_refused(backend):
    with pytest.raises(ValueError, match="at most 32768"):
        rms_norm(torch.zeros(2, 32776, device="cuda"), torch.ones(32776, device="cuda"))


@pytest.mark.cuda
def test_more_than_2_to_the_31_elements(backend):
    rows = 2**31 // 4096 + 2
    x = torch.zeros(rows, 4096, dtype=torch.bfloat16, device="cuda")
    x[-1] = torch.arange(4096, device="cuda") % 5 - 2
    weight = torch.ones(4096, dtype=torch.bfloat16, device="cuda")
    torch.testing.assert_close(rms_norm(x, weight)[-1:], rms_norm_reference(x[-1:], weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_slices_and_expanded_rows_are_read_in_place(device, dtype):
    wide, weight = torch.randn(6, 60).to(device, dtype), torch.randn(19).to(device, dtype)
    x, residual, dy = wide[:, 1:20], wide[:, 20:39], wide[:1, 40:59].expand(6, 19)
    kernels = backends.kernels("rms_norm", x)
    if kernels is None:
        pytest.skip("PyTorch serves")
    assert kernels.READS_STRIDES
    found = kernels.forward(x, weight, 1e-6, residual)
    expected = kernels.forward(x.contiguous(), weight, 1e-6, residual.contiguous())
    assert all(map(torch.equal, found, expected))
    rstd = found[2]
    found = kernels.backward(dy, x, residual, weight, rstd, True)
    dense = (t.contiguous() for t in (dy, x, residual))
    assert all(map(torch.equal, found, kernels.backward(*dense, weight, rstd, True)))

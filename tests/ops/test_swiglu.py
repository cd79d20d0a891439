from __future__ import annotations

import pytest
import torch

from fastllm.ops import backend as backends
from fastllm.ops import swiglu
from fastllm.ops.swiglu import backward_fused, forward_fused, swiglu_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [
    (1,),
    (3, 7),
    (5, 129),
    (2, 3, 344),
    pytest.param((123, 1031), marks=pytest.mark.large),
]


def inputs(*shape):
    return {"gate": 3 * torch.randn(shape), "up": torch.randn(shape)}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_and_gradients(matches_reference, shape, dtype):
    matches_reference(swiglu, swiglu_reference, inputs(*shape), dtype)


@pytest.mark.parametrize(
    ("strides", "grad_strides"),
    [
        ("every_other_row", "contiguous"),
        ("every_other_column", "transposed"),
        ("transposed", "expanded"),
        ("inside", "every_other_row"),
        ("expanded", "expanded"),
    ],
)
def test_strided_tensors(matches_reference, strides, grad_strides):
    matches_reference(
        swiglu, swiglu_reference, inputs(4, 3, 7), strides=strides, grad_strides=grad_strides
    )


def test_expanded_input(matches_reference, restrided):
    given = inputs(5, 7)
    matches_reference(
        swiglu, swiglu_reference, {**given, "gate": restrided(given["gate"], "expanded")}
    )


@pytest.mark.parametrize("frozen", [("gate",), ("up",)])
def test_frozen_inputs_get_no_gradient(matches_reference, frozen):
    matches_reference(swiglu, swiglu_reference, inputs(5, 7), frozen=frozen)


def test_halves_of_one_projection(device):
    both = torch.randn(6, 14, device=device, requires_grad=True)
    swiglu(*both.chunk(2, dim=-1)).sum().backward()
    exact = both.detach().double().requires_grad_()
    swiglu_reference(*exact.chunk(2, dim=-1)).sum().backward()
    torch.testing.assert_close(both.grad.double(), exact.grad, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2,), (3, 14), (2, 3, 344), (5, 2 * 129)])
def test_both_in_one_tensor(matches_reference, shape, dtype):
    """Halves of a row; a half of 129 columns starts nowhere in particular."""
    given = {"gate": torch.randn(shape)}
    matches_reference(swiglu, swiglu_reference, given, dtype)


@pytest.mark.parametrize(
    ("strides", "grad_strides"),
    [("every_other_row", "expanded"), ("transposed", "inside"), ("inside", "transposed")],
)
def test_both_in_one_strided_tensor(matches_reference, strides, grad_strides):
    given = {"gate": torch.randn(4, 3, 14)}
    matches_reference(swiglu, swiglu_reference, given, strides=strides, grad_strides=grad_strides)


@pytest.mark.parametrize("shape", [(0, 8), (8, 0), (2, 0, 4)])
def test_nothing_in_one_tensor(matches_reference, shape):
    matches_reference(swiglu, swiglu_reference, {"gate": torch.randn(shape)})


@pytest.mark.parametrize("shape", [(4, 7), ()])
def test_a_row_without_halves(device, shape):
    with pytest.raises(ValueError, match=r"swiglu.*2F"):
        swiglu(torch.zeros(shape, device=device))


@pytest.mark.parametrize("shape", [(0,), (0, 8), (8, 0)])
def test_no_elements(matches_reference, shape):
    matches_reference(swiglu, swiglu_reference, inputs(*shape))


@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_gates(matches_reference, dtype):
    gate = torch.tensor([-6e4, -1e4, -100.0, -88.5, -20.0, 0.0, 20.0, 88.5, 100.0, 1e4, 6e4])
    matches_reference(swiglu, swiglu_reference, {"gate": gate, "up": torch.ones(11)}, dtype)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_not_finite_goes_through(device, value):
    """A bad number must reach the loss, where the loop looks for it."""
    gate, up = torch.ones(2, 9, device=device)
    up[3] = value
    assert torch.equal(swiglu(gate, up).isfinite().cpu(), torch.arange(9) != 3)


@pytest.mark.reference
def test_reference_equals_torch():
    gate, up = torch.randn(2, 5, 12)
    torch.testing.assert_close(swiglu_reference(gate, up), torch.nn.functional.silu(gate) * up)


@pytest.mark.reference
def test_reference_gradcheck():
    gate, up = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(swiglu_reference, (gate, up))


def test_two_runs_are_bitwise_equal(device):
    gate, up, gradient = torch.randn(3, 70, 33, device=device).unbind()
    gate.requires_grad_()
    up.requires_grad_()
    first, second = (torch.autograd.grad(swiglu(gate, up), (gate, up), gradient) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(("gate", "up"), [((4, 8), (4, 7)), ((4, 8), (8,)), ((4, 8), (8, 4))])
def test_wrong_shapes(device, gate, up):
    with pytest.raises(ValueError, match=r"swiglu.*\d"):
        swiglu(torch.randn(gate, device=device), torch.randn(up, device=device))


@pytest.mark.parametrize("dtype", DTYPES)
def test_halves_of_one_buffer_are_read_and_written_in_place(device, dtype):
    both = torch.randn(6, 28).to(device, dtype)
    dout = torch.randn(1, 14).to(device, dtype).expand(6, 14)
    gate, up = both.chunk(2, dim=-1)
    kernels = backends.kernels("swiglu", both)
    if kernels is None:
        pytest.skip("PyTorch serves")
    assert kernels.READS_STRIDES
    assert torch.equal(kernels.forward(gate, up), kernels.forward(gate.clone(), up.clone()))
    assert torch.equal(kernels.forward(gate, up), forward_fused(kernels, both))
    expected = kernels.backward(dout.contiguous(), gate.contiguous(), up.contiguous())
    found = kernels.backward(dout, gate, up)
    assert all(map(torch.equal, found, expected))
    assert torch.equal(backward_fused(kernels, dout, both), torch.cat(expected, dim=1))
    room = torch.full((6, 30), float("nan"), dtype=dtype, device=device)
    kernels.backward_into_(dout, gate, up, room[:, 1:15], room[:, 15:29])
    assert torch.equal(room[:, 1:29], torch.cat(expected, dim=1))
    assert room[:, 0].isnan().all() and room[:, 29].isnan().all()
    kernels.backward_into_(dout, gate, up, gate, up)
    assert torch.equal(both, torch.cat(expected, dim=1)), "gradients over their inputs"


@pytest.mark.cuda
def test_more_than_2_to_the_31_elements(backend):
    rows = 2**31 // 8192 + 2
    both = torch.zeros(rows, 2 * 8192, dtype=torch.bfloat16, device="cuda")
    both[-1] = torch.randn(2 * 8192, device="cuda")
    torch.testing.assert_close(swiglu(both)[-1], swiglu_reference(both[-1]))

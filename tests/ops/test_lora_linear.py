from __future__ import annotations

import pytest
import torch

from fastllm.ops import linear, lora_linear
from fastllm.ops.lora_linear import lora_linear_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 8, 4, 1), (7, 40, 33, 4), (70, 129, 64, 16)]
FROZEN = ("weight", "bias")


def inputs(rows, channels, outputs, rank, bias=True):
    return {
        "x": torch.randn(rows, channels),
        "weight": torch.randn(outputs, channels) / channels**0.5,
        "bias": torch.randn(outputs) if bias else None,
        "a": torch.randn(rank, channels) / channels**0.5,
        "b": torch.randn(outputs, rank),
    }


def seeded(function):
    """The same channels are dropped in every run."""

    def call(**arguments):
        torch.manual_seed(11)
        return function(**arguments)

    return call


def check(matches_reference, given, dtype=torch.float32, **options):
    options = {"frozen": FROZEN, "scaling": 1.7} | options
    return matches_reference(
        seeded(lora_linear), seeded(lora_linear_reference), given, dtype, **options
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_result_and_gradients(matches_reference, shape, bias, dtype):
    found = check(matches_reference, inputs(*shape, bias), dtype)
    assert found.output_0.shape == (shape[0], shape[2])


@pytest.mark.parametrize("frozen", [(), ("x", *FROZEN), ("a", "b"), ("a", *FROZEN)], ids=str)
def test_only_wanted_gradients(matches_reference, frozen):
    check(matches_reference, inputs(7, 24, 20, 4), frozen=frozen)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout(device, dtype):
    """The reference draws the same channels; fp64 would draw others."""
    given = {n: t.to(device, dtype).requires_grad_() for n, t in inputs(30, 40, 20, 4).items()}
    results = []
    for function in (lora_linear, lora_linear_reference):
        out = seeded(function)(**given, scaling=2.0, dropout=0.4)
        results.append([out.detach(), *torch.autograd.grad(out.sum(), list(given.values()))])
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    for value, expected in zip(*results, strict=True):
        error = (value.double() - expected.double()).norm()
        assert error <= tolerance * expected.double().norm()


def test_without_dropout_no_random_numbers_are_drawn(device):
    given = {name: t.to(device) for name, t in inputs(5, 8, 6, 2).items()}
    before = torch.get_rng_state()
    lora_linear(**given, scaling=1.0)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("strides", ["every_other_row", "every_other_column", "transposed"])
@pytest.mark.parametrize("grad_strides", ["contiguous", "expanded", "every_other_column"])
def test_strided_tensors(matches_reference, strides, grad_strides):
    given = inputs(6, 8, 6, 2, bias=False)
    check(matches_reference, given, strides=strides, grad_strides=grad_strides)


@pytest.mark.parametrize("shape", [(2, 3, 8), (0, 8), (8,)], ids=str)
def test_leading_dimensions(device, shape):
    given = {name: t.to(device) for name, t in inputs(1, 8, 6, 2).items()}
    given["x"] = torch.randn(shape, device=device, requires_grad=True)
    out = lora_linear(**given, scaling=0.5)
    torch.testing.assert_close(out, lora_linear_reference(**given, scaling=0.5))
    out.sum().backward()
    assert given["x"].grad.shape == shape


def test_a_new_adapter_changes_no_bit(device):
    given = {name: t.to(device) for name, t in inputs(64, 40, 24, 4).items()}
    given["b"].zero_()
    base = linear(given["x"], given["weight"], given["bias"])
    found = lora_linear(**given, scaling=2.0)
    if device.type == "cpu":
        assert torch.equal(found, base)
    torch.testing.assert_close(found, base, atol=1e-6, rtol=1e-6)


def test_wide_weights_under_bf16(device):
    """Adapters are fp32, and so are their gradients."""
    given = {name: t.to(device) for name, t in inputs(64, 40, 24, 4).items()}
    given["x"] = given["x"].bfloat16().requires_grad_()
    for name in ("a", "b"):
        given[name].requires_grad_()
    lora_linear(**given, scaling=2.0).sum().backward()
    exact = {n: t.detach().to(torch.bfloat16).double() for n, t in given.items()}
    for name in ("x", "a", "b"):
        exact[name].requires_grad_()
    lora_linear_reference(**exact, scaling=2.0).sum().backward()
    for name, dtype in (("x", torch.bfloat16), ("a", torch.float32), ("b", torch.float32)):
        assert given[name].grad.dtype == dtype
        error = (given[name].grad.double() - exact[name].grad).norm()
        assert error <= 1e-2 * exact[name].grad.norm()


def test_what_is_kept_for_the_gradient(device):
    """x itself, the weights themselves, and rows of r numbers; no result, no merged weight."""
    given = {name: t.to(device).requires_grad_() for name, t in inputs(64, 40, 24, 4).items()}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        lora_linear(**given, scaling=2.0)
    own = {t.data_ptr() for t in given.values()}
    new = [t for t in kept if t.data_ptr() not in own]
    assert [tuple(t.shape) for t in new] in ([(64, 4)], [])


@pytest.mark.reference
def test_reference_gradcheck():
    given = {n: t.double().requires_grad_() for n, t in inputs(3, 4, 5, 2).items()}
    assert torch.autograd.gradcheck(
        lambda *leaves: lora_linear_reference(*leaves, 0.7), tuple(given.values())
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": torch.zeros(2, 7)}, r"a \[r, 8\] and b \[6, r\], found \(2, 7\) and \(6, 2\)"),
        ({"b": torch.zeros(6, 3)}, r"found \(2, 8\) and \(6, 3\)"),
        ({"dropout": 1.0}, "found 1.0"),
        ({"dropout": -0.1}, "found -0.1"),
    ],
    ids=["a", "b", "all dropped", "negative"],
)
def test_wrong_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        lora_linear(**(inputs(5, 8, 6, 2) | change), scaling=1.0)

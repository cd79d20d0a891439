from __future__ import annotations

import math

import pytest
import torch

from fastllm.ops import pairwise_loss
from fastllm.ops.pairwise_loss import pairwise_loss_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [1, 2, 7, 129, 1000, pytest.param(100_003, marks=pytest.mark.large)]


def inputs(pairs, margin=True):
    return {
        "chosen": 2 * torch.randn(pairs),
        "rejected": 2 * torch.randn(pairs),
        "margin": torch.rand(pairs) if margin else None,
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("margin", "centering"), [(False, 0.0), (True, 0.0), (True, 0.01)])
@pytest.mark.parametrize("pairs", SIZES)
def test_loss_and_gradients(matches_reference, pairs, margin, centering, dtype):
    matches_reference(
        pairwise_loss,
        pairwise_loss_reference,
        inputs(pairs, margin),
        dtype,
        frozen=("margin",),
        centering=centering,
    )


@pytest.mark.parametrize("strides", ["every_other_row", "inside", "expanded"])
def test_strided_tensors(matches_reference, strides):
    given = inputs(7)
    matches_reference(
        pairwise_loss, pairwise_loss_reference, given, strides=strides, frozen=("margin",)
    )


def test_scores_of_one_batch(device):
    """A reward model scores both sides at once: rows 0, 2, ... against rows 1, 3, ..."""
    scores = torch.randn(10, device=device, requires_grad=True)
    pairwise_loss(scores[::2], scores[1::2], centering=0.1).backward()
    exact = scores.detach().double().requires_grad_()
    pairwise_loss_reference(exact[::2], exact[1::2], centering=0.1).backward()
    torch.testing.assert_close(scores.grad.double(), exact.grad, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("frozen", [("chosen", "margin"), ("rejected", "margin")])
def test_frozen_side_gets_no_gradient(matches_reference, frozen):
    matches_reference(pairwise_loss, pairwise_loss_reference, inputs(7), frozen=frozen)


@pytest.mark.parametrize("names", [("chosen",), ("rejected",), ("margin",)], ids=str)
def test_mixed_dtypes_are_right_or_refused(device, names):
    """Never the bytes of one type read as another."""
    given = {name: t.to(device) for name, t in inputs(7).items()}
    exact = pairwise_loss_reference(**{name: t.double() for name, t in given.items()})
    mixed = {name: t.bfloat16() if name in names else t for name, t in given.items()}
    try:
        found = pairwise_loss(**mixed)
    except (ValueError, RuntimeError) as error:
        assert "bfloat16" in str(error).lower()
    else:
        torch.testing.assert_close(found.double(), exact, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("centering", [0.0, 0.5])
def test_extreme_differences(matches_reference, dtype, centering):
    chosen = torch.tensor([1e4, -1e4, 88.5, -88.5, 0.0, 17.0, -17.0])
    found = matches_reference(
        pairwise_loss,
        pairwise_loss_reference,
        {"chosen": chosen, "rejected": torch.zeros(7), "margin": None},
        dtype,
        centering=centering,
    )
    assert found.output_0 > 0


@pytest.mark.parametrize("difference", [-1e4, -30.0, -1.0, 0.0, 1.0, 30.0, 100.0])
def test_one_pair_by_hand(device, difference):
    chosen = torch.tensor([difference], device=device, requires_grad=True)
    loss = pairwise_loss(chosen, torch.zeros(1, device=device))
    loss.backward()
    stable = max(-difference, 0.0) + math.log1p(math.exp(-abs(difference)))
    slope = math.exp(-max(difference, 0.0)) / (1 + math.exp(-abs(difference)))
    assert loss.item() == pytest.approx(stable, rel=1e-6)
    assert chosen.grad.item() == pytest.approx(-slope, rel=1e-5)


def test_loss_is_a_fp32_scalar_of_log_2_for_equal_scores(device):
    scores = torch.randn(9, device=device).bfloat16()
    loss = pairwise_loss(scores, scores)
    assert loss.shape == () and loss.dtype == torch.float32
    assert loss.item() == pytest.approx(math.log(2), rel=1e-6)


def test_loss_is_scaled_by_the_output_gradient(device):
    chosen, rejected = torch.randn(2, 6, device=device).unbind()
    chosen.requires_grad_()
    (once,) = torch.autograd.grad(pairwise_loss(chosen, rejected), chosen)
    (scaled,) = torch.autograd.grad(pairwise_loss(chosen, rejected) * -3.0, chosen)
    torch.testing.assert_close(scaled, -3.0 * once)


@pytest.mark.reference
def test_reference_equals_torch():
    chosen, rejected, margin = torch.randn(3, 11)
    expected = -torch.nn.functional.logsigmoid(chosen - rejected - margin).mean()
    expected = expected + 0.3 * (chosen + rejected).square().mean()
    found = pairwise_loss_reference(chosen, rejected, margin=margin, centering=0.3)
    torch.testing.assert_close(found, expected)


@pytest.mark.reference
def test_reference_gradcheck():
    chosen, rejected = torch.randn(2, 5, dtype=torch.float64, requires_grad=True).unbind()
    margin = torch.rand(5, dtype=torch.float64)
    assert torch.autograd.gradcheck(pairwise_loss_reference, (chosen, rejected, margin, 0.2))


def test_two_runs_are_bitwise_equal(device):
    chosen, rejected = torch.randn(2, 5000, device=device).unbind()
    assert torch.equal(pairwise_loss(chosen, rejected), pairwise_loss(chosen, rejected))


@pytest.mark.parametrize(
    ("chosen", "rejected", "margin"),
    [((4,), (5,), None), ((4,), (4, 1), None), ((4,), (4,), (3,)), ((4, 1), (4, 1), None)],
)
def test_wrong_shapes(device, chosen, rejected, margin):
    margin = None if margin is None else torch.zeros(margin, device=device)
    with pytest.raises(ValueError, match=r"pairwise_loss.*\d"):
        pairwise_loss(
            torch.zeros(chosen, device=device), torch.zeros(rejected, device=device), margin
        )


def test_no_pairs_is_an_error(device):
    """The mean over nothing is not a number; say so instead of returning NaN."""
    empty = torch.zeros(0, device=device)
    with pytest.raises(ValueError, match=r"pairwise_loss.*at least one pair"):
        pairwise_loss(empty, empty)

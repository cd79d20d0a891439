from __future__ import annotations

import importlib

import pytest
import torch

from fastllm.ops import pairwise_loss, reward_loss
from fastllm.ops.reward_loss import reward_loss_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (rows, channels, pairs): one pair; a batch; rows that are nobody's; beside the edges of blocks.
SHAPES = [(2, 8, 1), (16, 64, 8), (13, 40, 5), (131, 24, 65), (200, 300, 100)]


def inputs(rows, channels):
    return {"hidden": torch.randn(rows, channels), "weight": torch.randn(1, channels) * 0.3}


def pairs(rows, count, margin=False):
    """Every row in one pair at most, in any order."""
    order = torch.randperm(rows)[: 2 * count]
    found = {"chosen": order[:count], "rejected": order[count:]}
    return found | ({"margin": torch.rand(count)} if margin else {})


def loss_only(*args, **options):
    return reward_loss(*args, **options)[0]


def reference_loss_only(*args, **options):
    return reward_loss_reference(*args, **options)[0]


def check(matches_reference, shape, dtype=torch.float32, constants=None, **options):
    rows, channels, count = shape
    return matches_reference(
        loss_only,
        reference_loss_only,
        inputs(rows, channels),
        dtype,
        constants=constants or pairs(rows, count, margin=True),
        **options,
    )


@pytest.fixture(params=["one launch", "two launches"])
def launches(request, backend, monkeypatch):
    """Few rows are scored by the program that makes the loss, many by programs of their own."""
    if request.param == "two launches":
        if backend != "triton":
            pytest.skip("a matter of the Triton kernels")
        module = importlib.import_module("fastllm.kernels.reward_loss")
        monkeypatch.setattr(module, "_BYTES_OF_ONE_PROGRAM", 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_loss_and_gradients(matches_reference, launches, shape, dtype):
    check(matches_reference, shape, dtype, centering=0.02)


@pytest.mark.parametrize("centering", [0.0, 0.5])
@pytest.mark.parametrize("margin", [False, True])
def test_margin_and_centering(matches_reference, margin, centering):
    constants = pairs(12, 6, margin)
    check(matches_reference, (12, 32, 6), constants=constants, centering=centering)


def test_a_row_of_several_pairs(matches_reference, launches):
    """A ranking of three answers, and an answer that is paired with itself."""
    constants = {"chosen": torch.tensor([0, 0, 2, 3]), "rejected": torch.tensor([2, 1, 1, 3])}
    check(matches_reference, (5, 16, 4), constants=constants)


def test_rows_of_no_pair_get_no_gradient(device):
    hidden = torch.randn(6, 16, device=device, requires_grad=True)
    one, other = torch.tensor([1], device=device), torch.tensor([4], device=device)
    reward_loss(hidden, torch.randn(1, 16, device=device), one, other)[0].backward()
    assert hidden.grad.abs().sum(1).ne(0).tolist() == [False, True, False, False, True, False]


@pytest.mark.parametrize("strides", ["every_other_row", "every_other_column", "inside"])
def test_strided_tensors(matches_reference, strides):
    constants = {"chosen": torch.arange(12)[::2][:3], "rejected": torch.arange(12)[1::2][:3]}
    given = inputs(8, 16)
    weight = given["weight"]
    matches_reference(
        lambda hidden, **pairs: loss_only(hidden, weight.to(hidden), **pairs),
        lambda hidden, **pairs: reference_loss_only(hidden, weight.to(hidden), **pairs),
        {"hidden": given["hidden"]},
        constants=constants,
        strides=strides,
    )


@pytest.mark.parametrize("frozen", [("hidden",), ("weight",)])
def test_frozen_inputs_get_no_gradient(matches_reference, frozen):
    check(matches_reference, (8, 16, 4), frozen=frozen)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_and_metrics(device, launches, dtype):
    given = {name: t.to(device) for name, t in inputs(9, 32).items()}
    hidden = given["hidden"].to(dtype)
    which = {name: t.to(device) for name, t in pairs(9, 4).items()}
    loss, scores, metrics = reward_loss(hidden, given["weight"], **which)
    exact = (hidden.double() @ given["weight"][0].double()).cpu()
    better, worse = exact[which["chosen"].cpu()], exact[which["rejected"].cpu()]
    right = torch.stack(
        [
            (better > worse).sum().double(),
            (better - worse).sum(),
            exact.min(),
            (better + worse).sum() / 2,
            exact.max(),
        ]
    )
    assert scores.dtype == metrics.dtype == loss.dtype == torch.float32
    assert not scores.requires_grad and not metrics.requires_grad
    torch.testing.assert_close(scores.cpu().double(), exact, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(metrics.cpu().double(), right, atol=1e-5, rtol=1e-5)
    again = pairwise_loss(scores[which["chosen"]], scores[which["rejected"]])
    torch.testing.assert_close(loss, again, atol=1e-6, rtol=1e-6)


def test_head_in_fp32_on_bf16_hidden_states(device):
    """The usual case: the weight is read as it is, and its gradient is not rounded."""
    given = inputs(8, 64)
    hidden = given["hidden"].to(device, torch.bfloat16).requires_grad_()
    weight = given["weight"].to(device).requires_grad_()
    which = {name: t.to(device) for name, t in pairs(8, 4).items()}
    found = torch.autograd.grad(3 * reward_loss(hidden, weight, **which)[0], (hidden, weight))
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    right = torch.autograd.grad(3 * reward_loss_reference(*exact, **which)[0], exact)
    assert (found[0].dtype, found[1].dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(found[0].double(), right[0], atol=1e-5, rtol=2.0**-7)
    torch.testing.assert_close(found[1].double(), right[1], atol=1e-6, rtol=1e-5)


def test_two_runs_are_bitwise_equal(device, launches):
    given = {name: t.to(device).requires_grad_() for name, t in inputs(50, 64).items()}
    which = {name: t.to(device) for name, t in pairs(50, 25).items()}
    runs = []
    for _ in range(2):
        loss, scores, metrics = reward_loss(**given, **which)
        runs.append((loss, scores, metrics, *torch.autograd.grad(loss, tuple(given.values()))))
    assert all(map(torch.equal, *runs))


@pytest.mark.reference
def test_reference_gradcheck():
    hidden = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(1, 5, dtype=torch.float64, requires_grad=True)
    which, margin = pairs(6, 3), torch.rand(3, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda hidden, weight: reward_loss_reference(
            hidden, weight, which["chosen"], which["rejected"], margin, 0.2
        )[0],
        (hidden, weight),
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(2, 8)}, r"weight \[1, C\].*\(2, 8\)"),
        ({"hidden": torch.zeros(1, 4, 8)}, r"\(1, 4, 8\)"),
        ({"rejected": torch.tensor([1, 2])}, r"rejected must be \[P\]"),
        ({"margin": torch.zeros(2)}, r"margin must be \[P\]"),
        ({"chosen": torch.zeros(1)}, "must be rows, found torch.float32"),
        (
            {name: torch.zeros(0, dtype=torch.int64) for name in ("chosen", "rejected")},
            "at least one pair",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_arguments(device, change, message):
    given = {
        "hidden": torch.zeros(4, 8),
        "weight": torch.zeros(1, 8),
        "chosen": torch.tensor([0]),
        "rejected": torch.tensor([1]),
    }
    with pytest.raises(ValueError, match=message):
        reward_loss(**{name: t.to(device) for name, t in (given | change).items()})

"""linear_cross_entropy: the loss whose gradients are made in the forward pass."""

from __future__ import annotations

import importlib
import math

import pytest
import torch

from fastllm.ops import linear_cross_entropy, linear_logprob
from fastllm.ops.linear_logprob import linear_logprob_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [
    (1, 8, 11),
    (7, 20, 259),
    (5, 129, 1000),
    (3, 8, 5003),
    pytest.param((33, 128, 259), marks=pytest.mark.large),
    pytest.param((3, 16, 32003), marks=pytest.mark.large),
]


def inputs(rows, channels, vocabulary, spread=1.0):
    return {
        "hidden": torch.randn(rows, channels) * spread,
        "weight": torch.randn(vocabulary, channels) / math.sqrt(channels),
    }


def targets(rows, vocabulary):
    ids = torch.randint(vocabulary, (rows,))
    ids[:1], ids[-1:] = 0, vocabulary - 1
    return {"targets": ids}


@pytest.fixture
def small_chunks(monkeypatch):
    module = importlib.import_module("fastllm.ops.logit_chunks")
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", {"cpu": 1, "cuda": 1})
    monkeypatch.setattr(module, "_FEWEST_ROWS", {"cpu": 4, "cuda": 4})
    monkeypatch.setattr(module, "_FEWEST_ELEMENTS", 1)


def cross_entropy(hidden, weight, targets, token_weights=None, **options):
    """With logits in fp32, also on a GPU; test_narrow_logits.py has the others."""
    options = {"logits_dtype": torch.float32, **options}
    return linear_cross_entropy(hidden, weight, targets, token_weights, **options)[0]


def cross_entropy_reference(hidden, weight, targets, token_weights=None, **options):
    logp = linear_logprob_reference(hidden, weight, targets, **options)
    return -(logp if token_weights is None else logp * token_weights).sum()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", [*SHAPES, (0, 8, 11)])
def test_cross_entropy_and_its_gradients(matches_reference, small_chunks, shape, weighted, dtype):
    rows, _, vocabulary = shape
    constants = targets(rows, vocabulary)
    if weighted:
        constants["token_weights"] = torch.randn(rows)
    matches_reference(
        cross_entropy,
        cross_entropy_reference,
        inputs(*shape, spread=3.0),
        dtype,
        constants=constants,
    )


@pytest.mark.parametrize("frozen", [(), ("weight",), ("hidden",)])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.3}, {"softcap": 2.0}], ids=str)
def test_cross_entropy_with_options(matches_reference, small_chunks, options, frozen):
    matches_reference(
        cross_entropy,
        cross_entropy_reference,
        inputs(6, 20, 53, spread=4.0),
        constants=targets(6, 53) | {"token_weights": torch.arange(6.0)},
        frozen=frozen,
        **options,
    )


@pytest.mark.parametrize("strides", ["every_other_row", "every_other_column", "transposed"])
def test_cross_entropy_of_strided_tensors(matches_reference, small_chunks, strides):
    matches_reference(
        cross_entropy,
        cross_entropy_reference,
        inputs(6, 8, 11),
        constants={**targets(6, 11), "token_weights": torch.rand(12)[::2]},
        strides=strides,
    )


def test_cross_entropy_reports_what_linear_logprob_does(device, small_chunks):
    given = {name: t.to(device).requires_grad_() for name, t in inputs(9, 8, 31).items()}
    ids = targets(9, 31)["targets"].to(device)
    logp, entropy = linear_logprob(**given, targets=ids, entropy=True)
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            loss, own_logp, own_entropy = linear_cross_entropy(**given, targets=ids)
        assert torch.equal(own_logp, logp) and torch.equal(own_entropy, entropy)
        torch.testing.assert_close(loss, -logp.sum())
        assert loss.requires_grad == enabled
        assert not own_logp.requires_grad and not own_entropy.requires_grad


def test_cross_entropy_multiplies_no_more_than_it_must(backend, monkeypatch):
    """Three products with gradients, all in the forward pass; one without."""
    if backend == "torch":
        pytest.skip("the reference recomputes the logits")
    module = importlib.import_module("fastllm.ops.logit_chunks")
    products = []
    original = module.matmul
    monkeypatch.setattr(module, "matmul", lambda *a, **k: products.append(a) or original(*a, **k))
    given = {name: t.requires_grad_() for name, t in inputs(9, 8, 31).items()}
    ids = targets(9, 31)["targets"]
    with torch.no_grad():
        linear_cross_entropy(**given, targets=ids)
    assert len(products) == 1
    loss = linear_cross_entropy(**given, targets=ids)[0]
    assert len(products) == 4
    loss.backward()
    assert len(products) == 4


def test_cross_entropy_is_differentiated_once(backend):
    if backend == "torch":
        pytest.skip("the reference keeps its graph")
    given = {name: t.requires_grad_() for name, t in inputs(5, 8, 11).items()}
    loss = linear_cross_entropy(**given, targets=targets(5, 11)["targets"])[0]
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="can be asked for once"):
        loss.backward()


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (torch.ones(4), r"token_weights must be \[5\].*found \(4,\)"),
        (torch.ones(5, requires_grad=True), "without gradient.*requires_grad=True"),
    ],
)
def test_wrong_token_weights(weights, message):
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**inputs(5, 8, 11), **targets(5, 11), token_weights=weights)

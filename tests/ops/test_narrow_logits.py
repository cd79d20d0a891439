"""Logits in the dtype of the hidden states, the buffer that holds them, and the kernels on it."""

from __future__ import annotations

import importlib
import math

import pytest
import torch

from fastllm.ops import linear_cross_entropy, linear_logprob
from fastllm.ops.linear_logprob import linear_logprob_reference
from fastllm.ops.logit_chunks import rows_at_once

NARROW = [torch.bfloat16, torch.float16]


def inputs(rows, channels, vocabulary, spread=1.0):
    return {
        "hidden": torch.randn(rows, channels) * spread,
        "weight": torch.randn(vocabulary, channels) / math.sqrt(channels),
    }


def targets(rows, vocabulary):
    ids = torch.randint(vocabulary, (rows,))
    ids[:1], ids[-1:] = 0, vocabulary - 1
    return {"targets": ids}


def narrow_logprob(hidden, weight, targets, **options):
    return linear_logprob(
        hidden, weight, targets, entropy=True, logits_dtype=hidden.dtype, **options
    )


def narrow_reference(hidden, weight, targets, **options):
    return linear_logprob_reference(
        hidden, weight, targets, entropy=True, logits_dtype=hidden.dtype, **options
    )


def narrow_cross_entropy(hidden, weight, targets, token_weights):
    narrow = hidden.dtype
    return linear_cross_entropy(hidden, weight, targets, token_weights, logits_dtype=narrow)[0]


def narrow_cross_entropy_reference(hidden, weight, targets, token_weights):
    narrow = hidden.dtype
    logp = linear_logprob_reference(hidden, weight, targets, logits_dtype=narrow)
    return -(token_weights * logp).sum()


@pytest.fixture
def small_chunks(monkeypatch):
    module = importlib.import_module("fastllm.ops.logit_chunks")
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", {"cpu": 1, "cuda": 1})
    monkeypatch.setattr(module, "_FEWEST_ROWS", {"cpu": 4, "cuda": 4})
    monkeypatch.setattr(module, "_FEWEST_ELEMENTS", 1)


@pytest.fixture
def kernels(backend):
    """The raw Triton kernels."""
    if backend != "triton":
        pytest.skip("they are Triton's")
    return importlib.import_module("fastllm.kernels.linear_logprob")


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("options", [{}, {"softcap": 5.0, "temperature": 0.7}], ids=str)
@pytest.mark.parametrize("shape", [(7, 20, 259), (3, 16, 5003)], ids=str)
def test_logprob(matches_reference, small_chunks, shape, options, dtype):
    matches_reference(
        narrow_logprob,
        narrow_reference,
        inputs(*shape, spread=2.0),
        dtype,
        constants=targets(shape[0], shape[2]),
        **options,
    )


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("shape", [(7, 20, 259), (3, 16, 5003)], ids=str)
def test_cross_entropy(matches_reference, small_chunks, shape, dtype):
    matches_reference(
        narrow_cross_entropy,
        narrow_cross_entropy_reference,
        inputs(*shape, spread=2.0),
        dtype,
        constants={**targets(shape[0], shape[2]), "token_weights": torch.rand(shape[0])},
    )


def test_only_the_logits_are_rounded(device):
    """Equal logits: whatever they are rounded to, the results are exact, and fp32."""
    hidden = torch.ones(3, 8, device=device, dtype=torch.bfloat16)
    weight = torch.full((1000, 8), 0.3, device=device, dtype=torch.bfloat16)
    ids = torch.tensor([0, 5, 999], device=device)
    logp, entropy = narrow_logprob(hidden, weight, ids)
    assert logp.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close(logp.cpu(), torch.full((3,), -math.log(1000)))
    torch.testing.assert_close(entropy.cpu(), torch.full((3,), math.log(1000)))


def test_other_dtypes_are_refused(device):
    given = {name: t.to(device) for name, t in inputs(2, 8, 11).items()}
    ids = torch.tensor([0, 1], device=device)
    for function in (linear_logprob, linear_cross_entropy):
        with pytest.raises(ValueError, match=r"must be torch\.float32.*found torch\.bfloat16"):
            function(**given, targets=ids, logits_dtype=torch.bfloat16)


def test_gradients_are_given_away_not_copied(backend, device):
    """The weight's gradient is large: what the forward pass made becomes the parameter's."""
    if backend == "torch":
        pytest.skip("PyTorch makes its own")
    module = importlib.import_module("fastllm.ops.linear_logprob")
    given = {name: t.to(device).requires_grad_() for name, t in inputs(5, 8, 11).items()}
    made = []

    class Recorded(module.Gradients):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            made.append(self.weight.data_ptr())

    original, module.Gradients = module.Gradients, Recorded
    try:
        loss = linear_cross_entropy(**given, **targets(5, 11))[0]
    finally:
        module.Gradients = original
    loss.backward()
    assert given["weight"].grad.data_ptr() == made[0]


@pytest.fixture
def products(monkeypatch, backend):
    """The products on a GPU, in their order: CPU tensors say that they are on one.

    PyTorch has those that widen on a GPU only; what they compute is done in fp32 here.
    """
    if backend != "triton" or torch.cuda.is_available():
        pytest.skip("a matter of the interpreter: a GPU has tests of its own")
    made, product = [], torch.mm

    def mm(a, b, out_dtype=None, out=None):
        assert a.dtype == b.dtype
        result = product(a.float(), b.float()).to(out_dtype or a.dtype)
        assert out is None or (out.shape, out.dtype) == (result.shape, result.dtype)
        made.append("new" if out is None else "in place")
        return result if out is None else out.copy_(result)

    def addmm(total, a, b, out_dtype, out):
        assert a.dtype == b.dtype and total is out and out.dtype == out_dtype == torch.float32
        made.append("added")
        return out.add_(product(a.float(), b.float()))

    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda _: True))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(torch, "addmm", addmm)
    return made


@pytest.mark.parametrize("wide_weight", [False, True])
@pytest.mark.parametrize("vocabulary", [64, 259])
def test_a_gpus_products_leave_nothing_beside_the_buffers(
    products, small_chunks, vocabulary, wide_weight
):
    """Two chunks: three products each with known weights, four where logits are computed again."""
    given = {name: t.bfloat16().requires_grad_() for name, t in inputs(7, 32, vocabulary).items()}
    exact = {name: t.detach().double().requires_grad_() for name, t in given.items()}
    if wide_weight:
        given["weight"] = given["weight"].detach().float().requires_grad_()
    ids = targets(7, vocabulary)
    first, last = ["in place"] * 3, ["in place"] * 2 + ["added"]
    for of_loss, form in ((True, first + last), (False, ["in place"] * 2 + first + last)):
        products.clear()
        loss = (
            linear_cross_entropy(**given, **ids)[0]
            if of_loss
            else -linear_logprob(**given, **ids).sum()
        )
        found = torch.autograd.grad(loss, tuple(given.values()))
        assert products == form
        right = torch.autograd.grad(
            -linear_logprob_reference(**exact, **ids).sum(), tuple(exact.values())
        )
        for value, expected, tensor in zip(found, right, given.values(), strict=True):
            assert value.dtype == tensor.dtype
            assert (value.double() - expected).norm() <= 1e-2 * expected.norm()


# -- how large a chunk is --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "vocabulary", "itemsize", "expected"),
    [
        (4096, 128256, 2, 4096),  # the goal: one chunk of 1.05 GB
        (16384, 128256, 2, 4096),
        (5000, 128256, 2, 2560),  # two even chunks of whole tiles, not a large and a small one
        (4096, 128256, 4, 2048),
        (100, 128256, 2, 128),
        (8192, 262144, 4, 2048),  # never fewer, even if they take 2 GB
        (100_000, 50257, 2, 10112),
        (0, 11, 2, 128),
    ],
)
def test_rows_of_a_chunk_on_a_gpu(rows, vocabulary, itemsize, expected):
    assert rows_at_once(rows, vocabulary, itemsize, on_gpu=True) == expected


# -- the kernels -----------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [37, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padding_is_read_for_nothing(kernels, device, width, dtype):
    """Rows with a stride, and in the padding numbers that would win every comparison."""
    vocabulary, ids = 37, torch.tensor([0, 36, 5], device=device)
    logits = torch.randn(3, 80, device=device).to(dtype)
    logits[:, vocabulary:] = float("inf")
    exact = logits[:, :vocabulary].double().requires_grad_()
    expected = exact.log_softmax(-1).gather(1, ids[:, None]).squeeze(1)
    found, _, _ = kernels.forward(logits[:, :width], ids, 1.0, 0.0, vocabulary)
    torch.testing.assert_close(found, expected.detach().float(), atol=1e-5, rtol=1e-5)

    (gradient,) = torch.autograd.grad(expected.sum(), exact)
    kernels.forward_backward_(
        logits[:, :width], ids, torch.ones(3, device=device), 1.0, 0.0, vocabulary
    )
    tolerance = 1e-5 if dtype == torch.float32 else 2.0**-8
    torch.testing.assert_close(
        logits[:, :vocabulary].double(), gradient, atol=tolerance, rtol=tolerance
    )
    assert not logits[:, vocabulary:width].any()
    assert logits[:, width:].isinf().all()


@pytest.mark.parametrize("vocabulary", [4096, 5003, 12289])
@pytest.mark.parametrize("fused", [False, True])
def test_a_narrow_gradient_in_wide_rows(kernels, device, vocabulary, fused):
    """It is written into the rows that are still being read, block by block."""
    logits = torch.randn(2, vocabulary, device=device) * 3
    ids = torch.tensor([1, vocabulary - 1], device=device)
    dlogp, nothing = torch.tensor([1.0, -2.0], device=device), torch.zeros(2, device=device)
    wide = logits.clone()
    logp, entropy, lse = kernels.forward(wide, ids, 0.5, 0.0)
    kernels.backward_(wide, ids, lse, entropy, dlogp, nothing, 0.5, 0.0)
    narrow = torch.bfloat16
    if fused:
        again = kernels.forward_backward_(logits, ids, dlogp, 0.5, 0.0, None, narrow)
        for value, expected in zip(again, (logp, entropy, lse), strict=True):
            torch.testing.assert_close(value, expected, atol=1e-5, rtol=1e-5)
    else:
        kernels.backward_(logits, ids, lse, entropy, dlogp, nothing, 0.5, 0.0, vocabulary, narrow)
    found = kernels.gradient_in(logits, narrow)
    assert found.shape == wide.shape and found.dtype == narrow
    torch.testing.assert_close(found.float(), wide, atol=1e-6, rtol=2.0**-8)


@pytest.mark.parametrize("bad", [-100, 37, 1 << 32])
def test_unknown_targets_give_nan(kernels, device, bad):
    logits = torch.randn(2, 37, device=device)
    ids = torch.tensor([bad, 3], device=device)
    dlogp = torch.tensor([0.0, -1.0], device=device)
    logp, entropy, _ = kernels.forward_backward_(logits, ids, dlogp, 1.0, 0.0)
    assert logp.isnan().tolist() == [True, False] and entropy.isfinite().all()
    assert not logits[0].any() and logits[1].isfinite().all()


def test_what_is_not_finite_stays_so(kernels, device):
    logits = torch.randn(4, 37, device=device)
    logits[0, 3], logits[1, 4], logits[2, 5] = float("nan"), float("inf"), float("-inf")
    ids = torch.zeros(4, dtype=torch.int64, device=device)
    logp, entropy, lse = kernels.forward(logits, ids, 1.0, 0.0)
    for found in (logp, entropy, lse):
        assert found.isfinite().tolist()[2:] == [True, True]
        assert not found[:1].isfinite().any()
    assert not logp[1].isfinite() or logp[1] == -math.inf


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scaling_in_place(kernels, device, dtype):
    x = torch.randn(7, 1001, device=device).to(dtype)
    for factor in (1.0, 0.37):
        found = x.clone()
        kernels.scale_(found, torch.tensor(factor, device=device))
        torch.testing.assert_close(found, (x.float() * factor).to(dtype), atol=0, rtol=2.0**-7)
        assert factor != 1 or torch.equal(found, x)


# -- on a GPU --------------------------------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.parametrize("wide_weight", [False, True])
def test_memory_beyond_the_gradients(backend, wide_weight):
    """C: 1.2 GB at 4,096 rows and a vocabulary of 128,256; channels do not count."""
    rows, channels, vocabulary = 4096, 512, 128256
    hidden = torch.randn(rows, channels, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(vocabulary, channels, device="cuda") / math.sqrt(channels)
    weight = (weight if wide_weight else weight.bfloat16()).requires_grad_()
    ids = torch.randint(vocabulary, (rows,), device="cuda")
    linear_cross_entropy(hidden[:8], weight, ids[:8])[0].backward()
    hidden.grad = weight.grad = None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    linear_cross_entropy(hidden, weight, ids)[0].backward()
    copy = vocabulary * channels * 2 if wide_weight else 0
    extra = torch.cuda.max_memory_allocated() - before - hidden.nbytes - weight.nbytes - copy
    assert extra <= 1.2e9


@pytest.mark.cuda
def test_the_gradient_past_2_to_the_31_elements(backend):
    kernels = importlib.import_module("fastllm.kernels.linear_logprob")
    rows, vocabulary = 2**31 // 131072 + 2, 131072
    logits = torch.zeros(rows, vocabulary, dtype=torch.bfloat16, device="cuda")
    ids = torch.full((rows,), vocabulary - 1, device="cuda")
    dlogp = torch.ones(rows, device="cuda")
    kernels.forward_backward_(logits, ids, dlogp, 1.0, 0.0)
    assert logits[-1, -1].item() == pytest.approx(1.0, rel=1e-2)
    assert logits[-1, 0].item() == pytest.approx(-1 / vocabulary, rel=1e-2)

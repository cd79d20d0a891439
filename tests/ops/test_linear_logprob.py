from __future__ import annotations

import importlib
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastllm.ops import linear_cross_entropy, linear_logprob
from fastllm.ops.linear_logprob import linear_logprob_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [
    (1, 8, 11),
    (7, 20, 259),
    (5, 129, 1000),
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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_and_gradients(matches_reference, shape, entropy, dtype):
    rows, _, vocabulary = shape
    matches_reference(
        linear_logprob,
        linear_logprob_reference,
        inputs(*shape, spread=3.0),
        dtype,
        constants=targets(rows, vocabulary),
        entropy=entropy,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.3},
        {"temperature": 2.5},
        {"softcap": 2.0},
        {"softcap": 30.0, "temperature": 0.7},
    ],
    ids=str,
)
def test_temperature_and_softcap(matches_reference, options, dtype):
    matches_reference(
        linear_logprob,
        linear_logprob_reference,
        inputs(6, 20, 53, spread=4.0),
        dtype,
        constants=targets(6, 53),
        entropy=True,
        **options,
    )


@pytest.mark.parametrize("only_output", [0, 1], ids=["only logp", "only entropy"])
def test_gradient_of_one_output(matches_reference, only_output):
    matches_reference(
        linear_logprob,
        linear_logprob_reference,
        inputs(6, 8, 31),
        constants=targets(6, 31),
        entropy=True,
        only_output=only_output,
    )


@pytest.mark.parametrize("rows", [1, 4, 5, 11])
def test_chunks_do_not_show(matches_reference, small_chunks, rows):
    matches_reference(
        linear_logprob,
        linear_logprob_reference,
        inputs(rows, 8, 31),
        constants=targets(rows, 31),
        entropy=True,
    )


@pytest.mark.parametrize(
    ("strides", "grad_strides"),
    [
        ("every_other_row", "expanded"),
        ("every_other_column", "every_other_row"),
        ("transposed", "inside"),
        ("inside", "contiguous"),
        ("expanded", "expanded"),
    ],
)
def test_strided_tensors(matches_reference, small_chunks, strides, grad_strides):
    matches_reference(
        linear_logprob,
        linear_logprob_reference,
        inputs(6, 8, 11),
        constants={"targets": targets(12, 11)["targets"][::2]},
        strides=strides,
        grad_strides=grad_strides,
        entropy=True,
    )


@pytest.mark.parametrize("frozen", [("weight",), ("hidden",)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frozen_inputs_get_no_gradient(matches_reference, frozen, dtype):
    matches_reference(
        linear_logprob,
        linear_logprob_reference,
        inputs(6, 8, 11),
        dtype,
        constants=targets(6, 11),
        frozen=frozen,
    )


@pytest.mark.parametrize("entropy", [False, True])
def test_no_rows(matches_reference, entropy):
    found = matches_reference(
        linear_logprob,
        linear_logprob_reference,
        inputs(0, 8, 11),
        constants=targets(0, 11),
        entropy=entropy,
    )
    assert not found.gradient_of_weight.any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_logits(matches_reference, dtype):
    """Logits of thousands: the largest one wins, and nothing overflows.

    A logit is known to one unit in its last place, and so is everything made from it.
    """
    found = matches_reference(
        linear_logprob,
        linear_logprob_reference,
        inputs(6, 16, 37, spread=2000.0),
        dtype,
        constants=targets(6, 37),
        entropy=True,
        rtol=5000 * 2.0**-23,
    )
    assert (found.output_0 <= 0).all()
    assert (found.output_1 >= -1e-4).all()


def test_equal_logits(device):
    hidden = torch.zeros(3, 8, device=device, requires_grad=True)
    logp, entropy = linear_logprob(
        hidden,
        torch.randn(13, 8, device=device),
        torch.tensor([0, 5, 12], device=device),
        entropy=True,
    )
    torch.testing.assert_close(logp.cpu(), torch.full((3,), -math.log(13)))
    torch.testing.assert_close(entropy.cpu(), torch.full((3,), math.log(13)))
    entropy.sum().backward()
    assert hidden.grad.abs().max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_integer_types_of_the_targets(device, dtype):
    given = {name: t.to(device) for name, t in inputs(5, 8, 11).items()}
    ids = targets(5, 11)["targets"].to(device)
    assert torch.equal(
        linear_logprob(**given, targets=ids), linear_logprob(**given, targets=ids.to(dtype))
    )


def test_outputs_are_fp32_for_bf16_inputs(device):
    given = {name: t.to(device, torch.bfloat16) for name, t in inputs(5, 8, 11).items()}
    outputs = linear_logprob(**given, targets=targets(5, 11)["targets"].to(device), entropy=True)
    assert [t.dtype for t in outputs] == [torch.float32] * 2


def test_fp32_head_on_bf16_hidden_states(device):
    """A mixed call must be exact or refused, not silently read the wrong bytes."""
    hidden = torch.randn(5, 8, device=device, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(11, 8, device=device, requires_grad=True)
    ids = targets(5, 11)["targets"].to(device)
    linear_logprob(hidden, weight, ids).sum().backward()
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    linear_logprob_reference(*exact, ids).sum().backward()
    assert (hidden.grad.dtype, weight.grad.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(hidden.grad.double(), exact[0].grad, atol=2e-2, rtol=1e-2)
    torch.testing.assert_close(weight.grad.double(), exact[1].grad, atol=2e-2, rtol=1e-2)


class _LargestTensor(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                self.elements = max(self.elements, tensor.numel())
        return result


def test_logits_are_never_whole(device, small_chunks):
    given = {name: t.to(device).requires_grad_() for name, t in inputs(24, 8, 61).items()}
    ids = targets(24, 61)["targets"].to(device)
    with _LargestTensor() as largest:
        linear_logprob(**given, targets=ids).sum().backward()
        linear_cross_entropy(**given, targets=ids)[0].backward()
    assert largest.elements < 24 * 61 / 2


def test_a_chunk_is_a_sixteenth_of_the_logits_and_their_gradient_at_most():
    chunk_rows = importlib.import_module("fastllm.ops.logit_chunks").chunk_rows
    weight = torch.empty(32000, 1)
    for rows in (1024, 2048, 4096, 100_000):
        chunk = chunk_rows(torch.empty(rows, 1), weight)
        assert 64 <= chunk <= 2 * rows / 16 and chunk * 32000 <= 1 << 23


@pytest.mark.reference
def test_reference_equals_torch():
    given, ids = inputs(5, 8, 11), targets(5, 11)["targets"]
    logits = given["hidden"] @ given["weight"].t()
    logp, entropy = linear_logprob_reference(**given, targets=ids, entropy=True)
    torch.testing.assert_close(
        -logp, torch.nn.functional.cross_entropy(logits, ids, reduction="none")
    )
    torch.testing.assert_close(entropy, torch.distributions.Categorical(logits=logits).entropy())
    capped = linear_logprob_reference(**given, targets=ids, softcap=2.0, temperature=0.5)
    expected = (2.0 * torch.tanh(logits / 2.0) / 0.5).log_softmax(-1)
    torch.testing.assert_close(capped, expected[torch.arange(5), ids])


@pytest.mark.reference
def test_reference_gradcheck():
    given = {n: t.double().requires_grad_() for n, t in inputs(3, 4, 5).items()}
    ids = torch.tensor([0, 4, 2])
    assert torch.autograd.gradcheck(
        lambda hidden, weight: linear_logprob_reference(hidden, weight, ids, 0.7, 3.0, True),
        tuple(given.values()),
    )


def test_two_runs_are_bitwise_equal(device, small_chunks):
    given = {name: t.to(device).requires_grad_() for name, t in inputs(9, 8, 31).items()}
    ids = targets(9, 31)["targets"].to(device)
    runs = []
    for _ in range(2):
        logp = linear_logprob(**given, targets=ids)
        runs.append((logp, *torch.autograd.grad(logp.sum(), tuple(given.values()))))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize(
    ("hidden", "weight", "ids", "options", "message"),
    [
        ((5, 8), (11, 7), [0] * 5, {}, r"\(5, 8\).*\(11, 7\)"),
        ((1, 5, 8), (11, 8), [0] * 5, {}, r"\(1, 5, 8\)"),
        ((5, 8), (11, 8), [0] * 4, {}, r"integers \[5\]"),
        ((5, 8), (11, 8), [0.0] * 5, {}, r"integers \[5\]"),
        ((5, 8), (11, 8), [0, 1, 2, 3, 4], {"temperature": 0.0}, "positive.*0.0"),
        ((5, 8), (11, 8), [0, 1, 2, 3, 4], {"softcap": -1.0}, "positive.*-1.0"),
    ],
)
def test_wrong_arguments(device, hidden, weight, ids, options, message):
    with pytest.raises(ValueError, match=message):
        linear_logprob(
            torch.zeros(hidden, device=device),
            torch.zeros(weight, device=device),
            torch.tensor(ids, device=device),
            **options,
        )


@pytest.mark.parametrize("bad", [-100, -1, 11])
def test_targets_out_of_range(device, bad):
    if device.type == "cuda":
        pytest.skip("checking on a GPU would stop it; its kernels mask")
    with pytest.raises(ValueError, match=rf"0\.\.10, found .*{bad}"):
        linear_logprob(torch.zeros(2, 8), torch.zeros(11, 8), torch.tensor([3, bad]))


@pytest.mark.cuda
def test_offsets_past_2_to_the_31_elements(backend):
    """The kernel on its own: one chunk of logits with more than 2^31 elements."""
    kernel = importlib.import_module("fastllm.kernels.linear_logprob")
    rows, vocabulary = 2**31 // 131072 + 2, 131072
    logits = torch.zeros(rows, vocabulary, dtype=torch.bfloat16, device="cuda")
    logits[-1, -1] = 5.0
    ids = torch.full((rows,), vocabulary - 1, device="cuda")
    logp, _, _ = kernel.forward(logits, ids, 1.0, 0.0)
    expected = 5.0 - math.log(vocabulary - 1 + math.exp(5.0))
    assert logp[-1].item() == pytest.approx(expected, rel=1e-4)

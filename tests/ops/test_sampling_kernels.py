"""Drawing tokens in Triton, against the definition in PyTorch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fastllm.generation.device_rows import advance_reference_
from fastllm.generation.sampling import SamplingRows, random_keys, sample, sample_reference
from fastllm.ops.backend import kernels

# One more than a multiple of the tokens that a program reads, and fewer than that.
SIZES = [(3, 61), (2, 4096), (5, 4097), (2, 9000)]


def rows_of(number, vocabulary, penalised=False, **changes):
    ids = torch.arange(number)
    ones = torch.ones(number)
    rows = SamplingRows(
        temperature=torch.tensor([1.0, 0.0, 0.6, 1.7, 2.5])[:number].clone(),
        top_p=ones,
        min_p=0 * ones,
        repetition_penalty=torch.linspace(0.7, 1.8, number),
        top_k=torch.zeros(number, dtype=torch.int32),
        key=random_keys(3, ids, ids),
        count=torch.arange(number, dtype=torch.int32),
        min_count=torch.full((number,), 2, dtype=torch.int32),
        stop_tokens=torch.tensor([[-1, 0, 5]] * number, dtype=torch.int32),
        seen=torch.randint(0, 2, (number, vocabulary if penalised else 0), dtype=torch.uint8),
    )
    return replace(rows, **changes)


def moved(rows, device):
    return SamplingRows(*(getattr(rows, name).to(device) for name in rows.__dataclass_fields__))


@pytest.fixture
def check(device, backend):
    if backend != "triton":
        pytest.skip("tests/generation/test_sampling.py has the others")

    def check(logits, rows):
        expected = sample_reference(logits.double(), rows, filtered=False)
        found = sample(logits.to(device), moved(rows, device), filtered=False)
        assert torch.equal(found.token_ids.cpu(), expected.token_ids)
        for name in ("logprobs", "sampling_logprobs"):
            one, other = getattr(found, name).double().cpu(), getattr(expected, name)
            torch.testing.assert_close(one, other.double(), atol=1e-5, rtol=1e-5)
        return found

    return check


@pytest.mark.parametrize("penalised", [False, True])
@pytest.mark.parametrize(("number", "vocabulary"), SIZES)
def test_draws_what_the_definition_draws(check, number, vocabulary, penalised):
    check(4 * torch.randn(number, vocabulary), rows_of(number, vocabulary, penalised))


def test_many_draws(check):
    for seed in range(6):
        keys = random_keys(seed, torch.arange(5), torch.zeros(5, dtype=torch.int64))
        check(torch.randn(5, 300), rows_of(5, 300, key=keys))


def test_a_certain_token_and_impossible_ones(check):
    logits = torch.full((5, 5000), -torch.inf)
    logits[torch.arange(5), torch.tensor([0, 4095, 4096, 4999, 7])] = 3.0
    logits[2, 4500] = 3.0
    check(logits, rows_of(5, 5000, min_count=torch.zeros(5, dtype=torch.int32)))


def test_the_likeliest_is_the_first_of_equals(check):
    logits = torch.randn(5, 5000)
    logits[:, [4097, 4500]] = 9.0
    found = check(logits, rows_of(5, 5000, temperature=torch.zeros(5)))
    assert found.token_ids.tolist() == [4097] * 5


def test_stop_tokens_come_late(check):
    logits = torch.zeros(5, 61)
    logits[:, 5] = 40.0
    rows = rows_of(5, 61, temperature=torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0]))
    found = check(logits, rows)
    assert (found.token_ids == 5).tolist() == [False, False, True, True, True]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_give_none(device, backend, bad):
    logits = torch.randn(5, 4500)
    logits[:, 4300] = bad
    found = sample(logits.to(device), moved(rows_of(5, 4500), device), filtered=False)
    assert not found.logprobs.isfinite().any()
    assert ((found.token_ids >= 0) & (found.token_ids < 4500)).all()


def test_a_row_depends_on_itself_alone(device, backend):
    logits, rows = torch.randn(5, 4500).to(device), moved(rows_of(5, 4500), device)
    together = sample(logits, rows, filtered=False)
    for row in range(5):
        part = SamplingRows(*(getattr(rows, n)[row : row + 1] for n in rows.__dataclass_fields__))
        alone = sample(logits[row : row + 1], part, filtered=False)
        for one, other in zip(alone, together, strict=True):
            assert torch.equal(one, other[row : row + 1])


@pytest.mark.cuda
def test_offsets_past_two_thousand_million(backend):
    """256 rows of the largest vocabulary stay below 2^31 elements; a vocabulary need not."""
    vocabulary = 1 << 20
    logits = torch.randn(8, vocabulary, device="cuda").repeat(320, 1)
    ones = torch.ones(2560, device="cuda")
    whole = torch.zeros(2560, dtype=torch.int32, device="cuda")
    rows = SamplingRows(
        ones, ones, 0 * ones, ones, whole, torch.arange(2560, device="cuda") % 8,
        whole, whole, whole[:, None] - 1, torch.zeros(2560, 0, dtype=torch.uint8, device="cuda"),
    )  # fmt: skip
    found = sample(logits, rows, filtered=False)
    assert torch.equal(found.token_ids.view(320, 8), found.token_ids[:8].expand(320, 8))


@pytest.mark.parametrize("penalised", [False, True])
@pytest.mark.parametrize(("number", "used"), [(1, 1), (8, 5), (130, 130)])
def test_rows_move_on_as_defined(device, backend, number, used, penalised):
    """Several steps, in which rows end with a stop token or with their last one."""
    if backend != "triton":
        pytest.skip("advance_reference_ is the definition")
    steps, vocabulary = 4, 30
    state = torch.zeros(7, number, dtype=torch.int32)
    state[0] = torch.randint(0, 50, (number,))
    state[1] = torch.randint(60, 66, (number,))
    state[4] = torch.randint(0, 9, (number,))
    state[5] = 1
    given = {
        "used": torch.tensor([used], dtype=torch.int32),
        "token": torch.randint(0, vocabulary, (number,)),
        "state": state,
        "max_count": state[4] + torch.randint(1, 6, (number,), dtype=torch.int32),
        "stop_tokens": torch.randint(-1, 9, (number, 2), dtype=torch.int32),
        "tail_blocks": torch.randint(0, 99, (number, 2), dtype=torch.int32),
        "seen": torch.zeros(number, vocabulary if penalised else 0, dtype=torch.uint8),
        "out": torch.zeros(steps, 3, number, dtype=torch.int32),
    }
    drawn = [
        (torch.randint(0, vocabulary, (number,)), torch.randn(number), torch.randn(number))
        for _ in range(steps)
    ]
    expected = {name: tensor.clone() for name, tensor in given.items()}
    found = {name: tensor.to(device) for name, tensor in given.items()}
    raw = kernels("sampling", found["state"].float())
    for step in drawn:
        advance_reference_(*step, **expected)
        raw.advance_(*(column.to(device) for column in step), **found)
    assert (expected["state"][6] == steps).all()
    if number > 1:
        assert 0 < expected["state"][5].sum() < number
    for name, tensor in expected.items():
        assert torch.equal(found[name].cpu(), tensor), name

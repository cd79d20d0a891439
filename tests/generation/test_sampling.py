"""Sampling: the distribution, the filters of `transformers`, and stateless randomness."""

from __future__ import annotations

import math

import pytest
import torch

from fastllm.generation import SamplingParams
from fastllm.generation.sampling import random_keys, sample, uniforms

DRAWS = 50_000


def _uniform(count: int, seed: int = 0) -> torch.Tensor:
    ids = torch.arange(count)
    return uniforms(random_keys(seed, ids, torch.zeros_like(ids)), torch.zeros_like(ids))


def _chi_squared(tokens: torch.Tensor, probabilities: torch.Tensor) -> tuple[float, float]:
    """The statistic, and a bound that it passes once in some 30,000 times."""
    expected = probabilities.double() * tokens.numel()
    assert expected[expected > 0].min() > 5, "too few draws for this test"
    counts = torch.bincount(tokens, minlength=probabilities.numel())
    assert not counts[probabilities == 0].any(), "a token of probability 0 was drawn"
    held = expected > 0
    statistic = ((counts[held] - expected[held]) ** 2 / expected[held]).sum()
    freedom = int(held.sum()) - 1
    return float(statistic), freedom + 4 * math.sqrt(2 * freedom)


def test_random_numbers_are_splitmix64():
    key = torch.tensor([0, 1234567, 1234567])
    bits = (uniforms(key, torch.tensor([0, 0, 1])).double() * 2**24).long()
    outputs = (0xE220A8397B1DCDAF, 6457827717110365317, 3203168211198807973)
    assert bits.tolist() == [output >> 40 for output in outputs]


def test_random_numbers_are_uniform_across_requests_samples_and_tokens():
    numbers = torch.arange(DRAWS)
    zeros = torch.zeros_like(numbers)
    one = random_keys(7, torch.tensor([5]), torch.tensor([0]))
    streams = {
        "requests": uniforms(random_keys(7, numbers, zeros), zeros),
        "samples": uniforms(random_keys(7, zeros, numbers), zeros),
        "tokens": uniforms(one.expand(DRAWS), numbers),
    }
    for name, drawn in streams.items():
        assert drawn.min() >= 0 and drawn.max() < 1
        statistic, bound = _chi_squared((drawn * 100).long(), torch.full((100,), 0.01))
        assert statistic < bound, name
        pairs = (drawn[:-1] * 10).long() * 10 + (drawn[1:] * 10).long()
        statistic, bound = _chi_squared(pairs, torch.full((100,), 0.01))
        assert statistic < bound, f"neighbours in {name}"


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63, 2**64 - 1, 10**30])
def test_any_integer_is_a_seed(seed):
    ids = torch.tensor([0, -(2**63), 2**63 - 1])
    keys = random_keys(seed, ids, torch.zeros_like(ids))
    assert len(set(keys.tolist())) == 3


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.6},
        {"temperature": 1.7, "top_k": 9},
        {"top_p": 0.7},
        {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.05},
    ],
    ids=str,
)
def test_frequencies_match_the_distribution(options):
    params = SamplingParams(**options)
    logits = torch.randn(40)
    drawn = sample(logits.expand(DRAWS, 40), params, _uniform(DRAWS))
    expected = _warped(logits[None], params).softmax(-1)[0]
    statistic, bound = _chi_squared(drawn.token_ids, expected)
    assert statistic < bound


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 5},
        {"top_k": 1},
        {"top_k": 1000},
        {"top_p": 0.8},
        {"top_p": 1e-6},
        {"min_p": 0.1},
        {"min_p": 1.0},
        {"repetition_penalty": 1.8},
        {"repetition_penalty": 0.7},
        {"temperature": 0.7, "top_k": 30, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.3},
    ],
    ids=str,
)
def test_filters_match_transformers(options):
    params = SamplingParams(**options)
    logits = 3 * torch.randn(64, 50)
    history = torch.randint(0, 50, (64, 7))
    seen = torch.zeros(64, 50, dtype=torch.bool).scatter_(1, history, True)
    expected = _warped(logits, params, history).log_softmax(-1)
    natural = (logits / params.temperature).log_softmax(-1)
    for round_ in range(8):
        drawn = sample(logits, params, _uniform(64, seed=round_), seen)
        tokens = drawn.token_ids[:, None]
        torch.testing.assert_close(drawn.sampling_logprobs, expected.gather(1, tokens)[:, 0])
        torch.testing.assert_close(drawn.logprobs, natural.gather(1, tokens)[:, 0])


def _warped(logits, params, history=None):
    """The logits as `transformers` warps them, in its order."""
    process = pytest.importorskip("transformers.generation.logits_process")
    warpers = [process.TemperatureLogitsWarper(float(params.temperature))]
    if params.repetition_penalty != 1:
        warpers.insert(0, process.RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    if params.top_k:
        warpers.append(process.TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        warpers.append(process.TopPLogitsWarper(params.top_p))
    if params.min_p:
        warpers.append(process.MinPLogitsWarper(params.min_p))
    for warper in warpers:
        logits = warper(history, logits)
    return logits


def test_greedy_takes_the_likeliest_and_reports_temperature_one():
    logits = torch.randn(6, 30)
    drawn = sample(logits, SamplingParams(temperature=0), _uniform(6))
    assert torch.equal(drawn.token_ids, logits.argmax(-1))
    torch.testing.assert_close(drawn.logprobs, logits.log_softmax(-1).amax(-1))
    assert drawn.sampling_logprobs.tolist() == [0] * 6


def test_greedy_with_a_penalty_avoids_what_was_seen():
    logits = torch.tensor([[3.0, 2.5, -1.0]])
    seen = torch.tensor([[True, False, False]])
    drawn = sample(logits, SamplingParams(temperature=0, repetition_penalty=2.0), _uniform(1), seen)
    assert drawn.token_ids.tolist() == [1]
    torch.testing.assert_close(drawn.logprobs, logits.log_softmax(-1)[:, 1])


def test_impossible_tokens_are_never_drawn_even_at_the_ends():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 1.0, -torch.inf]]).expand(3, 5)
    last_below_one = 1 - 2.0**-24
    drawn = sample(logits, SamplingParams(), torch.tensor([0.0, 0.5, last_below_one]))
    assert drawn.token_ids.tolist() == [1, 3, 3]
    # Cumulative sums end a little below or above 1; the search must not pass the last possible.
    many = torch.randn(5000, 19)
    many[:, 0] = many[:, -1] = -torch.inf
    for uniform in (0.0, last_below_one):
        tokens = sample(many, SamplingParams(), torch.full((5000,), uniform)).token_ids
        assert tokens.min() >= 1 and tokens.max() <= 17


def test_inputs_are_not_written():
    logits, seen = torch.randn(4, 20), torch.zeros(4, 20, dtype=torch.bool)
    before = logits.clone()
    params = SamplingParams(top_k=3, top_p=0.9, min_p=0.1, repetition_penalty=1.2)
    sample(logits, params, _uniform(4), seen)
    assert torch.equal(logits, before) and not seen.any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, r"temperature: expected a finite number >= 0.*found -0\.1"),
        ({"temperature": math.inf}, "temperature"),
        ({"temperature": math.nan}, "temperature.*found nan"),
        ({"top_k": -1}, r"top_k: expected >= 0 \(0 keeps all tokens\), found -1"),
        ({"top_p": 0.0}, r"top_p: expected a number in \(0, 1\], found 0\.0"),
        ({"top_p": 1.1}, "top_p"),
        ({"min_p": 1.5}, r"min_p: expected a number in \[0, 1\], found 1\.5"),
        ({"repetition_penalty": 0.0}, "repetition_penalty: expected a finite number > 0, found 0"),
    ],
    ids=str,
)
def test_options_out_of_range_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**options)

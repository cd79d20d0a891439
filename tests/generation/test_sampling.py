"""Sampling: the distribution, the filters of `transformers`, and stateless randomness."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from fastllm.generation import SamplingParams
from fastllm.generation.sampling import (
    Draw,
    SamplingRows,
    random_keys,
    sample,
    sample_reference,
    uniforms,
)

DRAWS = 50_000
DEFAULTS = SamplingParams()
COLUMNS = {
    "temperature": torch.float32,
    "top_p": torch.float32,
    "min_p": torch.float32,
    "repetition_penalty": torch.float32,
    "top_k": torch.int32,
}
FILTERS: list[dict[str, Any]] = [
    {"top_k": 5},
    {"top_k": 1},
    {"top_k": 1000},
    {"top_p": 0.8},
    {"top_p": 1e-6},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"repetition_penalty": 1.8},
    {"repetition_penalty": 0.7},
    {"top_k": 30, "top_p": 0.6},
    {"temperature": 0.7, "top_k": 30, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.3},
]


def rows_of(
    options: Sequence[dict[str, Any]],
    seed: int = 0,
    seen: torch.Tensor | None = None,
    stops: Sequence[int] = (),
    min_count: int = 0,
    count: int = 0,
) -> SamplingRows:
    """One row for each set of options, with a stream of its own."""
    number = len(options)
    ids = torch.arange(number)
    settings = {
        name: torch.tensor([row.get(name, getattr(DEFAULTS, name)) for row in options], dtype=dtype)
        for name, dtype in COLUMNS.items()
    }
    return SamplingRows(
        **settings,
        key=random_keys(seed, ids, torch.zeros_like(ids)),
        count=torch.full((number,), count, dtype=torch.int32),
        min_count=torch.full((number,), min_count, dtype=torch.int32),
        stop_tokens=torch.tensor(stops, dtype=torch.int32).repeat(number, 1),
        seen=torch.zeros(number, 0, dtype=torch.uint8) if seen is None else seen,
    )


def chi_squared(tokens: torch.Tensor, probabilities: torch.Tensor) -> tuple[float, float]:
    """The statistic, and a bound that it passes once in some 30,000 times."""
    expected = probabilities.double() * tokens.numel()
    assert expected[expected > 0].min() > 5, "too few draws for this test"
    counts = torch.bincount(tokens, minlength=probabilities.numel())
    assert not counts[probabilities == 0].any(), "a token of probability 0 was drawn"
    held = expected > 0
    statistic = ((counts[held] - expected[held]) ** 2 / expected[held]).sum()
    freedom = int(held.sum()) - 1
    return float(statistic), freedom + 4 * math.sqrt(2 * freedom)


# ---- Random numbers ------------------------------------------------------------------------------


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
        statistic, bound = chi_squared((drawn * 100).long(), torch.full((100,), 0.01))
        assert statistic < bound, name
        pairs = (drawn[:-1] * 10).long() * 10 + (drawn[1:] * 10).long()
        statistic, bound = chi_squared(pairs, torch.full((100,), 0.01))
        assert statistic < bound, f"neighbours in {name}"


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63, 2**64 - 1, 10**30])
def test_any_integer_is_a_seed(seed):
    ids = torch.tensor([0, -(2**63), 2**63 - 1])
    keys = random_keys(seed, ids, torch.zeros_like(ids))
    assert len(set(keys.tolist())) == 3


@pytest.mark.parametrize("count", [0, 1, 77, 2**31 - 1])
def test_every_backend_draws_from_the_same_streams(backend, count):
    """Of 2^k equally likely tokens a draw is the first k bits of its uniform number."""
    rows = rows_of([{}] * 500, seed=3, count=count)
    drawn = sample(torch.zeros(500, 1 << 14), rows)
    expected = (uniforms(rows.key, rows.count).double() * (1 << 14)).long()
    assert torch.equal(drawn.token_ids, expected)


# ---- The distribution ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.6},
        {"temperature": 1.7, "top_k": 9},
        {"top_p": 0.7},
        {"min_p": 0.1},
        {"repetition_penalty": 1.5},
        {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.2},
    ],
    ids=str,
)
def test_frequencies_match_the_distribution(backend, options):
    logits, history = torch.randn(40), torch.tensor([[3, 11, 20]])
    seen = torch.zeros(1, 40, dtype=torch.uint8).scatter_(1, history, 1)
    rows = rows_of([options] * DRAWS, seen=seen.repeat(DRAWS, 1))
    drawn = sample(logits.repeat(DRAWS, 1), rows)
    expected = warped(logits[None], SamplingParams(**options), history).softmax(-1)[0]
    statistic, bound = chi_squared(drawn.token_ids, expected)
    assert statistic < bound

    slightly_wrong = (expected * torch.linspace(0.95, 1.05, 40)).div_(expected.sum())
    statistic, bound = chi_squared(drawn.token_ids, slightly_wrong / slightly_wrong.sum())
    assert statistic > bound, "the test cannot tell a wrong distribution"


def test_frequencies_match_where_the_vocabulary_has_many_blocks(backend):
    """Blocks of rising scores, each of which moves the largest one so far."""
    logits = torch.linspace(-6, 2, 5000) + torch.randn(5000)
    draws = 2000
    tokens = [
        sample(logits.repeat(draws, 1), rows_of([{}] * draws, seed=seed)).token_ids
        for seed in range(DRAWS // draws)
    ]
    groups = logits.softmax(-1).split(50)
    expected = torch.stack([group.sum() for group in groups])
    held = expected > 2e-4
    shares = torch.cat((expected[held], expected[~held].sum()[None]))
    place = torch.where(held, held.cumsum(0) - 1, int(held.sum()))
    statistic, bound = chi_squared(place[torch.cat(tokens) // 50], shares)
    assert statistic < bound


@pytest.mark.parametrize("options", FILTERS, ids=str)
def test_filters_match_transformers(backend, options):
    params = SamplingParams(**options)
    logits = 3 * torch.randn(64, 50)
    history = torch.randint(0, 50, (64, 7))
    seen = torch.zeros(64, 50, dtype=torch.uint8).scatter_(1, history, 1)
    expected = warped(logits, params, history).log_softmax(-1)
    natural = (logits / params.temperature).log_softmax(-1)
    for seed in range(8):
        drawn = sample(logits, rows_of([options] * 64, seed, seen))
        tokens = drawn.token_ids[:, None]
        torch.testing.assert_close(drawn.sampling_logprobs, expected.gather(1, tokens)[:, 0])
        torch.testing.assert_close(drawn.logprobs, natural.gather(1, tokens)[:, 0])


def test_of_ties_those_stay_that_transformers_keeps(backend):
    logits = torch.tensor([1.0, 2, 0, 2, 1, 2, 0, 1]).repeat(2000, 1)
    for options in ({"top_p": 0.5}, {"top_k": 2}, {"top_k": 4, "top_p": 0.8}, {"min_p": 0.3}):
        drawn = sample(logits, rows_of([options] * 2000))
        kept = warped(logits[:1], SamplingParams(**options))[0].isfinite().nonzero()[:, 0]
        assert drawn.token_ids.unique().tolist() == kept.tolist(), options


def warped(logits, params, history=None):
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


# ---- Against the definition ----------------------------------------------------------------------


def mixture(number: int, vocabulary: int, seed: int) -> list[dict[str, Any]]:
    choices = {
        "temperature": [0, 0.3, 0.8, 1, 1, 2],
        "top_k": [0, 0, 1, 5, 40, vocabulary - 1, vocabulary, 10**6],
        "top_p": [1, 1, 0.95, 0.5, 0.1, 1e-6],
        "min_p": [0, 0, 0.02, 0.3, 1],
        "repetition_penalty": [1, 1, 1.3, 0.8],
    }
    generator = torch.Generator().manual_seed(seed)
    picks = {
        name: torch.randint(0, len(values), (number,), generator=generator).tolist()
        for name, values in choices.items()
    }
    return [
        {name: max(0, choices[name][picks[name][row]]) for name in choices} for row in range(number)
    ]


@pytest.mark.parametrize("vocabulary", [1, 2, 15, 16, 17, 64, 259, 1023, 1024, 1025, 5001, 40000])
@pytest.mark.parametrize("spread", [0.1, 1, 4])
def test_cpp_draws_as_the_definition_does(cpp_kernels, vocabulary, spread):
    """The same tokens for the same random numbers, but where rounding decides between two."""
    number = 40
    logits = spread * torch.randn(number, vocabulary)
    seen = (torch.rand(number, vocabulary) < 0.2).to(torch.uint8)
    options = mixture(number, vocabulary, seed=vocabulary)
    rows = rows_of(options, seed=vocabulary, seen=seen, stops=[0, vocabulary // 2, -1], min_count=1)
    if vocabulary < 3:
        rows = rows_of(options, seed=vocabulary, seen=seen)
    found = Draw(*cpp_kernels.sampling.draw(logits, rows))
    expected = sample_reference(logits.double(), rows)
    same = found.token_ids == expected.token_ids
    assert same.sum() >= number - 1
    for name in ("logprobs", "sampling_logprobs"):
        torch.testing.assert_close(
            getattr(found, name)[same].double(), getattr(expected, name)[same], atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("vocabulary", [1, 61, 1024, 3001])
@pytest.mark.parametrize("temperature", [0.0, 0.3, 1.0, 1.7])
def test_logprobs_have_the_bits_that_the_trainer_computes(cpp_kernels, vocabulary, temperature):
    logits = 3 * torch.randn(20, vocabulary)
    for options in ({}, {"top_p": 0.7}):
        rows = rows_of([{"temperature": temperature, **options}] * 20)
        tokens, logprobs, _ = cpp_kernels.sampling.draw(logits, rows)
        again, _, _ = cpp_kernels.linear_logprob.forward(logits, tokens, temperature or 1.0, 0.0)
        assert torch.equal(logprobs, again)


def test_a_row_depends_on_itself_alone(backend):
    options = mixture(30, 300, seed=1)
    logits = torch.randn(30, 300)
    rows = rows_of(options, seen=(torch.rand(30, 300) < 0.1).to(torch.uint8))
    together = sample(logits, rows)
    for row in range(30):
        alone = sample(logits[row : row + 1], SamplingRows.of(rows, slice(row, row + 1)))
        for of_all, of_one in zip(together, alone, strict=True):
            assert torch.equal(of_all[row : row + 1], of_one)


def test_threads_do_not_change_what_is_drawn(cpp_kernels):
    options, logits = mixture(64, 5000, seed=2), torch.randn(64, 5000)
    rows = rows_of(options, seen=torch.zeros(64, 5000, dtype=torch.uint8))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = cpp_kernels.sampling.draw(logits, rows)
        torch.set_num_threads(3)
        assert all(map(torch.equal, cpp_kernels.sampling.draw(logits, rows), expected))
    finally:
        torch.set_num_threads(threads)


# ---- Special rows --------------------------------------------------------------------------------


def test_greedy_takes_the_likeliest_and_reports_temperature_one(backend):
    logits = torch.randn(6, 30)
    drawn = sample(logits, rows_of([{"temperature": 0}] * 6))
    assert torch.equal(drawn.token_ids, logits.argmax(-1))
    torch.testing.assert_close(drawn.logprobs, logits.log_softmax(-1).amax(-1))
    assert drawn.sampling_logprobs.tolist() == [0] * 6


@pytest.mark.parametrize("vocabulary", [3, 40, 4000])
def test_greedy_takes_the_first_of_ties_whatever_the_filters(backend, vocabulary):
    logits = torch.zeros(2, vocabulary)
    logits[:, [1, 2, vocabulary - 1]] = 1.0
    filters = {"top_k": 1, "top_p": 0.1, "min_p": 1.0}
    drawn = sample(logits, rows_of([{"temperature": 0}, {"temperature": 0, **filters}]))
    assert drawn.token_ids.tolist() == [1, 1]


def test_greedy_with_a_penalty_avoids_what_was_seen(backend):
    logits = torch.tensor([[3.0, 2.5, -1.0]])
    seen = torch.tensor([[1, 0, 0]], dtype=torch.uint8)
    drawn = sample(logits, rows_of([{"temperature": 0, "repetition_penalty": 2.0}], seen=seen))
    assert drawn.token_ids.tolist() == [1]
    torch.testing.assert_close(drawn.logprobs, logits.log_softmax(-1)[:, 1])


def test_stop_tokens_wait_for_the_least_length(backend):
    logits = torch.tensor([[0.0, 9.0, 1.0, 9.0]]).repeat(200, 1)
    for temperature in (0, 1):
        options = [{"temperature": temperature}] * 200
        early = sample(logits, rows_of(options, stops=[1, 3, -1], min_count=3, count=2))
        assert early.token_ids.unique().tolist() == ([2] if temperature == 0 else [0, 2])
        natural = logits.log_softmax(-1).gather(1, early.token_ids[:, None])[:, 0]
        torch.testing.assert_close(early.logprobs, natural)
        late = sample(logits, rows_of(options, stops=[1, 3, -1], min_count=3, count=3))
        assert set(late.token_ids.tolist()) <= {1, 3}


def test_impossible_tokens_are_never_drawn_even_at_the_ends(backend):
    # Cumulative sums end a little below or above 1; the search must not pass the last possible.
    many = torch.randn(5000, 19)
    many[:, 0] = many[:, -1] = -torch.inf
    for options in ({}, {"top_p": 0.999}, {"top_k": 18}):
        tokens = sample(many, rows_of([options] * 5000)).token_ids
        assert tokens.min() == 1 and tokens.max() == 17


def test_far_apart_scores(backend):
    """Masked logits as other libraries write them, and scores that vanish beside the largest."""
    logits = torch.full((4, 3000), -1e30)
    logits[:, 1500] = 5.0
    logits[2:, 2999] = torch.tensor([5.0, -95.0])
    options = [{}, {"top_k": 7}, {"top_p": 0.999}, {"top_p": 0.999, "min_p": 1e-3}]
    drawn = sample(logits, rows_of(options))
    assert drawn.token_ids[[0, 1, 3]].tolist() == [1500] * 3
    assert int(drawn.token_ids[2]) in (1500, 2999)
    assert drawn.logprobs.isfinite().all() and drawn.sampling_logprobs.isfinite().all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("options", [{}, {"temperature": 0}, *FILTERS], ids=str)
def test_logits_that_are_not_finite_show(backend, bad, options):
    logits = torch.randn(3, 700)
    logits[1, 300] = bad
    logits[2] = bad
    seen = torch.zeros(3, 700, dtype=torch.uint8)
    drawn = sample(logits, rows_of([options] * 3, seen=seen))
    assert drawn.logprobs.isfinite().tolist() == [True, False, False]
    assert drawn.token_ids.min() >= 0 and drawn.token_ids.max() < 700


def test_inputs_are_not_written(backend):
    logits, seen = torch.randn(4, 20), torch.zeros(4, 20, dtype=torch.uint8)
    before = logits.clone()
    options = {"top_k": 3, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.2}
    sample(logits, rows_of([options] * 4, seen=seen))
    assert torch.equal(logits, before) and not seen.any()


def test_no_rows(backend):
    drawn = sample(torch.empty(0, 9), rows_of([], stops=[1]))
    assert [column.numel() for column in drawn] == [0, 0, 0]


# ---- Parameters ----------------------------------------------------------------------------------


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
        ({"max_new_tokens": 0}, "max_new_tokens: expected at least 1, found 0"),
        (
            {"max_new_tokens": 4, "min_new_tokens": 5},
            r"min_new_tokens: expected 0\.\.4 \(max_new_tokens\), found 5",
        ),
        ({"num_return_sequences": 0}, "num_return_sequences: expected at least 1, found 0"),
        ({"stop_token_ids": [3, -1]}, r"stop_token_ids: expected token ids >= 0, found \(3, -1\)"),
        ({"stop_strings": ["a", ""]}, "stop_strings: expected texts that are not empty"),
    ],
    ids=str,
)
def test_options_out_of_range_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**options)


def test_stops_are_kept_as_tuples():
    params = SamplingParams(stop_token_ids=[2, 5], stop_strings="\n")
    assert params.stop_token_ids == (2, 5) and params.stop_strings == ("\n",)
    assert hash(params) == hash(SamplingParams(stop_token_ids=(2, 5), stop_strings=("\n",)))


def test_rows_of_a_running_batch_are_not_copied():
    rows = rows_of([{"top_k": 3}] * 5, stops=[1, 2])
    arrays = type("Batch", (), {name: column.numpy() for name, column in vars(rows).items()})
    some = SamplingRows.of(arrays, slice(0, 3))
    arrays.top_k[1] = 9
    assert len(some) == 3 and some.top_k.tolist() == [3, 9, 3]
    assert some.stop_tokens.shape == (3, 2) and some.seen.shape == (3, 0)

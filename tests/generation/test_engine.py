"""`generate`: exact against `transformers`, the same in any batch, and honest about its odds."""

from __future__ import annotations

import math
import random

import pytest
import torch

from fastllm.generation import Engine, SamplingParams, generate
from fastllm.layout import PackedLayout
from fastllm.ops import linear_logprob


def _greedy_of_transformers(theirs, prompt, new_tokens, stops=()):
    ids = theirs.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=new_tokens,
        do_sample=False,
        eos_token_id=list(stops) or None,
        pad_token_id=0,
    )
    return ids[0, len(prompt) :].tolist()


def _tokens(completions):
    return [completion.token_ids for completion in completions]


def _recomputed(model, prompts, completions, temperature):
    """Log-probabilities as a trainer computes them: one packed row, prompts shared."""
    copies = len(completions) // len(prompts)
    lengths, prefix, row, reads, targets = [], [], [], [], []
    for number, prompt in enumerate(prompts):
        first_row, segment = len(row), len(lengths)
        row += prompt
        lengths.append(len(prompt))
        prefix.append(-1)
        for completion in completions[number * copies : (number + 1) * copies]:
            ids = completion.token_ids
            # The first token is predicted by the prompt's last row, the others by their own.
            reads += [first_row + len(prompt) - 1, *range(len(row), len(row) + len(ids) - 1)]
            targets += ids
            row += ids
            lengths.append(len(ids))
            prefix.append(segment)
    device = model.lm_head.weight.device
    layout = PackedLayout(lengths, prefix, device)
    rows, back = torch.unique(torch.tensor(reads, device=device), return_inverse=True)
    hidden = model.hidden(torch.tensor(row, device=device), layout, rows)[back]
    wanted = torch.tensor(targets, device=device)
    return linear_logprob(hidden, model.lm_head.weight, wanted, temperature).cpu()


# -- exactness ---------------------------------------------------------------------------------


def test_greedy_equals_transformers_alone_and_together(
    build, family, to_transformers, prompts, backend, device
):
    model = build(family)
    theirs = to_transformers(model)
    expected = [_greedy_of_transformers(theirs, prompt, 20) for prompt in prompts]
    model = model.to(device)
    alone = [generate(model, [p], 20, temperature=0)[0].token_ids for p in prompts]
    together = generate(model, prompts, 20, temperature=0)
    shared = generate(model, prompts, 20, temperature=0, num_return_sequences=3)
    assert alone == expected
    assert _tokens(together) == expected
    assert _tokens(shared) == [tokens for tokens in expected for _ in range(3)]


@pytest.mark.parametrize("step", ["auto", "ops"])
def test_greedy_equals_transformers_in_any_mixture(build, family, to_transformers, step):
    """Prompts and completions of all lengths, that come and go, in little room."""
    model = build(family, max_position_embeddings=256)
    theirs = to_transformers(model)
    rng = random.Random(7)
    sizes = [(63, 66), (64, 3), (65, 130), (1, 70), (130, 64), (5, 1), (128, 65), (20, 20)]
    prompts = [[rng.randrange(61) for _ in range(length)] for length, _ in sizes]
    expected = {
        number: _greedy_of_transformers(theirs, prompt, new_tokens)
        for number, (prompt, (_, new_tokens)) in enumerate(zip(prompts, sizes, strict=True))
    }
    one = Engine(model)
    blocks = one._cache.block_bytes
    engine = Engine(model, step=step, max_batch_size=4, cache_bytes=9 * blocks, prefill_tokens=130)
    said: dict[int, list[int]] = {number: [] for number in expected}
    arrivals = list(expected)
    while arrivals or engine.has_unfinished_requests():
        if arrivals and rng.random() < 0.2:
            number = arrivals.pop(0)
            params = SamplingParams(max_new_tokens=sizes[number][1], temperature=0)
            engine.add_request(prompts[number], params, request_id=number)
        for output in engine.step():
            said[output.request_id] += output.token_ids
    assert said == expected
    assert engine.stats.peak_cache_bytes <= 9 * blocks


def test_greedy_with_stops_and_a_penalty_equals_transformers(build, to_transformers, prompts):
    model = build("qwen3")
    theirs = to_transformers(model)
    theirs.generation_config.repetition_penalty = 1.4
    stops = [5, 11, 23]
    expected = [_greedy_of_transformers(theirs, prompt, 40, stops) for prompt in prompts]
    found = generate(
        model, prompts, 40, temperature=0, repetition_penalty=1.4, stop_token_ids=stops
    )
    assert _tokens(found) == expected
    assert len({len(tokens) for tokens in expected}) > 1, "the test wants different lengths"


def test_greedy_equals_transformers_past_the_first_rotary_table(build, to_transformers):
    model = build(max_position_embeddings=300)
    prompts = [torch.randint(0, 61, (n,)).tolist() for n in (250, 255, 3)]
    expected = [_greedy_of_transformers(to_transformers(model), p, 12) for p in prompts]
    assert _tokens(generate(model, prompts, 12, temperature=0)) == expected


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
def test_logprobs_are_those_of_the_trainer(build, family, prompts, backend, device, temperature):
    model = build(family).to(device)
    completions = generate(
        model, prompts, 12, temperature=temperature, num_return_sequences=3, seed=5, top_k=20
    )
    with torch.no_grad():
        expected = _recomputed(model, prompts, completions, temperature or 1.0)
    found = torch.tensor([logp for c in completions for logp in c.logprobs])
    assert (found - expected).abs().max() < 1e-5


def test_bf16_logprobs_are_near_those_of_the_trainer(build, prompts):
    model = build()
    model.model.compute_dtype = torch.bfloat16
    completions = generate(model, prompts, 12, num_return_sequences=3, seed=5)
    with torch.no_grad():
        expected = _recomputed(model, prompts, completions, 1.0)
    found = torch.tensor([logp for c in completions for logp in c.logprobs])
    assert (found - expected).abs().mean() < 0.05


def test_sampling_logprobs_are_those_of_the_filtered_distribution(build, prompts):
    model = build()
    plain = generate(model, prompts, 8, seed=1)
    assert all(c.sampling_logprobs == c.logprobs for c in plain)
    certain = generate(model, prompts, 8, seed=1, top_k=1)
    assert all(c.sampling_logprobs == [0.0] * 8 for c in certain)
    assert all(logp < 0 for c in certain for logp in c.logprobs)
    assert _tokens(certain) == _tokens(generate(model, prompts, 8, temperature=0))


def test_first_tokens_follow_the_softmax_of_the_model(build):
    model, prompt, draws = build(vocab_size=12), [3, 1, 7], 20_000
    with torch.no_grad():
        probabilities = (model(torch.tensor([prompt]))[0, -1] / 2.5).double().softmax(-1)
    found = generate(
        model, [prompt], 1, temperature=2.5, num_return_sequences=draws, seed=2, stop_token_ids=[]
    )
    counts = torch.bincount(torch.tensor(_tokens(found))[:, 0], minlength=12)
    expected = probabilities * draws
    held = expected > 5
    statistic = ((counts - expected)[held] ** 2 / expected[held]).sum()
    freedom = int(held.sum()) - 1
    assert freedom >= 5
    assert statistic < freedom + 4 * math.sqrt(2 * freedom)


# -- randomness --------------------------------------------------------------------------------


def test_a_request_says_the_same_in_any_company(build, prompts):
    model = build()
    options = {"seed": 9, "stop_token_ids": [5, 11]}
    ids = [100, 101, 102, 103, 104]
    together = generate(model, prompts, 25, num_return_sequences=4, request_ids=ids, **options)
    backwards = generate(
        model, prompts[::-1], 25, num_return_sequences=4, request_ids=ids[::-1], **options
    )
    for number, (prompt, request) in enumerate(zip(prompts, ids, strict=True)):
        mine = _tokens(together[4 * number : 4 * number + 4])
        reverse = 4 * (len(prompts) - 1 - number)
        alone = generate(
            model, [prompt], 25, num_return_sequences=2, request_ids=[request], **options
        )
        assert _tokens(backwards[reverse : reverse + 4]) == mine
        assert _tokens(alone) == mine[:2]
        assert len({tuple(tokens) for tokens in mine}) == 4, "completions of a prompt differ"


def test_the_seed_decides(build, prompts):
    model = build()
    runs = [generate(model, prompts, 10, seed=seed) for seed in (1, 1, 2)]
    assert runs[0] == runs[1]
    assert all(a != b for a, b in zip(_tokens(runs[0]), _tokens(runs[2]), strict=True))


def test_without_a_seed_the_default_generator_decides(build, prompts):
    model = build()
    torch.manual_seed(0)
    first, second = generate(model, prompts, 10), generate(model, prompts, 10)
    torch.manual_seed(0)
    again = generate(model, prompts, 10)
    assert first == again
    assert first != second


# -- the running batch -------------------------------------------------------------------------


@pytest.mark.parametrize("limits", [(1, 8192), (3, 8192), (7, 1), (7, 20), (None, 1)], ids=str)
@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_limits_change_nothing_but_the_schedule(build, prompts, limits, penalty):
    model = build("mistral")
    options = {"num_return_sequences": 3, "seed": 4, "stop_token_ids": [5, 11, 40]}
    options["repetition_penalty"] = penalty
    expected = generate(model, prompts * 3, 30, **options)
    batch, prefill = limits
    found = generate(
        model, prompts * 3, 30, max_batch_size=batch, prefill_tokens=prefill, **options
    )
    assert _tokens(found) == _tokens(expected)


def test_finished_sequences_cost_nothing(build, prompts, monkeypatch):
    from fastllm import ops

    decoded, prefilled = [], []
    decode, prefill = ops.decode_attention, ops.attention

    def counted_decode(q, *args, **kwargs):
        decoded.append(q.shape[0])
        return decode(q, *args, **kwargs)

    def counted_prefill(q, k, *args, **kwargs):
        prefilled.append((q.shape[0], k.shape[0]))
        return prefill(q, k, *args, **kwargs)

    monkeypatch.setattr(ops, "decode_attention", counted_decode)
    monkeypatch.setattr(ops, "attention", counted_prefill)
    model = build()
    options = {"num_return_sequences": 4, "stop_token_ids": [5, 11, 23], "step": "ops"}
    found = generate(model, prompts, 40, seed=3, **options)
    lengths = [len(tokens) for tokens in _tokens(found)]
    assert len(set(lengths)) > 3
    # The first token comes from the prompt, each further one from one decoded token per layer.
    assert sum(decoded) == 2 * (sum(lengths) - len(lengths))
    total = sum(len(p) for p in prompts)
    assert prefilled == [(total, total), (len(prompts), total)]


def test_stop_tokens(build, prompts):
    model = build(eos_token_id=[5, 11])
    free = generate(model, prompts, 40, seed=8, stop_token_ids=[])
    assert all(c.finish_reason == "length" and len(c.token_ids) == 40 for c in free)
    stopped = generate(model, prompts, 40, seed=8)
    assert {c.finish_reason for c in stopped} == {"length", "stop"}
    for whole, cut in zip(free, stopped, strict=True):
        ends = [i for i, token in enumerate(whole.token_ids) if token in (5, 11)]
        length = ends[0] + 1 if ends else 40
        assert cut.token_ids == whole.token_ids[:length]
        assert cut.finish_reason == ("stop" if ends else "length")
        assert len(cut.logprobs) == len(cut.sampling_logprobs) == length


def test_one_token_and_no_prompts(build, prompts):
    model = build()
    one = generate(model, prompts, 1, seed=3, max_batch_size=2)
    assert _tokens(one) == [tokens[:1] for tokens in _tokens(generate(model, prompts, 5, seed=3))]
    assert generate(model, [], 5) == []


def test_the_model_is_left_as_it_was(build, prompts):
    model = build()
    model.train()
    model.lm_head.eval()
    seen = []
    hook = model.model.register_forward_hook(lambda module, *_: seen.append(module.training))
    generate(model, prompts, 3)
    hook.remove()
    assert set(seen) == {False}
    assert model.training and model.model.training and not model.lm_head.training
    # Tables made while sampling serve training too.
    model(torch.tensor([prompts[0]])).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


# -- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[1], []], {}, "prompt 1 is empty"),
        ([[1], [2, 61]], {}, r"prompt 1 has token 61; the model's vocabulary is 0\.\.60"),
        ([[-1]], {}, "prompt 0 has token -1"),
        ([[1], [1] * 120], {"max_new_tokens": 9}, "prompt 1 has 120 tokens.*embeddings 128"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens: expected at least 1, found 0"),
        ([[1]], {"num_return_sequences": 0}, "num_return_sequences"),
        ([[1]], {"max_batch_size": 0}, "max_batch_size"),
        ([[1]], {"temperature": -1.0}, "temperature"),
        ([[1]], {"request_ids": [1, 2]}, r"request_ids: expected 1 \(prompts\), found 2"),
        ([[1]], {"stop_token_ids": [61]}, r"stop_token_ids: expected ids in 0\.\.60, found 61"),
    ],
)
def test_bad_input(build, prompts, options, message):
    with pytest.raises(ValueError, match=message):
        generate(build(), prompts, **{"max_new_tokens": 4, **options})


def test_the_longest_sequence_fits(build):
    assert len(generate(build(), [[1] * 120], 8, seed=0)[0].token_ids) == 8


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite(build, temperature):
    model = build()
    with torch.no_grad():
        model.model.norm.weight.fill_(math.nan)
    with pytest.raises(RuntimeError, match="logits are not finite"):
        generate(model, [[1, 2]], 4, temperature=temperature)

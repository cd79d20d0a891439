"""Best of n: sampled, scored with the shared prompt, chosen."""

from __future__ import annotations

import math

import pytest
import torch

from fastllm import RewardModel, Transformer, best_of_n, generate
from fastllm.data.errors import DataError
from fastllm.data.packing import scored_end
from fastllm.data.tokenizer import Tokenizer
from fastllm.generation import Completion
from fastllm.model.weights import save_model
from fastllm.training.rewards import ended
from fastllm.training.selection import best

PROMPTS = ["1+1=", "copy ab>", "x"]


@pytest.fixture
def policy(model_config):
    return Transformer(model_config)


@pytest.fixture
def reward_model(model_config):
    model = RewardModel(model_config)
    torch.nn.init.normal_(model.score.weight)
    return model


@torch.no_grad()
def alone(model: RewardModel, ids: list[int]) -> float:
    """The score of one whole sequence."""
    return float(model(torch.tensor([ids[: scored_end(ids, model.config.pad_token_id)]])))


@pytest.mark.parametrize("with_tokenizer", [True, False])
def test_the_best_scores_highest_of_the_completions_that_generate_draws(
    policy, reward_model, tokenizer, with_tokenizer
):
    prompts = [tokenizer.encode(prompt) for prompt in PROMPTS]
    codec = tokenizer if with_tokenizer else None
    options = {"temperature": 1.3, "top_k": 40, "seed": 5}
    chosen = best_of_n(policy, reward_model, prompts, 6, 9, tokenizer=codec, **options)
    drawn = generate(policy, prompts, 9, num_return_sequences=6, tokenizer=codec, **options)
    ending = tokenizer.ending_ids(False) if with_tokenizer else []
    for number, (prompt, found) in enumerate(zip(prompts, chosen, strict=True)):
        group = drawn[6 * number : 6 * number + 6]
        scores = [alone(reward_model, prompt + ended(c.token_ids, ending)) for c in group]
        assert found.scores == pytest.approx(scores, abs=1e-5)
        assert found.score == max(found.scores) == found.scores[found.index]
        assert found.completion == group[found.index]


def test_prompts_may_be_text(policy, reward_model, tokenizer):
    ids = [tokenizer.encode(prompt) for prompt in PROMPTS]
    options = {"n": 3, "max_new_tokens": 5, "seed": 1, "tokenizer": tokenizer}
    assert best_of_n(policy, reward_model, PROMPTS, **options) == best_of_n(
        policy, reward_model, ids, **options
    )
    with pytest.raises(ValueError, match="tokenizer: expected one for prompts that are text"):
        best_of_n(policy, reward_model, PROMPTS, 3, 5)


def test_a_reward_model_from_its_folder(policy, reward_model, tokenizer, tmp_path):
    save_model(reward_model, tmp_path / "judge")
    tokenizer.save_pretrained(tmp_path / "judge")
    options = {"n": 4, "max_new_tokens": 5, "seed": 1, "tokenizer": tokenizer}
    found = best_of_n(policy, tmp_path / "judge", PROMPTS, **options)
    expected = best_of_n(policy, reward_model, PROMPTS, **options)
    for a, b in zip(found, expected, strict=True):
        assert a.completion == b.completion and a.score == pytest.approx(b.score, abs=1e-6)
    with pytest.raises(ValueError, match=r"tokenizer: expected the policy's.*judge; found none"):
        best_of_n(policy, tmp_path / "judge", [[1, 2]], 2, 3)


def test_a_reward_model_with_another_vocabulary(policy, reward_model, tmp_path):
    save_model(reward_model, tmp_path / "judge")
    Tokenizer.train(["other words"], 270).save_pretrained(tmp_path / "judge")
    with pytest.raises(DataError, match="vocabulary mismatch"):
        best_of_n(policy, tmp_path / "judge", PROMPTS, 2, 3, tokenizer=Tokenizer.bytes())


def test_the_models_stay_as_they_were(policy, reward_model, tokenizer):
    policy.train()
    reward_model.train()
    best_of_n(policy, reward_model, PROMPTS, 2, 3, tokenizer=tokenizer)
    for model in (policy, reward_model):
        assert model.training and all(p.requires_grad for p in model.parameters())


def test_no_prompts(policy, reward_model):
    assert best_of_n(policy, reward_model, [], 2, 3) == []


def test_scores_that_are_not_finite(policy, reward_model, tokenizer):
    torch.nn.init.constant_(reward_model.score.weight, math.nan)
    with pytest.raises(RuntimeError, match="reward model's scores are not finite: completion 0"):
        best_of_n(policy, reward_model, PROMPTS, 2, 3, tokenizer=tokenizer)


def test_of_equal_scores_the_first():
    completions = [Completion([i], [0.0], [0.0], "stop") for i in range(3)]
    found = best(completions, [1.0, 2.0, 2.0])
    assert found.index == 1 and found.completion is completions[1]

"""Reward functions in TRL's signature, reward models, and both together."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
import torch

from fastllm import RewardModel, train_rm
from fastllm.data.errors import DataError
from fastllm.data.tokenizer import Tokenizer
from fastllm.model.weights import save_model
from fastllm.training.rewards import ModelReward, Rewards, Rollout, ended, score_completions

CPU = torch.device("cpu")


@pytest.fixture
def rollout(tokenizer):
    prompts, answers = ["1+1=", "1+1=", "copy ab>"], ["2", "", "ab"]
    return Rollout(
        prompts=prompts,
        completions=answers,
        prompt_ids=[tokenizer.encode(p) for p in prompts],
        completion_ids=[[*tokenizer.encode(a), tokenizer.eos_token_id] for a in answers],
        columns={"answer": ["2", "2", "ab"], "level": [1, 1, 2]},
    )


@pytest.fixture
def rewards(tokenizer):
    """`rewards(*functions, weights=None)`"""
    return lambda *functions, weights=None: Rewards(
        functions, weights, tokenizer, CPU, torch.float32
    )


@pytest.fixture
def reward_model(model_config):
    model = RewardModel(model_config)
    torch.nn.init.normal_(model.score.weight)
    return model


def length(completions, **_):
    return [float(len(c)) for c in completions]


# -- callables --------------------------------------------------------------------------------


def test_a_function_gets_trls_arguments_by_keyword_only(rewards, rollout):
    seen = {}

    def judge(*, prompts, completions, completion_ids, answer, level, trainer_state, **others):
        seen.update(locals())
        return [float(c == a) for c, a in zip(completions, answer, strict=True)]

    total, each = rewards(judge)(rollout, trainer_state="state", log_metric=print, log_extra=print)
    assert total.tolist() == [1, 0, 1] and each.shape == (3, 1)
    assert seen["prompts"] == rollout.prompts and seen["level"] == [1, 1, 2]
    assert seen["completion_ids"] == rollout.completion_ids
    assert seen["trainer_state"] == "state" and seen["others"].keys() == {"log_metric", "log_extra"}


@pytest.mark.parametrize("inside_a_loop", [False, True], ids=["script", "notebook"])
def test_functions_may_be_asynchronous(rewards, rollout, inside_a_loop):
    async def judge(completions, **_):
        await asyncio.sleep(0)
        return [len(c) for c in completions]

    class Judge:
        async def __call__(self, completions, **_):
            return torch.ones(len(completions))

    scored = rewards(judge, Judge())
    assert scored.names == ["judge", "Judge"]

    async def notebook():
        return scored(rollout)

    total, each = asyncio.run(notebook()) if inside_a_loop else scored(rollout)
    assert each.tolist() == [[1, 1], [0, 1], [2, 1]] and total.tolist() == [2, 1, 3]


def test_weights_and_none(rewards, rollout):
    def some(completions, **_):
        return [None, 2.0, None]

    def first(completions, **_):
        return [None, None, 1.0]

    total, each = rewards(some, first, weights=[0.5, 3.0])(rollout)
    assert each.isnan().tolist() == [[True, True], [False, True], [True, False]]
    assert total[0].isnan() and total[1:].tolist() == [1.0, 3.0]


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1.0], "judge: expected 3 rewards, one for each completion; found 1"),
        ([1.0] * 4, "expected 3 rewards.*found 4"),
        ([1.0, float("nan"), 0.0], "judge: completion 1 got nan; rewards must be finite"),
        ([1.0, 0.0, float("inf")], "judge: completion 2 got inf"),
    ],
)
def test_what_is_no_list_of_rewards_is_refused(rewards, rollout, returned, message):
    def judge(**_):
        return returned

    with pytest.raises(ValueError, match=message):
        rewards(judge)(rollout)


def test_settings_that_do_not_fit_are_refused(rewards):
    with pytest.raises(ValueError, match="at least one reward function"):
        rewards()
    with pytest.raises(ValueError, match=r"expected 2 values.*length, length.*found 1"):
        rewards(length, length, weights=[1.0])


def test_an_error_in_a_function_is_the_users_to_see(rewards, rollout):
    def broken(**_):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        rewards(broken)(rollout)


# -- reward models ----------------------------------------------------------------------------


def test_a_model_scores_ids_as_it_was_trained_on_them(rewards, rollout, reward_model, tokenizer):
    """Prompt, answer, EOS: whether or not the sampler got as far as EOS."""
    _, each = rewards(reward_model)(rollout)
    cut = [ids[:-1] for ids in rollout.completion_ids]
    _, without_end = rewards(reward_model)(replace(rollout, completion_ids=cut))
    assert torch.equal(each, without_end)
    for prompt, answer, score in zip(rollout.prompts, rollout.completions, each[:, 0], strict=True):
        ids = [*tokenizer.encode(prompt + answer), tokenizer.eos_token_id]
        torch.testing.assert_close(reward_model(torch.tensor([ids]))[0], score)


def test_an_end_of_turn_is_completed():
    assert ended([5, 6], [8, 9]) == [5, 6, 8, 9]
    assert ended([5, 6, 8], [8, 9]) == [5, 6, 8, 9]
    assert ended([5, 6, 8, 9], [8, 9]) == [5, 6, 8, 9]
    assert ended([], [8]) == [8] and ended([5], []) == [5]


def test_a_model_and_functions_mix(rewards, rollout, reward_model):
    total, each = rewards(reward_model, length, weights=[2.0, 0.5])(rollout)
    alone = rewards(reward_model)(rollout)[1]
    assert torch.equal(each[:, :1], alone) and each[:, 1].tolist() == [1, 0, 2]
    torch.testing.assert_close(total, 2 * each[:, 0] + 0.5 * each[:, 1])


def test_a_model_comes_from_a_folder_and_gives_the_metric_its_name(
    rewards, rollout, reward_model, tokenizer, tmp_path
):
    save_model(reward_model, tmp_path / "judge")
    tokenizer.save_pretrained(tmp_path / "judge")
    scored = rewards(str(tmp_path / "judge"))
    assert scored.names == ["judge"]
    assert torch.equal(scored(rollout)[1], rewards(reward_model)(rollout)[1])


def test_scoring_is_cut_into_passes(reward_model, rollout):
    scores = score_completions(reward_model, rollout.prompt_ids, rollout.completion_ids, CPU)
    cut = score_completions(
        reward_model, rollout.prompt_ids, rollout.completion_ids, CPU, tokens_per_pass=1
    )
    torch.testing.assert_close(cut, scores)
    assert score_completions(reward_model, [], [], CPU).shape == (0,)


def test_another_vocabulary_is_refused(rewards, model_config, tokenizer, tmp_path, pairs):
    model_config.vocab_size -= 1
    with pytest.raises(DataError, match=r"vocabulary mismatch.*260 tokens.*259"):
        rewards(RewardModel(model_config))
    other = Tokenizer.train(["some text for other tokens"] * 20, vocab_size=280)
    train_rm(
        pairs, tmp_path / "rm", steps=1, tokenizer=other, device="cpu",
        n_layer=1, n_head=2, n_kv_head=1, n_embd=16, save_strategy="no",
    )  # fmt: skip
    with pytest.raises(DataError, match=r"mismatch between policy and reward model.*Train the"):
        rewards(tmp_path / "rm")


def test_a_language_model_is_no_reward_model(rewards, base):
    with pytest.raises(ValueError, match="expected a reward model, found a language model"):
        rewards(base)


def test_scoring_leaves_no_gradient(reward_model, tokenizer, rollout):
    scores = ModelReward(reward_model, tokenizer, CPU, torch.float32)(rollout)
    assert not scores.requires_grad and not reward_model.training


def test_a_model_of_transformers_scores_the_same(rewards, rollout, reward_model, tmp_path):
    transformers = pytest.importorskip("transformers")
    save_model(reward_model, tmp_path)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    expected, _ = rewards(reward_model)(rollout)
    found, _ = rewards(theirs)(rollout)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)

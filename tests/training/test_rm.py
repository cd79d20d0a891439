"""Reward models: what they learn, from and to every kind of place, and the seed's own snippets."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastllm import RewardConfig, RewardModel, RewardTrainer, train_rm
from fastllm.data.errors import DataError
from fastllm.model.lora import LoraConfig
from fastllm.training.rm import RewardDataCollator, create_dummy_preference_data, load_reward_model

TINY = {
    "n_layer": 2, "n_head": 2, "n_kv_head": 1, "n_embd": 16, "block_size": 48,
    "device": "cpu", "save_strategy": "no", "logging_steps": 1,
}  # fmt: skip


@pytest.fixture
def train(tmp_path):
    """`train(pairs, run="run", **options)`: a tiny run of `train_rm`."""
    return lambda pairs, run="run", **options: train_rm(pairs, tmp_path / run, **TINY | options)


@pytest.fixture
def last_line(metrics, tmp_path):
    return lambda run="run": metrics(tmp_path / run)[-1]


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_it_learns(train, last_line, metrics, tmp_path, pairs, dtype):
    train(pairs, steps=25, batch_size=10, lr=0.01, dtype=dtype)
    assert metrics(tmp_path / "run")[0]["loss"] == pytest.approx(0.693, abs=0.01)
    line = last_line()
    assert line["loss"] < 0.1 and line["accuracy"] == 1 and line["margin"] > 2
    assert line["min_reward"] < line["mean_reward"] < line["max_reward"]


def test_a_margin_asks_for_more(train, metrics, tmp_path, pairs):
    train([{**pair, "margin": 2.0} for pair in pairs], steps=1, batch_size=10)
    (line,) = metrics(tmp_path / "run")
    assert line["loss"] == pytest.approx(2.127, abs=0.01)  # softplus(2): the scores are near 0


def test_centring_keeps_scores_around_zero(make, metrics, tmp_path, pairs):
    trainer = make(
        "rm", center_rewards_coefficient=0.5, max_steps=30, per_device_train_batch_size=10
    )
    torch.nn.init.constant_(trainer.model.score.weight, 0.5)
    trainer.train()
    lines = metrics(tmp_path / "run")
    assert abs(lines[0]["mean_reward"]) > 0.3 and lines[0]["loss"] > 0.9
    assert abs(lines[-1]["mean_reward"]) < 0.1 and lines[-1]["accuracy"] == 1


@pytest.mark.parametrize("form", ["dict", "tuple", "messages", "no prompt", "ids"])
def test_the_forms_of_a_pair(train, last_line, tokenizer, form):
    def spoken(text, role="assistant"):
        return [{"role": role, "content": text}]

    end = tokenizer.eos_token_id
    made = {
        "dict": {"prompt": "q", "chosen": "1", "rejected": "a"},
        "tuple": ("q", "1", "a"),
        "messages": {"prompt": spoken("q", "user"), "chosen": spoken("1"), "rejected": spoken("a")},
        "no prompt": {"chosen": "q1", "rejected": "qa"},
        "ids": {
            "chosen_ids": [*tokenizer.encode("q1"), end],
            "rejected_ids": [*tokenizer.encode("qa"), end],
        },
    }[form]
    train([made] * 2, steps=2, tokenizer="bytes")
    found = last_line()
    train([("q", "1", "a")] * 2, run="other", steps=2, tokenizer="bytes")
    expected = last_line("other")
    if form != "messages":  # these have their template around them
        assert found == expected
    assert found["loss"] < 0.6932


def test_function_and_class_are_one(train, pairs, base, tmp_path, fingerprint):
    options = {"logging_steps": 1, "save_strategy": "no", "seed": 5}
    function = train(pairs, model=base, steps=3, batch_size=4, lr=1e-3, **options)
    args = RewardConfig(
        output_dir=str(tmp_path / "class"), max_steps=3, per_device_train_batch_size=4,
        learning_rate=1e-3, use_cpu=True, **options,
    )  # fmt: skip
    trainer = RewardTrainer(base, args, pairs)
    trainer.train()
    assert fingerprint(trainer.model) == fingerprint(function)


def test_a_new_head_comes_from_the_seed(train, pairs, base):
    heads = [
        train(pairs, run=str(i), model=base, steps=1, lr=0, seed=s).score.weight
        for i, s in enumerate((1, 1, 2))
    ]
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])


def test_every_place_gives_the_same_model(train, pairs, fingerprint, tmp_path):
    model = train(pairs, steps=3, save_strategy="steps")
    run = tmp_path / "run"
    for place in (run, run / "checkpoint-3", run / "model_final.pt", run / "model_last.pt"):
        loaded = load_reward_model(place)
        assert fingerprint(loaded) == fingerprint(model) and not loaded.training
    again = train(pairs, run="again", model=run / "model_last.pt", steps=1, lr=0)
    assert fingerprint(again) == fingerprint(model)  # its head is kept


def test_transformers_gives_the_same_scores(train, pairs, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = train(pairs, steps=5, lr=0.01)
    cls = transformers.AutoModelForSequenceClassification
    theirs = cls.from_pretrained(tmp_path / "run").eval()
    tokens = torch.tensor([[5, 6, 7, 2], [9, 2, 0, 0]])
    scores = theirs(tokens).logits[:, 0]
    torch.testing.assert_close(scores, model(tokens), atol=1e-5, rtol=1e-5)
    assert scores[0] != scores[1]


def test_lora_trains_adapters_and_the_head(train, last_line, pairs, base, fingerprint, tmp_path):
    options = {"steps": 40, "batch_size": 10, "lr": 0.02}
    model = train(pairs, model=base, peft_config=LoraConfig(r=4), **options)
    assert last_line()["accuracy"] == 1
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert "score.weight" in trained and len(trained) == 1 + 2 * 14
    assert fingerprint(load_reward_model(tmp_path / "run")) == fingerprint(model)


def test_eval_fraction_and_eval_pairs(train, metrics, tmp_path, pairs):
    train(pairs, steps=1, eval_fraction=0.4)
    train(pairs, run="given", steps=1, eval_pairs=pairs[:4])
    for run in ("run", "given"):
        (line,) = [line for line in metrics(tmp_path / run) if "eval_loss" in line]
        assert line.keys() >= {"eval_accuracy", "eval_margin", "eval_mean_reward"}
        assert (line["eval_accuracy"] * 4) % 1 == 0


def test_pairs_that_are_too_long_are_dropped_not_cut(train, pairs):
    with pytest.raises(DataError, match="48"):
        train([("q", "1" * 90, "a")], steps=1)
    train([*pairs, ("q", "1" * 90, "a")], steps=1)


def test_bad_input_names_its_line(train, tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"chosen": "a", "rejected": "b"}\n{"chosen": "a"}\n')
    with pytest.raises(DataError, match=r"pairs.jsonl:2: missing 'rejected'"):
        train(str(path))
    assert not (tmp_path / "run").exists()


# -- the reference system's own snippets, with the package's name changed ---------------------


def test_the_snippets_of_the_reference_system(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    few = {"n_layer": 1, "n_head": 2, "n_kv_head": 1, "n_embd": 16, "disable_tqdm": True}

    pairs = create_dummy_preference_data(n_pairs=100)
    model = train_rm(pairs=pairs, out_dir="runs/my_reward_model", steps=4, batch_size=8, **few)
    assert isinstance(model, nn.Module)

    model = load_reward_model("runs/my_reward_model/model_final.pt")
    collator = RewardDataCollator(block_size=256)
    good_ids, bad_ids = collator.collate_pair(
        "What is AI?", "AI is artificial intelligence...", "AI is computers."
    )
    rewards_good = model(good_ids.unsqueeze(0))
    rewards_bad = model(bad_ids.unsqueeze(0))
    assert isinstance(model, RewardModel)
    assert rewards_good.shape == rewards_bad.shape == (1,) and rewards_good != rewards_bad


def test_the_pipeline_of_the_reference_system(tmp_path, monkeypatch):
    from fastllm import train_grpo, train_rm, train_sft

    monkeypatch.chdir(tmp_path)
    few = {"n_layer": 1, "n_head": 2, "n_kv_head": 1, "n_embd": 16, "steps": 2}
    sft_data, preference_data = [("1+1=", "2")], create_dummy_preference_data(8)
    train_sft(items=sft_data, out_dir="runs/sft", **few)
    train_rm(pairs=preference_data, out_dir="runs/rm", **few)
    train_grpo(
        policy_ckpt="runs/sft/model_last.pt",
        reward_ckpt="runs/rm/model_final.pt",
        out_dir="runs/rlhf",
        steps=2,
        max_completion_length=4,
    )
    for run in ("sft", "rm", "rlhf"):
        for name in ("model_final.pt", "model_last.pt", "config.json", "model.safetensors"):
            assert (tmp_path / "runs" / run / name).is_file(), f"{run}/{name}"
    content = torch.load(tmp_path / "runs/rlhf/model_final.pt", weights_only=True)
    assert isinstance(content, dict)

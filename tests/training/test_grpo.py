"""GRPO from end to end: it learns, it repeats itself, and its ratios and references are exact."""

from __future__ import annotations

import json

import pytest
import torch

from fastllm import GRPOConfig, GRPOTrainer, Transformer, train_grpo, train_rm, train_sft
from fastllm.data.errors import DataError
from fastllm.model.lora import LoraConfig
from fastllm.training.grpo_passes import Sample

SCRATCH = {
    "n_layer": 2, "n_head": 2, "n_kv_head": 1, "n_embd": 16, "block_size": 48,
    "device": "cpu", "save_strategy": "no",
}  # fmt: skip
SMALL_PASSES = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}


def verifier(completions, wanted, **_):
    """The tiny task: say the letter that the prompt asks for."""
    return [float(c == w) for c, w in zip(completions, wanted, strict=True)]


def varied(completion_ids, **_):
    """Hardly two completions have the same: every one is trained on."""
    return [float(sum((i + 3) * token for i, token in enumerate(ids))) for ids in completion_ids]


PROMPTS = [{"prompt": f"{letter}>", "wanted": letter} for letter in "abcd"]


@pytest.fixture
def policy(tmp_path):
    """A policy that is right half of the time: for each prompt it knows two answers."""
    items = [
        (f"{p}>", answer) for p, other in zip("abcd", "bcda", strict=True) for answer in (p, other)
    ]
    options = SCRATCH | {"n_embd": 32, "steps": 60, "batch_size": 8, "lr": 0.01}
    train_sft(items, tmp_path / "policy", **options)
    return str(tmp_path / "policy")


@pytest.fixture
def run(policy, tmp_path):
    """`run(folder="run", **options)`: a short GRPO run on the tiny task."""

    def train(folder="run", **options):
        common = {
            "prompts": PROMPTS, "reward_funcs": verifier, "steps": 3, "batch_size": 16, "lr": 4e-3,
            "num_generations": 4, "max_completion_length": 4, "device": "cpu",
            "save_strategy": "no", "logging_steps": 1,
        }  # fmt: skip
        return train_grpo(policy, out_dir=tmp_path / folder, **common | options)

    return train


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "num_iterations": 2},
        {"loss_type": "cispo", "epsilon_high": 5.0},
        {"dtype": "bf16"},
        {"dtype": "fp16", "beta": 0.001},
        {"peft_config": LoraConfig(r=4), "lr": 6e-3},
    ],
    ids=["dapo", "gspo", "cispo", "bf16", "fp16", "lora"],
)
def test_the_reward_rises(run, metrics, tmp_path, options):
    run(steps=100, eval_prompts=PROMPTS, batch_size=32, num_generations=8, **options)
    lines = metrics(tmp_path / "run")
    rewards = [line["reward"] for line in lines if "reward" in line]
    assert rewards[0] < 0.6
    floor = 0.58 if "peft_config" in options else 0.75  # little moves under a frozen tiny head
    assert sum(rewards[-10:]) / 10 > floor, rewards
    (held,) = [line for line in lines if "eval_reward" in line]
    assert held["eval_reward"] == held["eval_rewards/verifier/mean"] == 1


@pytest.mark.parametrize("options", [{}, SMALL_PASSES | {"num_iterations": 2}])
def test_a_seed_is_a_run(run, metrics, fingerprint, tmp_path, options):
    prints = [fingerprint(run(f"{i}", seed=s, **options)) for i, s in enumerate((1, 1, 2))]
    assert prints[0] == prints[1] != prints[2]
    assert metrics(tmp_path / "0") == metrics(tmp_path / "1")


def test_metrics_have_trls_names(run, metrics, tmp_path):
    run(beta=0.1)
    wanted = {
        "loss", "grad_norm", "learning_rate", "reward", "reward_std", "frac_reward_zero_std",
        "rewards/verifier/mean", "rewards/verifier/std", "entropy", "kl", "num_tokens", "epoch",
        "completions/mean_length", "completions/min_length", "completions/max_length",
        "completions/clipped_ratio", "clip_ratio/low_mean", "clip_ratio/high_mean",
        "clip_ratio/region_mean", "sampling/sampling_logp_difference/mean",
        "sampling/sampling_logp_difference/max", "sampling/importance_sampling_ratio/min",
        "sampling/importance_sampling_ratio/mean", "sampling/importance_sampling_ratio/max",
        "frac_groups_skipped",
    }  # fmt: skip
    for line in metrics(tmp_path / "run"):
        assert wanted <= line.keys()
        assert line["sampling/sampling_logp_difference/max"] < 1e-5
        assert line["sampling/importance_sampling_ratio/max"] == pytest.approx(1, abs=1e-5)
        assert line["reward"] == line["rewards/verifier/mean"]


# -- ratios -----------------------------------------------------------------------------------


def first_ratios(trainer, monkeypatch, steps):
    """Every ratio of the first `steps` steps."""
    from fastllm.training import grpo

    found, original = [], grpo.grpo_loss

    def watch(tokens, config):
        old = tokens.logp.detach() if tokens.old is None else tokens.old
        found.append((tokens.logp.detach() - old).exp())
        return original(tokens, config)

    monkeypatch.setattr(grpo, "grpo_loss", watch)
    trainer.train()
    return [ratio for ratio in found[: 2 * steps]], found


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_first_ratios_of_a_rollout_are_exactly_one(make, monkeypatch, dtype):
    """Remembered log-probabilities come from passes of the same shape as those of training."""
    options = SMALL_PASSES | {"num_iterations": 2, "steps_per_generation": 4, "dtype": dtype}
    trainer = make("grpo", reward_funcs=varied, max_steps=4, learning_rate=0.05, **options)
    first, every = first_ratios(trainer, monkeypatch, 1)
    assert all((ratio == 1).all() for ratio in first)
    assert not all((ratio == 1).all() for ratio in every), "the policy never moved"


def test_on_policy_every_ratio_is_exactly_one(make, monkeypatch):
    trainer = make("grpo", reward_funcs=varied, max_steps=3, learning_rate=0.05, **SMALL_PASSES)
    _, every = first_ratios(trainer, monkeypatch, 3)
    assert len(every) == 6 and all((ratio == 1).all() for ratio in every)


@pytest.mark.parametrize("iterations", [1, 2])
@pytest.mark.parametrize(("accumulation", "per_generation"), [(1, None), (1, 2), (2, 2), (2, 4)])
def test_the_policy_is_remembered_where_trl_remembers_it(
    make, accumulation, per_generation, iterations
):
    trainer = make(
        "grpo", reward_funcs=varied, gradient_accumulation_steps=accumulation,
        steps_per_generation=per_generation, num_iterations=iterations,
    )  # fmt: skip
    generate_every = (per_generation or accumulation) * iterations
    passes = trainer.source().passes(0)
    assert len(passes) == accumulation
    remembered = {one.batch.old_logp is not None for one in passes}
    assert remembered == {accumulation % generate_every != 0}


def test_what_is_remembered_knows_no_dropout(make, base, monkeypatch):
    peft_config = LoraConfig(r=2, lora_dropout=0.5)
    options = SMALL_PASSES | {"num_iterations": 2, "peft_config": peft_config}
    trainer = make("grpo", base, reward_funcs=varied, **options)
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    trainer.model.train()
    source = trainer.source()
    source.passes(0)
    differences = [
        abs(old - sampled)
        for sample in source._samples
        for old, sampled in zip(sample.old_logp, sample.logprobs, strict=True)
    ]
    assert max(differences) < 1e-5


# -- references -------------------------------------------------------------------------------


def kl(trainer):
    """KL metric of one pass at the weights of now."""
    source = trainer.source()
    one = source.passes(0)[0]
    trainer.model.eval()
    total, count = trainer.loss(trainer.model, one.batch)[1]["kl"]
    return float(total) / count


@pytest.mark.parametrize("peft_config", [None, LoraConfig(r=2)], ids=["full", "lora"])
def test_the_reference_is_the_model_that_training_began_with(make, base, peft_config):
    trainer = make("grpo", base, peft_config=peft_config, beta=0.1, learning_rate=0.03)
    assert kl(trainer) == 0
    batch = trainer.source().passes(0)[0].batch.tokens
    expected = trainer._logp(Transformer.from_pretrained(base), batch)[0]
    trainer.train()
    assert kl(trainer) > 0
    assert torch.equal(trainer._reference_logp(batch), expected)
    assert not torch.equal(trainer._policy_logp(batch), expected)


def test_without_kl_there_is_no_reference(make):
    trainer = make("grpo")
    assert trainer._reference is None and trainer._reference_logp(None) is None


# -- rollouts ---------------------------------------------------------------------------------


def test_a_rollout_is_whole_though_prompts_run_out(make):
    """Five prompts, and two new ones in every rollout: no step is short, none is empty."""
    options = {"num_iterations": 2, "steps_per_generation": 2, "max_steps": 12}
    trainer = make("grpo", reward_funcs=varied, **options)
    source = trainer.source()
    assert source.period == 4 and source.steps_per_epoch == 8
    for step in range(12):
        passes = source.passes(step)
        assert [one.batch.lengths.numel() for one in passes] == [4]
        assert passes[0].weight > 0


def test_truncated_completions_can_be_masked(make):
    plain = make("grpo", max_completion_length=2)
    masked = make("grpo", max_completion_length=2, mask_truncated_completions=True)
    cut = [s for s in masked.source()._roll_out(0) if s.masked]
    assert cut and all(len(s.completion_ids) == 2 for s in cut)
    assert not any(s.masked for s in plain.source()._roll_out(0))
    assert masked.train().global_step == 4


def test_a_masked_completion_counts_as_a_completion(make):
    source = make("grpo", loss_type="grpo").source()
    samples = [Sample([5], [6, 7], [-1.0, -1.0], 1.0, masked=i < 3) for i in range(4)]
    (one,) = source._plan.step(samples, 2)
    assert one.weight == 4 and one.batch.lengths.tolist() == [2]


def test_functions_log_and_models_mix(make, metrics, tmp_path, pairs, digits):
    train_rm(pairs, tmp_path / "judge", steps=1, tokenizer="bytes", **SCRATCH)

    def chatty(completions, log_metric, log_extra, trainer_state, **_):
        log_metric("seen", len(completions))
        log_metric("seen", 0)
        log_extra("step", [trainer_state.global_step] * len(completions))
        return [None] * len(completions)

    trainer = make(
        "grpo", reward_funcs=[str(tmp_path / "judge"), chatty, digits], reward_weights=[1, 1, 0.5],
        log_completions=True, max_steps=2, eval_dataset=[{"prompt": "1"}] * 3,
    )  # fmt: skip
    trainer.train()
    lines = metrics(tmp_path / "run")
    for line in lines[:2]:
        assert line["seen"] == 2 and "rewards/chatty/mean" not in line
        weighted = line["rewards/judge/mean"] + 0.5 * line["rewards/count_digits/mean"]
        assert line["reward"] == pytest.approx(weighted, rel=1e-5)
    assert lines[2]["eval_seen"] == 1.5
    text = (tmp_path / "run" / "completions.jsonl").read_text().splitlines()
    rows = [json.loads(row) for row in text]
    assert len(rows) == 8 and [row["step"] for row in rows] == [0] * 4 + [1] * 4
    assert rows[0].keys() == {"step", "prompt", "completion", "reward"}


def test_function_and_class_are_one(run, policy, tmp_path, fingerprint):
    args = GRPOConfig(
        output_dir=str(tmp_path / "class"), max_steps=3, per_device_train_batch_size=16,
        learning_rate=4e-3, num_generations=4, max_completion_length=4, use_cpu=True,
        save_strategy="no", logging_steps=1,
    )  # fmt: skip
    trainer = GRPOTrainer(policy, verifier, args, PROMPTS)
    trainer.train()
    assert fingerprint(trainer.model) == fingerprint(run())


def test_generation_kwargs_reach_the_sampler(make):
    def drawn(**kwargs):
        source = make("grpo", reward_funcs=varied, generation_kwargs=kwargs or None).source()
        return [(s.prompt_ids, s.completion_ids) for s in source._roll_out(0)]

    assert len({tuple(ids) for _, ids in drawn()}) == 4
    assert len({tuple(ids) for _, ids in drawn(top_k=1)}) == 2  # one greedy answer to a prompt
    letters = [chr(i) for i in range(32, 127)]
    stopped = [ids for _, ids in drawn(stop_strings=letters)]
    assert min(len(ids) for ids in stopped) < 5
    stops = range(200)
    assert min(len(ids) for _, ids in drawn(stop_token_ids=stops)) < 5
    assert all(len(ids) == 5 for _, ids in drawn(stop_token_ids=stops, min_new_tokens=5))


def test_where_the_seconds_went(make, tmp_path):
    make("grpo", num_iterations=2).train()
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    parts = [f"time/{part}" for part in ("prefill", "decode", "reward", "train")]
    for step, line in enumerate(map(json.loads, lines)):
        sampled = step % 2 == 0
        assert [line[part] > 0 for part in parts] == [sampled, sampled, sampled, True]


def test_settings_that_do_not_fit_are_refused(run, policy, tmp_path):
    for options, message in (
        ({"num_generations": 1}, "at least 2 to compare"),
        ({"num_generations": 5}, "multiple of num_generations"),
        ({"loss_type": "cispo"}, "give one"),
        ({"max_completion_length": 90}, "48 positions: too few"),
        ({"reward_weights": [1.0, 2.0]}, "expected 1 values"),
        ({"steps_per_generation": 3, "gradient_accumulation_steps": 2}, "multiple"),
        ({"num_iterations": 0}, "num_iterations: expected at least 1, found 0"),
        ({"max_tokens_per_pass": 5}, r"at least 6, the longest prompt \(2\).*found 5"),
        ({"max_tokens_per_pass": 0}, "max_tokens_per_pass: expected at least 1 or None, found 0"),
        ({"reward_batch_size": 0}, "reward_batch_size: expected at least 1 or None, found 0"),
        ({"dynamic_sampling_rounds": -1}, "dynamic_sampling_rounds: expected 0.*found -1"),
        ({"generation_kwargs": {"num_beams": 2}}, "keys among top_k.*found 'num_beams'"),
        ({"generation_kwargs": {"min_new_tokens": 9}}, r"min_new_tokens: expected 0..4.*found 9"),
        ({"generation_kwargs": ["top_k"]}, r"expected a dict or None, found \['top_k'\]"),
        ({"top_p": 0}, r"top_p: expected a number in \(0, 1\], found 0"),
        ({"generation_kwargs": {"temperature": 2}}, "concerns the loss too: set temperature"),
        ({"deterministic": True, "packing": False}, "deterministic: expected packing True"),
        ({"deterministic": True, "generation_kwargs": {"weights": "int8"}}, "found weights 'int8'"),
        ({"deterministic": True, "dtype": "bf16"}, "expected dtype fp32, found bf16"),
    ):
        with pytest.raises(ValueError, match=message):
            run(**options)
    with pytest.raises(DataError, match=r"prompts\[0\].*tokens"):
        run(prompts=[{"prompt": "x" * 60, "wanted": "a"}])
    with pytest.raises(ValueError, match="at least one reward function"):
        run(reward_funcs=None)
    assert not (tmp_path / "run").exists()

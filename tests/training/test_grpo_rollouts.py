"""What a rollout leaves out, replaces and scores early, and that none of it moves a number."""

from __future__ import annotations

import threading

import pytest
import torch

from fastllm.generation import Engine
from fastllm.training.grpo_passes import PassPlan, Sample


def coarse(completion_ids, **_):
    """Half of the groups of two are flat."""
    return [float(sum(ids) % 2) for ids in completion_ids]


def constant(completions, **_):
    return [0.3] * len(completions)


def varied(completion_ids, **_):
    return [float(sum((i + 3) * token for i, token in enumerate(ids))) for ids in completion_ids]


EVERYTHING = {
    "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_iterations": 2,
    "dynamic_sampling_rounds": 2, "max_tokens_per_pass": 20,
}  # fmt: skip


@pytest.fixture
def many_prompts():
    return [{"prompt": f"{i}{'x' * (i % 3)}", "number": i} for i in range(40)]


# -- what carries no gradient -----------------------------------------------------------------


class Whole(PassPlan):
    """Computes every completion, as if none could be spared."""

    def computed(self, sample):
        return not sample.masked


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "cispo"])
def test_what_has_no_advantage_is_not_computed_and_changes_nothing(
    make, monkeypatch, metrics, tmp_path, loss_type
):
    options = {
        "loss_type": loss_type,
        "epsilon_high": 3.0,
        "num_iterations": 2,
        "weight_decay": 0.1,
    }
    spared = make("grpo", reward_funcs=coarse, run="spared", **options)
    spared.train()
    monkeypatch.setattr("fastllm.training.grpo.PassPlan", Whole)
    whole = make("grpo", reward_funcs=coarse, run="whole", **options)
    whole.train()
    for one, other in zip(spared.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    skipped = 0
    pairs = zip(metrics(tmp_path / "spared"), metrics(tmp_path / "whole"), strict=True)
    for line, expected in pairs:
        for name in ("loss", "grad_norm", "num_tokens"):
            assert line[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-6), name
        clipped = [name for name in line if "clip_ratio" in name]
        assert clipped and all(line[name] == pytest.approx(expected[name]) for name in clipped)
        skipped += line.get("frac_groups_skipped", 0)
        assert expected.get("frac_groups_skipped", 0) == 0
    assert skipped > 0


@pytest.mark.parametrize("options", [{}, {"max_tokens_per_pass": 30}, {"num_iterations": 2}])
def test_a_step_without_any_advantage_goes_on(make, metrics, tmp_path, options):
    trainer = make("grpo", reward_funcs=constant, **options)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    assert trainer.train().global_step == 4
    for line in metrics(tmp_path / "run"):
        assert line["loss"] == line["grad_norm"] == 0
        assert line.get("frac_groups_skipped", 1) == line.get("frac_reward_zero_std", 1) == 1
        assert "sampling/importance_sampling_ratio/max" not in line
    assert all(map(torch.equal, before, trainer.model.parameters()))


def test_an_empty_pass_gives_every_parameter_a_gradient_of_zero(make):
    trainer = make("grpo", reward_funcs=constant)
    (one,) = trainer.source().passes(0)
    assert one.batch.tokens.num_sequences == 0 and one.batch.skipped > 0 and one.weight > 0
    trainer.loss(trainer.model, one.batch)[0].backward()
    assert all(p.grad is not None and not p.grad.any() for p in trainer.model.parameters())


def test_with_a_kl_term_everything_is_computed(make):
    trainer = make("grpo", reward_funcs=constant, beta=0.1)
    (one,) = trainer.source().passes(0)
    assert one.batch.tokens.num_sequences == 4


# -- passes by token budget ---------------------------------------------------------------------


@pytest.fixture
def divided(make):
    """`divided(lengths, **config)`: which completions each pass has; prompts of 4 tokens."""

    def divide(groups, **config):
        plan = make("grpo", data=[{"prompt": "12"}], **config).source()._plan
        samples = [
            Sample([g, 1, 1, 1], [2] * length, [], 1.0)
            for g, lengths in enumerate(groups)
            for length in lengths
        ]
        passes = plan.divide(samples)
        for indices in passes:
            packed = plan.pack([samples[i] for i in indices])
            assert packed.input_ids.numel() <= config["max_tokens_per_pass"]
        return passes

    return divide


def test_groups_stay_together_where_they_fit(divided):
    groups = [[3, 3], [3, 3], [3, 3]]  # 10 tokens each
    assert divided(groups, max_tokens_per_pass=20) == [[0, 1, 2, 3], [4, 5]]
    assert divided(groups, max_tokens_per_pass=19) == [[0, 1], [2, 3], [4, 5]]
    assert divided(groups, max_tokens_per_pass=30) == [[0, 1, 2, 3, 4, 5]]


def test_a_group_too_long_for_a_pass_is_cut(divided):
    assert divided([[5, 5, 5], [1, 1]], max_tokens_per_pass=15) == [[0, 1], [2, 3, 4]]
    assert divided([[5, 5, 5]], max_tokens_per_pass=9) == [[0], [1], [2]]


def test_what_is_not_shared_is_counted_as_often_as_it_is_packed(divided):
    groups = [[3, 3], [3, 5]]
    assert divided(groups, max_tokens_per_pass=14, share_prefix=False) == [[0, 1], [2], [3]]
    assert divided(groups, max_tokens_per_pass=21, share_prefix=False) == [[0, 1], [2, 3]]
    assert divided(groups, max_tokens_per_pass=27, packing=False) == [[0, 1], [2, 3]]
    assert divided(groups, max_tokens_per_pass=36, packing=False) == [[0, 1, 2, 3]]


# -- dynamic sampling -----------------------------------------------------------------------------


def rollout_of(trainer, number=0):
    groups, metrics = trainer.source()._groups.groups(number)
    return groups, {name: float(total) / count for name, (total, count) in metrics.items()}


def said(groups):
    return [[c.token_ids for c in group.completions] for group in groups]


def test_flat_groups_are_replaced_by_new_prompts(make, many_prompts):
    options = {"reward_funcs": coarse, "data": many_prompts, "per_device_train_batch_size": 16}
    plain, nothing = rollout_of(make("grpo", **options))
    found, metrics = rollout_of(make("grpo", dynamic_sampling_rounds=10, **options))
    flat = [i for i, group in enumerate(plain) if group.is_flat]
    assert nothing == {} and flat and not any(group.is_flat for group in found)
    kept = [i for i in range(len(plain)) if i not in flat]
    assert [said(found)[i] for i in kept] == [said(plain)[i] for i in kept]
    first = {group.prompt.columns["number"] for group in plain}
    fresh = {found[i].prompt.columns["number"] for i in flat}
    assert len(fresh) == len(flat) and not first & fresh
    assert metrics["dynamic_sampling/replaced_groups"] == len(flat)
    assert metrics["dynamic_sampling/sampled_groups"] > len(plain)
    assert metrics["dynamic_sampling/rounds"] >= 1


def test_rounds_end(make, many_prompts):
    """After so many of them, or where no prompt is left."""
    options = {"reward_funcs": constant, "per_device_train_batch_size": 8}
    for data, rounds, sampled in ((many_prompts, 3, 16), (many_prompts[:7], 10, 7)):
        trainer = make("grpo", data=data, dynamic_sampling_rounds=rounds, **options)
        groups, metrics = rollout_of(trainer)
        assert len(groups) == 4 and all(group.is_flat for group in groups)
        assert metrics["dynamic_sampling/rounds"] == (3 if rounds == 3 else 1)
        assert metrics["dynamic_sampling/sampled_groups"] == sampled
        assert metrics["dynamic_sampling/replaced_groups"] == 0
        assert metrics["dynamic_sampling/sampled_reward"] == pytest.approx(0.3)


def test_replacements_are_no_streams_of_others(make, many_prompts):
    """Every prompt of a run has random numbers of its own."""
    seen = []

    def watch(model, prompts, *_, request_ids, **__):
        seen.extend(request_ids)
        raise InterruptedError

    source = make("grpo", data=many_prompts, gradient_accumulation_steps=2).source()._groups
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastllm.generation.generate", watch)
        for rollout in range(3):
            for number in range(3):
                with pytest.raises(InterruptedError):
                    source._sample(rollout, range(4), range(4), number)
    assert len(set(seen)) == len(seen) == 36


def test_the_order_of_the_data_is_kept_without_shuffling(make, many_prompts):
    options = {"data": many_prompts, "shuffle_dataset": False, "dynamic_sampling_rounds": 1}
    groups, _ = rollout_of(make("grpo", reward_funcs=lambda number, **_: [
        n + i if n > 1 else 0 for i, n in enumerate(number)
    ], **options))  # fmt: skip
    assert [group.prompt.columns["number"] for group in groups] == [2, 3]


@pytest.mark.parametrize("size", [None, 1, 5])
def test_everything_together_is_reproducible(
    make, fingerprint, metrics, tmp_path, size, many_prompts
):
    options = EVERYTHING | {"reward_batch_size": size, "data": many_prompts}
    prints = set()
    for run in ("a", "b"):
        trainer = make("grpo", reward_funcs=[coarse, varied], run=run, **options)
        trainer.train()
        prints.add(fingerprint(trainer.model))
    assert len(prints) == 1 and metrics(tmp_path / "a") == metrics(tmp_path / "b")
    assert any("dynamic_sampling/rounds" in line for line in metrics(tmp_path / "a"))


# -- rewards while later completions are sampled --------------------------------------------------


def test_scores_in_batches_are_the_scores_of_one_call(
    make, fingerprint, many_prompts, metrics, tmp_path
):
    seen = []

    def watched(completions, number, trainer_state, log_metric, log_extra, **_):
        assert len(completions) == len(number)
        seen.append((len(completions), threading.current_thread() is threading.main_thread()))
        log_metric("counted", len(completions))
        log_extra("ends", [c[-1:] for c in completions])
        return [float(len(c) + n) for c, n in zip(completions, number, strict=True)]

    prints = {}
    for size, calls in (
        (None, [(16, True)]),
        (1, [(2, False)] * 8),
        (5, [(6, False)] * 2 + [(4, False)]),
    ):
        trainer = make(
            "grpo", reward_funcs=[watched, varied], data=many_prompts, max_steps=1, run=f"{size}",
            per_device_train_batch_size=16, reward_batch_size=size, log_completions=True,
        )  # fmt: skip
        trainer.train()
        prints[size] = fingerprint(trainer.model)
        assert seen == calls
        seen.clear()
    assert len(set(prints.values())) == 1
    texts = {(tmp_path / f"{size}" / "completions.jsonl").read_text() for size in prints}
    assert len(texts) == 1 and texts.pop().count('"ends"') == 16


def test_reward_models_score_once_at_the_end(make, many_prompts, pairs, tmp_path):
    from fastllm import train_rm

    train_rm(
        pairs, tmp_path / "judge", steps=1, tokenizer="bytes", device="cpu", save_strategy="no",
        n_layer=1, n_head=2, n_kv_head=1, n_embd=16, block_size=48,
    )  # fmt: skip
    options = {"data": many_prompts, "per_device_train_batch_size": 8}
    functions = [str(tmp_path / "judge"), coarse]
    at_once, _ = rollout_of(make("grpo", reward_funcs=functions, **options))
    early, _ = rollout_of(make("grpo", reward_funcs=functions, reward_batch_size=1, **options))
    for one, other in zip(at_once, early, strict=True):
        assert torch.equal(one.each, other.each) and torch.equal(one.total, other.total)
    only, _ = rollout_of(make("grpo", reward_funcs=functions[:1], reward_batch_size=1, **options))
    assert torch.equal(only[0].each, at_once[0].each[:, :1])


def test_a_column_that_some_prompts_lack_is_in_every_batch(make):
    def judge(completions, answer, **_):
        return [None if a is None else float(a) for a in answer]

    data = [{"prompt": "1", "answer": 1}, {"prompt": "2"}]
    groups, _ = rollout_of(make("grpo", reward_funcs=judge, data=data, reward_batch_size=1))
    known = {g.prompt.prompt: g.total.isnan().tolist() for g in groups}
    assert known == {"1": [False, False], "2": [True, True]}


def test_an_error_in_a_batch_names_the_function(make, many_prompts):
    def broken(completions, **_):
        raise KeyError("mine")

    def short(completions, **_):
        return [0.0]

    for function, message in (
        (broken, "function broken failed.*KeyError.*mine"),
        (short, "found 1"),
    ):
        trainer = make("grpo", reward_funcs=[coarse, function], reward_batch_size=1)
        with pytest.raises(RuntimeError, match=message):
            trainer.train()
    assert not [t for t in threading.enumerate() if t.name.startswith("fastllm-rewards")]


@pytest.mark.parametrize("step", ["auto", "ops"])
def test_an_engine_that_stays_samples_with_the_new_weights(make, monkeypatch, fingerprint, step):
    """As rollouts on a GPU do."""
    kwargs = {"prefill_tokens": 64, "max_batch_size": 3}
    fresh = make("grpo", reward_funcs=varied, run="fresh", generation_kwargs=kwargs)
    fresh.train()
    engines = []

    class Counted(Engine):
        def __init__(self, *given, **options):
            engines.append(options)
            super().__init__(*given, **options | {"step": step})

    monkeypatch.setattr("fastllm.training.groups.keeps_engine", lambda model: True)
    monkeypatch.setattr("fastllm.generation.Engine", Counted)
    kept = make("grpo", reward_funcs=varied, run="kept", generation_kwargs=kwargs)
    kept.train()
    assert engines == [kwargs]
    if step == "auto":
        assert fingerprint(kept.model) == fingerprint(fresh.model)
    for one, other in zip(kept.model.parameters(), fresh.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)

"""The loop: what a step is, what is logged and saved when, and what a bad number does."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from fastllm.training.callbacks import TrainerControl
from fastllm.training.checkpoint import checkpoints
from fastllm.training.loop import NumericError


class Recorder:
    """A callback that writes down every event with its step."""

    def __init__(self):
        self.events = []

    def __getattr__(self, name):
        if not name.startswith("on_"):
            raise AttributeError(name)
        return lambda args, state, control, **_: self.events.append((name, state.global_step))

    def steps(self, event):
        return [step for name, step in self.events if name == event]


def stop_at(step, event="on_step_end"):
    """A callback that asks to stop after a step."""

    def ask(self, args, state, control, **_):
        control.should_training_stop |= state.global_step == step

    return type("StopAt", (), {event: ask})()


def lines_with(metrics, key):
    return {line["step"]: line[key] for line in metrics if key in line}


# -- what a step is ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sft", "rm", "grpo"])
def test_accumulation_divides_by_the_count_of_the_whole_step(make, kind, metrics, tmp_path):
    """8 x 1, 4 x 2 and 1 x 8 are the same run, though passes have unlike token counts."""
    cuts = {(8, 1), (4, 2), (1, 8)} if kind != "grpo" else {(8, 1), (4, 2), (2, 4)}
    curves = []
    for size, passes in sorted(cuts):
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": passes}
        make(kind, run=f"{size}", learning_rate=3e-3, **options).train()
        curves.append([line["loss"] for line in metrics(tmp_path / f"{size}")])
        curves[-1] += [line["grad_norm"] for line in metrics(tmp_path / f"{size}")]
    for curve in curves[1:]:
        assert curve == pytest.approx(curves[0], rel=2e-5, abs=2e-6)


def test_the_logged_loss_is_the_mean_over_the_tokens_of_the_step(make, metrics, tmp_path):
    trainer = make("sft", per_device_train_batch_size=10, max_steps=1)
    batch, count, _ = trainer._collate(trainer._train)
    expected = float(trainer.loss(trainer.model, batch)[0]) / count
    trainer.train()
    (line,) = metrics(tmp_path / "run")
    assert line["loss"] == pytest.approx(expected, rel=1e-6)
    assert line["num_tokens"] == sum(len(e.input_ids) for e in trainer._train)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_weights_and_optimizer_stay_fp32(make, dtype):
    trainer = make("sft", dtype=dtype)
    before = trainer.model.model.embed_tokens.weight.detach().clone()
    trainer.train()
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    assert not torch.equal(trainer.model.model.embed_tokens.weight, before)


# -- logging, evaluating, saving --------------------------------------------------------------


def test_a_line_is_the_mean_over_its_window(make, metrics, tmp_path):
    make("sft", run="every", max_steps=7).train()
    output = make("sft", run="some", max_steps=7, logging_steps=3).train()
    every = lines_with(metrics(tmp_path / "every"), "loss")
    some = lines_with(metrics(tmp_path / "some"), "loss")
    assert list(some) == [3, 6, 7]
    expected = [sum(every[s] for s in w) / len(w) for w in ((1, 2, 3), (4, 5, 6), (7,))]
    assert list(some.values()) == pytest.approx(expected)
    assert output.training_loss == pytest.approx(sum(every.values()) / 7)
    rates = lines_with(metrics(tmp_path / "every"), "learning_rate")
    assert list(rates.values()) == pytest.approx([0.01 * (1 - s / 7) for s in range(7)])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"eval_strategy": "no"}, [7]),
        ({"eval_strategy": "steps", "eval_steps": 3}, [3, 6, 7]),
        ({"eval_strategy": "steps", "logging_steps": 7}, [7]),
        ({"eval_strategy": "epoch"}, [3, 6, 7]),  # ten records, four to a step
    ],
)
def test_evaluation_comes_when_it_is_asked_for_and_at_the_end(
    make, metrics, tmp_path, items, options, expected
):
    make("sft", max_steps=7, eval_dataset=items[:3], **options).train()
    assert list(lines_with(metrics(tmp_path / "run"), "eval_loss")) == expected


def test_evaluating_does_not_change_training(make, items, fingerprint):
    plain, watched = make("sft", run="a"), make("sft", run="b", eval_dataset=items[:3])
    watched.args.eval_strategy, watched.args.eval_steps = "steps", 1
    plain.train()
    watched.train()
    assert fingerprint(plain.model) == fingerprint(watched.model)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"save_strategy": "no"}, []),
        ({"save_strategy": "steps", "save_steps": 3}, [3, 6, 7]),
        ({"save_strategy": "epoch"}, [3, 6, 7]),
        ({"save_strategy": "steps", "save_steps": 2, "save_total_limit": 2}, [6, 7]),
    ],
)
def test_checkpoints_come_when_they_are_asked_for_and_at_the_end(make, tmp_path, options, expected):
    make("sft", max_steps=7, **options).train()
    found = sorted(int(path.name.split("-")[1]) for path in checkpoints(tmp_path / "run"))
    assert found == expected
    assert (tmp_path / "run" / "model.safetensors").is_file()


def test_a_run_folder_with_checkpoints_is_not_overwritten(make, tmp_path):
    make("sft", save_strategy="steps", save_steps=2).train()
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")}
    with pytest.raises(ValueError, match=r"holds checkpoints .* checkpoint-4.*overwrite"):
        make("sft", save_strategy="steps").train()
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")} == before
    make("sft", save_strategy="steps", max_steps=1, overwrite_output_dir=True).train()
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["checkpoint-1"]


def test_a_trainer_trains_again_from_where_its_model_is(make, metrics, tmp_path):
    trainer = make("sft")
    assert trainer.train().global_step == trainer.train().global_step == 4
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2, 3, 4]


def test_the_trained_model_is_ready_for_use(make):
    trainer = make("sft")
    trainer.train()
    assert not any(module.training for module in trainer.model.modules())


def test_run_json_says_what_was_run(make, tmp_path):
    make("sft", max_steps=1).train()
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["trainer"] == "SFTTrainer" and run["dtype"] == "float32"
    assert run["config"]["max_steps"] == 1 and run["learning_rate"] == 0.01


# -- callbacks --------------------------------------------------------------------------------


def test_callbacks_hear_of_everything_in_order(make, items):
    recorder = Recorder()
    make(
        "sft", max_steps=4, callbacks=[recorder], eval_dataset=items[:2],
        save_strategy="steps", save_steps=2, logging_steps=2,
    ).train()  # fmt: skip
    assert recorder.events[0] == ("on_train_begin", 0)
    assert recorder.events[-1] == ("on_train_end", 4)
    assert recorder.steps("on_step_begin") == [0, 1, 2, 3]
    assert recorder.steps("on_step_end") == [1, 2, 3, 4]
    assert recorder.steps("on_epoch_begin") == [0, 3] and recorder.steps("on_epoch_end") == [3]
    assert recorder.steps("on_save") == [2, 4]
    assert recorder.steps("on_evaluate") == [4]
    assert recorder.steps("on_log") == [2, 4, 4]
    last = [name for name, step in recorder.events if step == 4]
    assert last == ["on_step_end", "on_log", "on_log", "on_evaluate", "on_save", "on_train_end"]


def test_a_callback_of_transformers_works(make, tmp_path):
    transformers = pytest.importorskip("transformers")

    class Ours(transformers.TrainerCallback):
        seen = ()

        def on_log(self, args, state, control, logs=None, model=None, **kwargs):
            assert isinstance(model, nn.Module) and args.learning_rate == 0.01
            Ours.seen += ((state.global_step, "loss" in logs, state.log_history[-1]["step"]),)

        def on_step_end(self, args, state, control, **kwargs):
            control.should_save = state.global_step == 2
            control.should_log = state.global_step == 3
            control.should_training_stop = state.global_step == 5
            return control

    output = make("sft", max_steps=9, logging_steps=4, callbacks=[Ours]).train()
    assert output.global_step == 5
    assert Ours.seen == ((3, True, 3), (4, True, 4), (5, True, 5))
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["checkpoint-2"]


@pytest.mark.parametrize("event", ["on_step_end", "on_log", "on_evaluate", "on_save"])
def test_a_stop_still_logs_evaluates_and_saves(make, metrics, tmp_path, items, event):
    """Whenever a callback asks for it, and each only once."""
    make(
        "sft", max_steps=9, logging_steps=2, eval_dataset=items[:2], callbacks=[stop_at(4, event)],
        eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2,
    ).train()  # fmt: skip
    lines = metrics(tmp_path / "run")
    assert list(lines_with(lines, "loss")) == list(lines_with(lines, "eval_loss")) == [2, 4]
    assert [line["step"] for line in lines] == [2, 2, 4, 4]
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["checkpoint-4", "checkpoint-2"]


def test_controls_are_those_of_transformers():
    callbacks = pytest.importorskip("transformers.trainer_callback")
    assert vars(TrainerControl()).keys() <= vars(callbacks.TrainerControl()).keys()


# -- numbers that are not finite --------------------------------------------------------------


def poisoned(trainer, step, how):
    """From one step on, the loss (or its gradient too) is not a number."""
    original = trainer.loss

    def loss(model, batch):
        value, metrics = original(model, batch)
        if trainer.state.global_step < step - 1:
            return value, metrics
        nan = float("nan")
        return (value + nan if how == "loss" else value * nan), metrics

    trainer.loss = loss


@pytest.mark.parametrize("how", ["loss", "gradient"])
@pytest.mark.parametrize("kind", ["sft", "rm", "grpo"])
def test_a_bad_number_stops_the_run_before_it_does_harm(make, kind, how, tmp_path, fingerprint):
    saving = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2}
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, **saving}
    good = make(kind, run="good", callbacks=[stop_at(2)], max_steps=9, **options)
    good.train()
    trainer = make(kind, max_steps=9, **options)
    poisoned(trainer, 3, how)
    with pytest.raises(NumericError, match=r"step 3: loss nan.*not changed"):
        trainer.train()
    assert fingerprint(trainer.model) == fingerprint(good.model)
    assert [p.name for p in checkpoints(tmp_path / "run")] == ["checkpoint-2", "checkpoint-1"]
    assert not (tmp_path / "run" / "model.safetensors").exists()
    resumed = make(kind, max_steps=3, **options)
    assert math.isfinite(resumed.train("auto").training_loss)


def test_fp16_skips_a_step_that_overflows(make, metrics, tmp_path):
    trainer = make("sft", dtype="fp16", max_steps=6, per_device_train_batch_size=10)
    original, calls = trainer.loss, [0]

    def loss(model, batch):
        calls[0] += 1
        value, found = original(model, batch)
        # Finite itself, but not its gradient times the loss scale.
        return (value + 1e36 * (value - value.detach()) if calls[0] == 3 else value), found

    trainer.loss = loss
    trainer.train()
    lines = metrics(tmp_path / "run")
    assert [line["step"] for line in lines if "grad_norm" not in line] == [3]
    losses = [line["loss"] for line in lines]
    assert losses[3] == pytest.approx(losses[2], rel=1e-5) and losses[5] < losses[0]


def test_a_run_folder_is_free_for_any_path(make, tmp_path):
    trainer = make("sft", run="deep/er/run", max_steps=1)
    trainer.train()
    assert (Path(trainer.args.output_dir) / "config.json").is_file()

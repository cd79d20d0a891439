"""A run that is killed after any step and resumed is the run that was not, bit for bit."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from fastllm.model.lora import LoraConfig
from fastllm.training.checkpoint import CheckpointError

STEPS = 12

# Ten records, four to a step: epochs end inside the run. A line is the mean over five steps, so
# most checkpoints fall into the middle of a window.
COMMON = {
    "max_steps": STEPS,
    "save_strategy": "steps",
    "save_steps": 1,
    "logging_steps": 5,
    "warmup_steps": 3,
    "weight_decay": 0.1,
    "eval_strategy": "steps",
    "eval_steps": 4,
}
SMALL_PASSES = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
LORA = LoraConfig(r=2, lora_dropout=0.3)

RUNS = {
    "sft": ("sft", SMALL_PASSES),
    "sft-lora-dropout": ("sft", {"peft_config": LORA}),
    "rm": ("rm", SMALL_PASSES | {"center_rewards_coefficient": 0.1}),
    "rm-lora-dropout": ("rm", {"peft_config": LORA}),
    "grpo": ("grpo", {}),
    # A rollout lasts four steps (two passes over two steps), so most checkpoints hold one.
    "grpo-buffer": (
        "grpo",
        SMALL_PASSES | {"num_iterations": 2, "steps_per_generation": 4, "beta": 0.05},
    ),
    "grpo-replaced": (
        "grpo",
        SMALL_PASSES
        | {
            "num_iterations": 2,
            "steps_per_generation": 4,
            "dynamic_sampling_rounds": 2,
            "reward_batch_size": 1,
            "max_tokens_per_pass": 12,
        },
    ),
    "grpo-lora-dropout": (
        "grpo",
        SMALL_PASSES | {"num_iterations": 2, "beta": 0.05, "peft_config": LORA},
    ),
}


class Killed(Exception):
    """Stands for a signal that leaves no time for anything."""


class KillBefore:
    """Kills the run as it begins a step."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == self.step:
            raise Killed


@pytest.fixture(params=RUNS)
def start(request, make, base, items, pairs):
    """`start(run, callbacks=(), **config)`: a fresh trainer, as a new process has it."""
    kind, options = RUNS[request.param]
    adapted = "lora" in request.param
    if kind == "grpo":  # rewards that draw random numbers, as a noisy judge may
        reward = coin if "replaced" in request.param else noisy
        options = options | {"reward_funcs": reward, "eval_dataset": [{"prompt": "1"}]}
    else:
        options = options | {"eval_dataset": (items if kind == "sft" else pairs)[:3]}

    def build(run, callbacks=(), **config):
        model = base if adapted else None
        return make(kind, model, run=run, callbacks=callbacks, **COMMON | options | config)

    return build


def noisy(completions, log_metric, **_):
    log_metric("noise", random.random())
    return [sum(c < "A" for c in text) / 8 + random.random() for text in completions]


def coin(completions, **_):
    """Groups of two are flat half of the time."""
    return [float(random.random() < 0.5) for _ in completions]


@pytest.fixture
def uninterrupted(start, fingerprint, metrics, tmp_path):
    trainer = start("whole")
    output = trainer.train()
    folder = tmp_path / "whole"
    return fingerprint(trainer.model), metrics(folder), output.training_loss, folder


def cut_back(whole, run, step):
    """The run folder as a kill before the next step leaves it."""
    shutil.copytree(whole, run)
    for path in run.glob("checkpoint-*"):
        if int(path.name.split("-")[1]) > step:
            shutil.rmtree(path)
    for path in run.iterdir():
        if path.is_file() and path.name != "metrics.jsonl":
            path.unlink()


def test_resuming_after_any_step_changes_nothing(
    start, uninterrupted, fingerprint, metrics, tmp_path
):
    """Checkpoints of one run stand for a kill after each step: every one was on the disk at that
    moment, and metrics.jsonl has lines that a killed run would not have yet."""
    weights, lines, loss, whole = uninterrupted
    assert lines[-1]["step"] == STEPS
    for step in range(1, STEPS + 1):
        run = tmp_path / f"after-{step}"
        cut_back(whole, run, step)
        trainer = start(run.name, save_strategy="no")
        output = trainer.train("auto")
        assert fingerprint(trainer.model) == weights, f"weights after a stop at step {step}"
        assert metrics(run) == lines, f"lines after a stop at step {step}"
        assert output.training_loss == loss and output.global_step == STEPS
        shutil.rmtree(run)


def test_a_run_killed_twice_is_the_same_run(start, uninterrupted, fingerprint, metrics, tmp_path):
    weights, lines, _, _ = uninterrupted
    for step, resume in ((3, None), (8, "auto")):
        with pytest.raises(Killed):
            start("run", [KillBefore(step)]).train(resume)
    trainer = start("run")
    trainer.train(True)
    assert fingerprint(trainer.model) == weights and metrics(tmp_path / "run") == lines


def test_a_named_checkpoint_is_resumed_though_there_are_newer_ones(
    start, uninterrupted, fingerprint, tmp_path
):
    weights, _, _, whole = uninterrupted
    trainer = start("whole")
    trainer.train(whole / "checkpoint-5")
    assert fingerprint(trainer.model) == weights


@pytest.mark.parametrize("start", ["sft"], indirect=True)
def test_a_damaged_checkpoint_is_passed_over(start, uninterrupted, fingerprint, tmp_path):
    weights, _, _, whole = uninterrupted
    cut_back(whole, tmp_path / "run", 7)
    flip(tmp_path / "run" / "checkpoint-7" / "model.safetensors")
    trainer = start("run")
    trainer.train("auto")
    assert fingerprint(trainer.model) == weights
    for path in (tmp_path / "run").glob("checkpoint-*"):
        flip(path / "model.safetensors")
    with pytest.raises(CheckpointError, match="no checkpoint is whole"):
        start("run").train("auto")


@pytest.mark.parametrize("start", ["sft"], indirect=True)
def test_auto_starts_afresh_where_there_is_nothing(start, uninterrupted, fingerprint):
    trainer = start("fresh")
    trainer.train("auto")
    assert fingerprint(trainer.model) == uninterrupted[0]


@pytest.mark.parametrize("start", ["sft"], indirect=True)
def test_a_finished_run_can_be_made_longer(start, uninterrupted):
    trainer = start("whole")
    trainer.args.max_steps = STEPS + 2
    assert trainer.train("auto").global_step == STEPS + 2


def flip(path: Path) -> None:
    """Flip one bit of a file."""
    content = bytearray(path.read_bytes())
    content[-5] ^= 4
    path.write_bytes(bytes(content))


def test_another_tokenizer_is_refused(tmp_path):
    from fastllm import train_sft
    from fastllm.data.errors import DataError
    from fastllm.data.tokenizer import Tokenizer

    sizes = {"n_layer": 1, "n_head": 2, "n_kv_head": 1, "n_embd": 8, "block_size": 16}
    items = [("1+1=", "2"), ("2+2=", "4")] * 4
    train_sft(items, tmp_path, steps=2, tokenizer="bytes", **sizes)
    other = Tokenizer.train(["1+1=2", "2+2=4"], vocab_size=262)
    with pytest.raises(DataError, match="trained with another tokenizer"):
        train_sft(items, tmp_path, steps=4, tokenizer=other, resume="auto", **sizes)

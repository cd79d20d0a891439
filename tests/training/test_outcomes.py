"""Numbers that are read one step late: the same lines, the same errors, the same weights."""

from __future__ import annotations

import math

import pytest
import torch

from fastllm.training import loop, outcomes
from fastllm.training.averages import Averages, on_host
from fastllm.training.callbacks import TrainerState
from fastllm.training.checkpoint import checkpoints
from fastllm.training.outcomes import Numbers, NumericError, Outcomes


@pytest.fixture
def late(monkeypatch):
    """The loop as on a GPU: a step's numbers are looked at while the next one is computed."""
    monkeypatch.setattr(loop, "lag_of", lambda optimizer: 1)


def scalar(value):
    return torch.tensor(value, dtype=torch.float32)


def test_what_is_late_is_not_lost_or_reordered():
    averages, state = Averages(), TrainerState()
    seen = Outcomes(averages, state, scaled=False, lag=1)
    for step in range(3):
        state.global_step = step
        seen.add(scalar(1.0 + step), scalar(10.0 * step))
        seen.look()
        assert seen.loss_sum == sum(10.0 * s for s in range(step))
    seen.settle()
    assert seen.loss_sum == 30.0
    assert averages.pop() == {"loss": 10.0, "grad_norm": 2.0}


def test_a_bad_step_is_named_and_the_state_goes_back():
    state = TrainerState(global_step=4, num_input_tokens_seen=70, epoch=0.5)
    seen = Outcomes(Averages(), state, scaled=False, lag=1)
    seen.add(scalar(math.inf), scalar(1.0))
    seen.look()
    state.global_step, state.num_input_tokens_seen, state.epoch = 5, 90, 0.6
    seen.add(scalar(1.0), scalar(1.0))
    with pytest.raises(NumericError, match=r"step 5: loss 1.0, gradient norm inf.*not changed"):
        seen.look()
    assert (state.global_step, state.num_input_tokens_seen, state.epoch) == (4, 70, 0.5)


def test_an_overflow_of_fp16_is_told_of_its_own_step(caplog):
    averages = Averages()
    seen = Outcomes(averages, TrainerState(global_step=6), scaled=True, lag=0)
    with caplog.at_level("INFO", "fastllm"):
        seen.add(scalar(math.inf), scalar(2.0))
        seen.look()
    assert "step 7: fp16 gradients overflowed" in caplog.text
    assert averages.pop() == {"loss": 2.0}
    seen.add(scalar(math.nan), scalar(math.nan))
    with pytest.raises(NumericError):
        seen.look()


@pytest.mark.parametrize("kind", ["sft", "rm", "grpo"])
def test_a_run_is_the_same_when_the_host_looks_late(
    make, kind, metrics, fingerprint, tmp_path, items, monkeypatch
):
    heard = {}
    for name, lag in (("now", 0), ("late", 1)):
        monkeypatch.setattr(loop, "lag_of", lambda optimizer, lag=lag: lag)
        events = heard.setdefault(name, [])

        class Recorder:
            def on_step_end(self, args, state, control, events=events, **_):
                events.append((state.global_step, state.num_input_tokens_seen, state.epoch))

            def on_log(self, args, state, control, logs=None, events=events, **_):
                events.append((state.global_step, logs))

        options = {"logging_steps": 3, "save_strategy": "steps", "save_steps": 2, "max_steps": 7}
        if kind == "sft":
            options |= {"eval_dataset": items[:3], "eval_strategy": "steps", "eval_steps": 5}
        trainer = make(kind, run=name, callbacks=[Recorder], **options)
        output = trainer.train()
        events += [fingerprint(trainer.model), output.training_loss, metrics(tmp_path / name)]
        events.append(list(trainer.state.log_history))
    assert heard["now"] == heard["late"]


@pytest.mark.parametrize("how", ["loss", "gradient"])
def test_a_bad_step_saves_nothing_and_changes_nothing(make, late, how, tmp_path, fingerprint):
    """All steps from the third on: the optimizer leaves them out, the host hears of it late."""
    saving = {"save_strategy": "steps", "save_steps": 2, "logging_steps": 100, "max_steps": 9}
    trainer = make("sft", **saving)
    original, before = trainer.loss, []

    def loss(model, batch):
        value, found = original(model, batch)
        if trainer.state.global_step < 2:
            return value, found
        before.append(fingerprint(model))
        return (value + math.nan if how == "loss" else value * math.nan), found

    trainer.loss = loss
    with pytest.raises(NumericError, match="step 3: loss nan"):
        trainer.train()
    assert len(before) == 2  # the step after it was computed, but changed nothing
    assert {fingerprint(trainer.model), *before} == {before[0]}
    assert trainer.state.global_step == 2
    assert [p.name for p in checkpoints(tmp_path / "run")] == ["checkpoint-2"]
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_a_line_that_is_due_waits_for_its_step(make, late, tmp_path, metrics):
    """A bad step that is logged is found before its line is written."""
    trainer = make("sft", logging_steps=3, max_steps=9)
    original = trainer.loss

    def loss(model, batch):
        value, found = original(model, batch)
        return value * (math.nan if trainer.state.global_step == 2 else 1.0), found

    trainer.loss = loss
    with pytest.raises(NumericError, match="step 3"):
        trainer.train()
    assert metrics(tmp_path / "run") == []


def test_lag_is_for_optimizers_that_decide_on_the_device(make):
    from fastllm.training.optimizer import Optimizer

    trainer = make("sft")
    assert outcomes.lag_of(Optimizer(trainer.model, trainer.args, False)) == 0


@pytest.mark.cuda
def test_numbers_of_a_gpu_travel_behind_the_work():
    a = torch.randn(4096, 4096, device="cuda")
    torch.cuda.synchronize()
    for _ in range(20):
        a = (a @ a) / 4096
    numbers = Numbers([a.sum() * 0 + 3.0, torch.tensor(5.0, device="cuda")])
    assert numbers._event is not None and not numbers._event.query()
    assert numbers.read() == numbers.read() == [3.0, 5.0]
    mixed = [torch.tensor(7, device="cuda"), 2, torch.tensor(0.1, device="cuda"), scalar(4)]
    assert on_host(mixed) == [7.0, 2.0, float(scalar(0.1)), 4.0]


@pytest.mark.cuda
def test_a_run_on_a_gpu_waits_for_nothing_between_its_lines(make, wide_config):
    """PyTorch raises where the host would wait; logging, evaluating and the end may."""
    waits = []
    options = {"use_cpu": False, "dtype": "bf16", "max_steps": 12, "logging_steps": 6}
    trainer = make("sft", model=wide_config, **options)

    class Watch:
        def on_step_end(self, args, state, control, **_):
            torch.cuda.set_sync_debug_mode("error" if state.global_step in (7, 8, 9) else 0)
            waits.append(state.global_step)

    trainer.add_callback(Watch)
    try:
        trainer.train()
    finally:
        torch.cuda.set_sync_debug_mode(0)
    assert len(waits) == 12

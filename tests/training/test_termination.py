"""SIGTERM ends a run after its step, with a checkpoint, and the run goes on from there."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from fastllm.training.checkpoint import checkpoints
from fastllm.training.termination import Terminated, watching


def sigterm_at(step, times=1):
    """A callback that sends the process SIGTERM during a step."""

    class Send:
        def on_step_begin(self, args, state, control, **_):
            if state.global_step == step - 1:
                for _ in range(times):
                    os.kill(os.getpid(), signal.SIGTERM)

    return Send()


SAVING = {"save_strategy": "steps", "save_steps": 100}


@pytest.mark.parametrize("kind", ["sft", "rm", "grpo"])
def test_a_run_that_is_terminated_goes_on_as_if_nothing_was(
    make, kind, items, metrics, fingerprint, tmp_path
):
    options = {"max_steps": 6, "logging_steps": 4, **SAVING}
    if kind == "sft":
        options["eval_dataset"] = items[:3]
    whole = make(kind, run="whole", **options)
    whole.train()
    with pytest.raises(Terminated, match=r"after step 3 of 6; resume from .*checkpoint-3") as end:
        make(kind, callbacks=[sigterm_at(3)], **options).train()
    assert end.value.code == 143
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["checkpoint-3"]
    assert not (tmp_path / "run" / "model.safetensors").exists()  # it is not finished
    resumed = make(kind, **options)
    resumed.train("auto")
    assert fingerprint(resumed.model) == fingerprint(whole.model)
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")


def test_nothing_is_saved_where_nothing_is_to_be(make, tmp_path):
    trainer = make("sft", max_steps=6, save_strategy="no", callbacks=[sigterm_at(2)])
    with pytest.raises(Terminated, match=r"after step 2 of 6; nothing was saved"):
        trainer.train()
    assert not checkpoints(tmp_path / "run")


def test_the_last_step_ends_the_run_anyway(make, tmp_path):
    output = make("sft", max_steps=3, callbacks=[sigterm_at(3)], **SAVING).train()
    assert output.global_step == 3 and (tmp_path / "run" / "model.safetensors").is_file()


def test_no_handler_and_no_thread_stays_behind(make):
    with pytest.raises(Terminated):
        make("sft", max_steps=6, callbacks=[sigterm_at(2)], **SAVING).train()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert not [t for t in threading.enumerate() if t.name.startswith("fastllm")]


def test_the_second_request_is_not_held_up():
    with watching() as request:
        os.kill(os.getpid(), signal.SIGTERM)
        assert request.made and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_handler_of_the_user_stays_in_charge():
    seen = []
    signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    try:
        with watching() as request:
            os.kill(os.getpid(), signal.SIGTERM)
        assert seen == [signal.SIGTERM] and not request.made
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def test_another_thread_can_train_too():
    found = []

    def run():
        with watching() as request:
            found.append(request.made)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [False]

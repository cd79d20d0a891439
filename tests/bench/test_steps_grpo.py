"""GRPO in its parts: TRL's by a stopwatch, ours as logged, and one group's pass by itself."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench.peers.stopwatch import Stopwatch
from bench.steps import group_pass, grpo, material, ours
from bench.steps.contest import Case
from bench.steps.job import Job
from fastllm import Tokenizer

SIZES = {"n_layer": 2, "n_head": 2, "n_kv_head": 1, "n_embd": 32}
FP32 = {"dtype": "fp32"}
PLAIN = FP32 | {"share_prefix": False}


def group_in(folder: Path, monkeypatch) -> None:
    monkeypatch.setattr(material, "SMALL", SIZES)
    grpo.training_pass(4, 24, new=6).job(folder).write(folder)


@pytest.mark.parametrize("settings", [PLAIN, PLAIN | {"packing": False}])
def test_a_group_is_computed_alike_shared_or_not(tmp_path, monkeypatch, settings):
    group_in(tmp_path, monkeypatch)
    shared = group_pass.group_pass(Job.read(tmp_path, FP32))(2)
    assert group_pass.group_pass(Job.read(tmp_path, settings))(1) == pytest.approx(shared, abs=1e-5)
    assert len(shared) == 2 and all(abs(value) > 1e-3 for value in shared)


def test_a_group_is_computed_alike_by_transformers(tmp_path, monkeypatch):
    pytest.importorskip("trl")
    from bench.peers import loops

    group_in(tmp_path, monkeypatch)
    expected = group_pass.group_pass(Job.read(tmp_path, FP32))(1)
    assert loops.group_pass(Job.read(tmp_path, FP32))(1) == pytest.approx(expected, abs=1e-5)


def test_another_group_is_not_alike(tmp_path, monkeypatch):
    group_in(tmp_path, monkeypatch)
    job = Job.read(tmp_path, FP32)
    expected = group_pass.group_pass(job)(1)
    job.records[0]["completions"][0][0] += 1
    tolerance = Case.tolerance
    assert group_pass.group_pass(job)(1) != pytest.approx(expected, abs=tolerance)


def test_the_stopwatch_takes_trls_step_apart():
    def forward():
        time.sleep(0.01)

    trainer = SimpleNamespace(model=SimpleNamespace(forward=forward))

    def generate():
        for _ in range(3):
            trainer.model.forward()

    def prepare():
        trainer.model.generate()
        trainer._calculate_rewards()
        time.sleep(0.005)

    trainer.model.generate = generate
    trainer._calculate_rewards = lambda: time.sleep(0.02)
    trainer._prepare_inputs = prepare
    watch = Stopwatch()
    watch.follow(trainer)
    for _ in range(2):
        trainer._prepare_inputs()
        trainer.model.forward()
    parts = watch.parts({}, 2, 1.0)
    assert sum(parts.values()) == pytest.approx(1.0)
    assert parts["prefill"] >= 0.02 and parts["decoding"] >= 0.04
    assert parts["prefill"] < parts["decoding"]
    assert parts["scoring"] >= 0.04 and parts["rest"] >= 0.01
    assert parts["training"] == pytest.approx(1.0 - 0.15, abs=0.1)
    assert watch.parts({}, 1, 1.0)["training"] == 1.0


def test_our_parts_are_those_that_are_logged(tmp_path):
    log = {"time/prefill": 1.0, "time/decode": 2.0, "time/reward": 3.0, "time/train": 4.0}
    assert ours._logged_parts(log, 2, 24.0) == {
        "prefill": 2.0,
        "decoding": 4.0,
        "scoring": 6.0,
        "training": 8.0,
        "rest": 4.0,
    }
    assert set(ours.PARTS) | {"rest"} == set(grpo.PARTS)


def test_our_trainer_logs_them(tmp_path):
    from bench.steps import turns

    answers, blocks = [], [1, 2]

    def next_block() -> int:
        if not blocks:
            raise turns.Ended
        return blocks.pop(0)

    line = SimpleNamespace(
        ready=lambda: None, answer=lambda **more: answers.append(more), next_block=next_block
    )
    model = material.language_model(tmp_path, SIZES, Tokenizer.bytes(), 32, eos_token_id=None)
    records = material.prompts(4, 8)
    job = Job(
        kind="grpo",
        model=model,
        records=records,
        batch=4,
        passes=2,
        group=2,
        new_tokens=6,
        settings=FP32,
    )
    with pytest.raises(turns.Ended):
        ours.grpo_trainer(line, job, str(tmp_path / "run")).train()
    for answer in answers:
        assert answer["parts"].keys() == set(grpo.PARTS)
        assert sum(answer["parts"].values()) == pytest.approx(answer["seconds"])
        assert all(seconds >= 0 for seconds in answer["parts"].values())
        assert answer["parts"]["training"] > 0


def test_names_of_the_cases_are_distinct():
    cases = [*grpo.cases(), *grpo.quick_cases()]
    assert len({(c.name, c.size) for c in cases}) == len(cases)
    for case in cases:
        names = [c.name for c in case.contenders]
        assert names[0] == "fastllm" and case.reference in names

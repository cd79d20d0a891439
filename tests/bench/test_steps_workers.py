"""The real workers, small: fastllm and the peers do the same work on the same data."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import pytest
import torch

from bench.options import Options
from bench.peers import environment
from bench.records import OURS as NAME
from bench.steps import contest, entrants, material, ours, turns
from bench.steps.contest import Case
from bench.steps.job import Job, letters
from fastllm import RewardModel, Tokenizer

SIZES = {"n_layer": 2, "n_head": 2, "n_kv_head": 1, "n_embd": 32}
FP32 = {"dtype": "fp32"}


class Script:
    """A parent that asks for some blocks."""

    def __init__(self, *blocks: int) -> None:
        self.blocks, self.answers = list(blocks), []

    def ready(self) -> None:
        self.answers.append({})

    def answer(self, **values) -> None:
        self.answers.append(values)

    def next_block(self) -> int:
        if not self.blocks:
            raise turns.Ended
        return self.blocks.pop(0)


def reward_job(folder: Path, count: int = 12) -> Job:
    model = material.reward_model(folder, SIZES, Tokenizer.bytes(), 16)
    job = material.training(material.pairs(count, 16), 4, kind="rm", model=model, max_length=16)
    job.write(folder)
    return Job.read(folder, FP32)


def trained(job: Job, folder: Path, *blocks: int) -> list[dict]:
    line = Script(*blocks)
    with pytest.raises(turns.Ended):
        ours.TRAINERS[job.kind](line, job, str(folder / "run")).train()
    return line.answers


def test_a_trainer_stops_between_blocks(tmp_path):
    job = reward_job(tmp_path)
    ready, *answers = trained(job, tmp_path, 1, 2, 1)
    assert ready == {} and [a["steps"] for a in answers] == [1, 2, 1]
    assert all(a["seconds"] > 0 and a["tokens"] == a["steps"] * 4 * 2 * 16 for a in answers)
    losses = [a["check"][0] for a in trained(job, tmp_path / "again", 1, 1, 1)[1:]]
    assert answers[0]["check"][0] == losses[0]
    assert answers[1]["check"][0] == pytest.approx((losses[1] + losses[2]) / 2)


def test_peers_see_the_records_as_fastllm_draws_them(tmp_path):
    job = reward_job(tmp_path)
    trainer = ours.reward_trainer(Script(), job, str(tmp_path / "run"))
    for step in range(3):
        batch = trainer.source().passes(step)[0].batch
        expected = job.in_order[4 * step : 4 * step + 4]
        pairs = [side for p in expected for side in (p["chosen_ids"], p["rejected_ids"])]
        found = batch.input_ids.tolist()
        assert sorted(itertools.chain(*pairs)) == sorted(found)
        for side in pairs:
            assert any(found[i : i + 16] == side for i in range(0, len(found), 16))


def test_a_plain_loop_trains_alike(tmp_path):
    loops = pytest.importorskip("bench.peers.loops", reason="needs transformers")
    job = reward_job(tmp_path)
    block = loops.reward_loop(job)
    theirs = [block(1)[0] for _ in range(3)]
    found = [a["check"][0] for a in trained(job, tmp_path, 1, 1, 1)[1:]]
    assert found == pytest.approx(theirs, abs=1e-4)


def test_scores_of_pairs_are_alike(tmp_path):
    loops = pytest.importorskip("bench.peers.loops", reason="needs transformers")
    model = material.reward_model(tmp_path, SIZES, Tokenizer.bytes(), 32)
    rows = material.sequences(8, 32)
    records = [
        {"chosen_ids": a[:5] + b[: 9 + i], "rejected_ids": a[: 14 - i]}
        for i, (a, b) in enumerate(zip(rows[::2], rows[1::2], strict=True))
    ]
    job = Job(kind="score_pairs", model=model, records=records, batch=2, settings=FP32)
    block = ours.score_pairs(job)
    with torch.no_grad():
        found = [block(1) for _ in range(3)]
    assert found[0] == found[2] != found[1]
    for settings in (FP32, FP32 | {"sort": True}):
        peer = loops.score_pairs(
            Job(kind="score_pairs", model=model, records=records, batch=2, settings=settings)
        )
        assert peer(1) == pytest.approx(found[0], abs=1e-4)


def test_scores_of_a_batch(tmp_path):
    model = material.reward_model(tmp_path, SIZES, Tokenizer.bytes(), 16)
    records = [{"ids": ids} for ids in material.sequences(3, 16)]
    job = Job(kind="score", model=model, records=records, settings=FP32)
    with torch.no_grad():
        expected = RewardModel.from_pretrained(model)(torch.tensor([r["ids"] for r in records]))
        assert ours.score(job)(2) == expected.tolist()


def test_completions_of_a_policy_without_eos_are_full(tmp_path):
    model = material.language_model(tmp_path, SIZES, Tokenizer.bytes(), 32, eos_token_id=None)
    job = Job(
        kind="grpo",
        model=model,
        records=material.prompts(4, 8),
        batch=4,
        group=2,
        new_tokens=6,
        settings=FP32,
    )
    answers = trained(job, tmp_path, 1)[1:]
    assert answers[0]["check"][1] == 6.0


def test_what_an_ascii_model_draws_is_text(tmp_path):
    tokenizer = material.ascii_tokenizer(tmp_path)
    ids = list(range(4, tokenizer.vocab_size))
    assert len(ids) == 128 and tokenizer.encode(tokenizer.decode(ids)) == ids


@pytest.mark.parametrize("size", [100, 260, 300])
def test_byte_tokenizers_of_any_size(tmp_path, size):
    tokenizer = material.byte_tokenizer(tmp_path, size)
    assert tokenizer.vocab_size == size and tokenizer.encode("AB") == [69, 70]
    AutoTokenizer = pytest.importorskip("transformers").AutoTokenizer
    assert len(AutoTokenizer.from_pretrained(tmp_path)) == size


def test_letters():
    assert letters(["ab1 ", "", "é"]) == [0.5, 0.0, 0.0]


def test_peak_is_of_this_program():
    held = torch.ones(30_000_000)
    assert turns.peak_mb() > 100 and held[0] == 1


@pytest.mark.slow
def test_a_case_from_end_to_end(tmp_path, monkeypatch):
    """TRL, a plain loop and fastllm in processes of their own agree about three steps."""
    pytest.importorskip("trl")
    monkeypatch.setattr(environment, "python", lambda: Path(sys.executable))
    case = Case(
        section="steps",
        name="RM step",
        size="small",
        dtype="float32",
        job=reward_job,
        contenders=(entrants.fastllm(), entrants.loop(), entrants.trl()),
        reference="transformers",
        work=1,
        unit="steps",
        block_steps=1,
        rounds=1,
        curve=True,
    )
    found = {r.contender: r for r in contest.run(case, Options())}
    assert set(found) == {NAME, "transformers", "trl"}
    assert all(r.rounds and r.peak_bytes > 1e8 for r in found.values())

"""Generation: everybody's tokens judged by one model, prefill apart, limits counted right."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch

from bench.options import Options
from bench.peers import environment
from bench.steps import contest, drawing, entrants, generate, judge, limits, material, ours, tails
from bench.steps.drawing import Drawn
from bench.steps.job import Job
from bench.steps.turns import Result
from fastllm import Tokenizer, Transformer

SIZES = {"n_layer": 2, "n_head": 3, "n_kv_head": 1, "n_embd": 96}
FP32 = {"dtype": "fp32"}


def job_in(folder: Path, settings: dict | None = None, **fields) -> Job:
    model = material.language_model(folder, SIZES, Tokenizer.bytes(), 64)
    records = [{"ids": ids} for ids in material.sequences(3, 8)]
    given = {"records": records, "group": 1, "new_tokens": 10} | fields
    Job(kind="generate", model=model, **given).write(folder)
    return Job.read(folder, FP32 | (settings or {}))


def drawn(job: Job) -> Result:
    with torch.no_grad():
        return ours.generate(job)(1)


@pytest.mark.parametrize("settings", [{}, {"apart": True}, {"padded": True}, {"weights": "int8"}])
def test_ours_is_right(tmp_path, settings):
    job = job_in(tmp_path, settings, group=2)
    found = drawn(job)
    assert len(found.check) == 3 * 2 * 10
    assert (
        max(judge.regrets(tmp_path, found.check))
        < generate.REGRET[settings.get("weights", "float32")]
    )
    assert found.parts["prefill"] > 0
    assert found.seconds == pytest.approx(sum(found.parts.values()))


def test_a_wrong_token_is_found(tmp_path):
    job = job_in(tmp_path)
    right = drawn(job).check
    for place in (0, len(right) - 1):
        wrong = list(right)
        wrong[place] = 259.0 - wrong[place]
        regrets = judge.regrets(tmp_path, wrong)
        assert regrets[place] > 3 * generate.REGRET["bfloat16"]
    assert len(judge.regrets(tmp_path, right * 2)) == len(right), "equal blocks are judged once"


@pytest.mark.parametrize("found", [[], [5.0], [-1.0] * 30, [1000.0] * 30])
def test_nonsense_is_infinitely_wrong(tmp_path, found):
    job_in(tmp_path)
    assert set(judge.regrets(tmp_path, found)) == {float("inf")}


def test_of_a_large_batch_some_are_judged(tmp_path, monkeypatch):
    job = job_in(tmp_path)
    found = drawn(job).check
    monkeypatch.setattr(judge, "TOKENS", 1)  # two of three: the first and the last
    assert len(judge.regrets(tmp_path, found)) == 2 * 10
    wrong = found[:10] + [0.0] * 10 + found[20:]
    assert max(judge.regrets(tmp_path, wrong)) < 1e-3
    assert max(judge.regrets(tmp_path, [0.0] * 10 + found[10:])) > 1e-3


def test_lengths_of_their_own(tmp_path):
    records = [
        {"ids": ids, "new_tokens": new}
        for ids, new in zip(material.sequences(3, 8), (8, 12, 9), strict=True)
    ]
    job = job_in(tmp_path, records=records)
    assert max(judge.regrets(tmp_path, drawn(job).check)) < 1e-3
    padded = Job.read(tmp_path, FP32 | {"padded": True})
    assert drawn(padded).check == drawn(job).check


def test_a_group_is_stored_once(tmp_path):
    records = [{"ids": material.sequences(1, 48)[0] * 4}]
    fields = {"records": records, "group": 8, "new_tokens": 8}
    material_length = 256
    model = material.language_model(tmp_path, SIZES, Tokenizer.bytes(), material_length)
    Job(kind="generate", model=model, **fields).write(tmp_path)
    shared = drawn(Job.read(tmp_path, FP32))
    apart = drawn(Job.read(tmp_path, FP32 | {"apart": True}))
    assert 0 < shared.held_bytes < apart.held_bytes / 2
    assert shared.check == apart.check


def test_peers_are_judged_alike(tmp_path):
    generation = pytest.importorskip("bench.peers.generation", reason="needs transformers")
    job_in(tmp_path, group=2)
    for cache in ("dynamic", "static"):
        peer = generation.generate(Job.read(tmp_path, FP32 | {"cache": cache}))
        found = peer(2)
        assert max(judge.regrets(tmp_path, found.check)) < 1e-3
        assert found.parts.keys() == {"prefill", "decoding"}
        assert found.held_bytes > 0


def test_completions_of_another_length_are_refused():
    def short(whole: bool) -> Drawn:
        return Drawn([[1] * (3 if whole else 1)] * 2)

    assert drawing.in_parts(short, [3, 3])(1).check == [1.0] * 6
    assert drawing.in_parts(short, [2, 3], [3, 3])(1).check == [1.0] * 5
    with pytest.raises(ValueError, match="1 of 2 completions have another length"):
        drawing.in_parts(short, [3, 4])(1)
    with pytest.raises(ValueError, match="1 of 3 completions"):
        drawing.in_parts(short, [3, 3, 3])(1)


def test_lengths_are_even_in_their_logarithms():
    found = sorted(tails.lengths(64, 512))
    assert found[0] == 8 and found[-1] == 512
    assert found[32] == pytest.approx(64, rel=0.1)
    assert tails.lengths(64, 512) == tails.lengths(64, 512) != found


def test_what_a_token_step_reads():
    shape = limits.Shape.of(SIZES, 259)
    model = Transformer(material.ModelConfig.scratch(block_size=8, vocab_size=259, **SIZES))
    matrices = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2)
    weights = matrices - model.model.embed_tokens.weight.numel()
    # Two prompts of 10 tokens, three completions of each: with 3 new tokens, tails of 1 and 2.
    step = shape.decoding(prompts=2, group=3, prompt=10, new=3, weights="float32")
    token = 2 * 2 * 1 * 32 * 4  # keys and values, layers, a head of 32, bytes
    assert step.steps == 2
    assert step.bytes_per_step == weights * 4 + token * (2 * 10 + 6 * 1.5)
    narrow = shape.decoding(2, 3, 10, 3, "int8", "float32")
    assert step.bytes_per_step - narrow.bytes_per_step == weights * 3


def test_the_arithmetic_of_groups():
    """One prompt of 4 tokens, two completions of 3: ten rows, six of them in the last layer."""
    shape = limits.Shape(3, 100, 30, 1000, cached=0, width=8)
    rows = 2 * 10 * 100 + 6 * 100 + 4 * 30
    pairs = 2 * (4 * 4 / 2 + 6 * (4 + 1.5)) + 6 * (4 + 1.5)
    once = 2 * (rows + 6 * 1000) + 4 * pairs * 8
    assert shape.forward(1, 2, 4, 3) == once
    assert shape.training(1, 2, 4, 3).flops == 3 * once
    assert shape.grpo_step(1, 2, 4, 3).flops == 4 * once
    scored = shape.forward(1, 2, 4, 3, scored=True)
    assert shape.grpo_step(1, 2, 4, 3, scored=True).flops == 4 * once + scored
    assert scored == 2 * (22 * 100 + 8 * 30) + 4 * (pairs - 4 * 5.5) * 8


def test_a_limit_in_words():
    options = Options(quick=True)
    memory, arithmetic = limits.Memory(3, 1e6), limits.Arithmetic(1e9)
    assert memory.seconds(options) > 0 and arithmetic.seconds(options) > 0
    assert "a token step: 1 MB at" in memory.words(options)
    assert "1 GFLOP at" in arithmetic.words(options)


def test_names_of_the_cases_are_distinct():
    cases = [*generate._cases(), *tails.cases(), *tails.quick_cases()]
    names = [(c.name, c.size, c.dtype) for c in cases]
    assert len(names) == len(set(names))
    for case in cases:
        assert case.contenders[0].name == "fastllm"
        assert len({c.name for c in case.contenders}) == len(case.contenders)


def test_a_wrong_program_has_no_figure(tmp_path, monkeypatch):
    """From end to end: the int8 weights of a model are judged by another one."""
    monkeypatch.setattr(environment, "python", lambda: None)
    case = generate._case(generate.Size(generate.SMALL, 2, prompt=8, new=9))

    def other(folder: Path, found: list[float]) -> list[float]:
        torch.manual_seed(0)
        return judge.regrets(folder, [259.0 - value for value in found])

    records = list(contest.run(contest.dataclasses.replace(case, judge=other), Options()))
    assert [r.note.split(":")[0] for r in records] == ["no peers", "WRONG, not timed"]


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["f32", "bf16", "q8_0"])
def test_llama_cpp_is_judged_alike(tmp_path, weights):
    python = environment.python()
    if python is None or environment.LLAMA not in environment.versions(python):
        pytest.skip(f"needs {environment.EXTRA_COMMAND}")
    job = job_in(tmp_path)
    contender = entrants.llama(weights)
    done = subprocess.run(
        contender.command(tmp_path, python),
        input="block 1\nend\n",
        env=contender.environment(1, True),
        cwd=environment.ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[1])
    assert len(answer["check"]) == sum(job.lengths)
    assert max(judge.regrets(tmp_path, answer["check"])) < generate.REGRET["bfloat16"]

"""Contenders in processes: compared first, then timed in turns. The workers here are fakes."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from bench.options import Options
from bench.peers import environment
from bench.records import OURS as NAME
from bench.steps import contest, workers
from bench.steps.contest import Case
from bench.steps.job import Job
from bench.steps.material import NotHere
from bench.steps.workers import OURS, PEER, Contender, Failed, Worker

FAKE = textwrap.dedent(
    """
    import json, os, sys
    from bench.steps.turns import Ended, Line, Result, serve

    settings, line, steps = json.loads(sys.argv[2]), Line(), []
    losses = settings["losses"]
    if os.environ.get("FASTLLM_BACKEND") == "torch":
        losses = settings["definition"]
    print("libraries print things")

    def block(count):
        with open(settings["log"], "a") as log:
            log.write(settings["mark"] * count)
        if settings.get("dies") == len(steps):
            raise SystemExit("no more memory")
        steps.append(count)
        check = [losses[min(len(steps), len(losses)) - 1]]
        if "parts" not in settings:
            return check
        parts = {name: seconds * count for name, seconds in settings["parts"].items()}
        return Result(check, 2.0 * count, parts, settings.get("held"))

    try:
        serve(line, block)
    except Ended:
        pass
    """
)


@dataclasses.dataclass(frozen=True)
class Fake(Contender):
    script: str = ""

    def command(self, folder: Path, python: Path) -> list[str]:
        return [sys.executable, self.script, str(folder), json.dumps(self.settings)]


@pytest.fixture
def fake(tmp_path):
    script = tmp_path / "fake.py"
    script.write_text(FAKE)

    def make(name, losses, module=PEER, mark="?", **settings):
        given = {"losses": losses, "log": str(tmp_path / "log"), "mark": mark, **settings}
        return Fake(name, module, given, script=str(script))

    return make


@pytest.fixture(autouse=True)
def peers(monkeypatch):
    monkeypatch.setattr(environment, "python", lambda: Path(sys.executable))


def case_of(*contenders, **changes):
    fields = {
        "section": "steps",
        "name": "step",
        "size": "2 x 4",
        "dtype": "float32",
        "job": lambda folder: Job(kind="rm"),
        "contenders": contenders,
        "reference": "peer",
        "work": 8,
        "unit": "pairs",
        "checked": 2,
        "block_steps": 3,
        "rounds": 2,
    }
    return Case(**(fields | changes))


def run(*contenders, options=None, **changes):
    case = case_of(*contenders, **changes)
    found = {r.contender: r for r in contest.run_all([case], options or Options())}
    return found


def test_blocks_alternate_after_everybody_agrees(fake, tmp_path, monkeypatch):
    monkeypatch.setattr("bench.harness.QUIET", 1.0)
    found = run(fake(NAME, [0.7, 0.6], OURS, "a"), fake("peer", [0.7, 0.6], mark="b"))
    # The reference starts first; two checked steps each, then blocks of three.
    assert (tmp_path / "log").read_text() == "bb" + "aa" + "aaabbb" + "bbbaaa"
    for record in found.values():
        assert len(record.rounds) == 2 and record.peak_bytes > 1e6 and not record.note
        assert (record.work, record.unit, record.case) == (8, "pairs", "2 x 4")


def test_who_is_wrong_gets_no_figure(fake):
    found = run(fake(NAME, [0.7, 0.61], OURS), fake("peer", [0.7, 0.6]), fake("b", [0.7, 0.6]))
    assert not found[NAME].rounds and found["peer"].rounds and found["b"].rounds
    assert found[NAME].note.startswith("WRONG, not timed: 1 of 2 results are off, by up to 0.01")


def test_nan_is_wrong(fake):
    found = run(fake(NAME, [float("nan")], OURS), fake("peer", [0.7]))
    assert found[NAME].note.startswith("WRONG")


def test_tolerance_of_a_contender(fake):
    loose = dataclasses.replace(fake("loose", [0.71, 0.6]), tolerance=0.02)
    found = run(fake(NAME, [0.7, 0.6], OURS), fake("peer", [0.7, 0.6]), loose)
    assert found["loose"].rounds


def test_only_the_first_results_of_a_contender(fake):
    other = dataclasses.replace(fake("other", [0.7, 0.2]), compared=1)
    found = run(fake(NAME, [0.7, 0.6], OURS), fake("peer", [0.7, 0.6]), other)
    assert found["other"].rounds


def test_slack_lets_a_share_be_off(fake):
    found = run(fake(NAME, [1.0, 5.0], OURS), fake("peer", [1.0, 2.0]), slack=0.5, tolerance=0.0)
    assert found[NAME].rounds


def test_the_last_words_of_a_worker_are_kept(fake):
    found = run(fake(NAME, [0.7], OURS), fake("peer", [0.7]), fake("b", [0.7], dies=1))
    assert found["b"].note == "ended with status 1: no more memory"
    assert found[NAME].rounds and found["peer"].rounds


def test_a_worker_that_ends_while_it_is_timed(fake):
    found = run(fake(NAME, [0.7], OURS), fake("peer", [0.7], dies=3))
    assert not found[NAME].rounds and "not timed: ended with status 1" in found[NAME].note


def test_no_reference_no_figures(fake):
    found = run(fake(NAME, [0.7], OURS), fake("peer", [0.7], dies=0))
    assert not any(r.rounds for r in found.values())
    assert found[NAME].note == "no reference: peer: ended with status 1: no more memory"


def test_without_peers_our_definitions_are_the_reference(fake, monkeypatch):
    monkeypatch.setattr(environment, "python", lambda: None)
    right = fake(NAME, [0.7], OURS, definition=[0.7])
    found = run(right, fake("peer", [0.7]))
    assert found[NAME].rounds and "peer" not in found
    assert found["peers"].note == "no peers: python -m bench.peers sets them up"
    wrong = fake(NAME, [0.7], OURS, definition=[0.8])
    assert run(wrong)[NAME].note.startswith("WRONG")


def test_losses_beside_the_reference(fake):
    found = run(
        fake(NAME, [0.7, 0.6, 0.5], OURS), fake("peer", [0.7, 0.6, 0.4]), curve=True, rounds=1
    )
    assert found["peer"].note == "loss 0.7000 to 0.4000"
    assert found[NAME].note.startswith("loss 0.7000 to 0.5000, 0.0")


def test_parties_fit_into_memory(fake, monkeypatch):
    monkeypatch.setattr(contest, "_free_gigabytes", lambda: 20.0)
    names = [f"peer{i}" for i in range(3)]
    contenders = [fake(NAME, [0.7], OURS), *(fake(name, [0.7]) for name in names)]
    case = case_of(*contenders, reference="peer2", gigabytes=6.0)
    found = list(contest.run(case, Options()))
    sizes = [(r.case.partition(", beside ")[2], r.contender) for r in found]
    assert sizes == [
        ("peer0, peer1", NAME), ("peer0, peer1", "peer0"), ("peer0, peer1", "peer1"),
        ("peer2", NAME), ("peer2", "peer2"),
    ]  # fmt: skip


def test_options_choose(fake):
    compiled = fake("compiled", [0.7], compile=True)
    default = dataclasses.replace(fake("default", [0.7]), keep_memory=False)
    party = (fake(NAME, [0.7], OURS), fake("peer", [0.7]), compiled, default)
    assert "compiled" not in run(*party, options=Options(compile=False))
    assert "default" not in run(*party, options=Options(quick=True))
    assert run(*party, options=Options(only="nothing")) == {}
    assert run(*party, options=Options(dtypes=("bfloat16",))) == {}


def test_missing_data_are_named(fake):
    def job(folder):
        raise NotHere("pairs.jsonl.gz is not in /data")

    found = run(fake(NAME, [0.7], OURS), job=job)
    assert found[NAME].note == "pairs.jsonl.gz is not in /data"


def test_parts_have_records_of_their_own(fake):
    found = list(
        contest.run(
            case_of(
                fake(NAME, [0.7], OURS, parts={"a": 0.5, "b": 1.5, "c": 0.1}),
                fake("peer", [0.7], parts={"a": 0.25}),
                fake("other", [0.7]),
                parts={"a": (8, "pairs"), "b": (16, "tokens")},
            ),
            Options(),
        )
    )
    seconds = {(r.name, r.contender): (r.seconds, r.work, r.unit) for r in found}
    assert seconds["step", NAME] == (2.0, 8, "pairs")
    assert seconds["step, a", NAME] == (0.5, 8, "pairs")
    assert seconds["step, a", "peer"] == (0.25, 8, "pairs")
    assert seconds["step, b", NAME] == (1.5, 16, "tokens")
    assert len(seconds) == 6  # three wholes, and no part of which nothing is known


def test_parts_are_of_the_rounds_that_were_kept():
    answers = [{"parts": {"a": float(i)}, "steps": 2} for i in range(3)]
    assert contest._part("a", answers) == (0.0, 0.5, 1.0)
    assert contest._part("b", answers) is None
    assert contest._part("a", [*answers, {"parts": {}, "steps": 1}]) is None


def test_memory_may_be_what_is_held(fake):
    held = fake(NAME, [0.7], OURS, parts={}, held=5.0)
    found = run(held, fake("peer", [0.7]), held=True)
    assert found[NAME].peak_bytes == 5.0 and found["peer"].peak_bytes is None


def test_a_judge_needs_no_reference(fake):
    def judge(folder, found):
        assert (folder / "job.json").exists()
        return [0.0 if value == 0.7 else 2.0 for value in found]

    party = fake(NAME, [0.7], OURS), fake("wrong", [0.6]), fake("peer", [0.7])
    found = run(*party, judge=judge, reference="")
    assert found[NAME].rounds and found["peer"].rounds
    assert found["wrong"].note.startswith("WRONG, not timed: 2 of 2 results are off, by up to 2")


def test_what_limits_the_work_is_beside_ours(fake):
    class Half:
        def seconds(self, options):
            return 1.0

        def words(self, options):
            return "a second"

    ours, peer = fake(NAME, [0.7], OURS, parts={}), fake("peer", [0.7], parts={})
    found = run(ours, peer, limits={"": Half()})
    assert found[NAME].roofline == found["peer"].roofline == 0.5
    assert (found[NAME].note, found["peer"].note) == ("a second", "")


def test_who_needs_a_package_that_is_not_there(fake, monkeypatch):
    monkeypatch.setattr(environment, "versions", lambda python: {"torch": "1"})
    needy = dataclasses.replace(fake("needy", [0.7]), package="llama-cpp-python")
    found = run(fake(NAME, [0.7], OURS), fake("peer", [0.7]), needy)
    assert found[NAME].rounds and found["peer"].rounds
    assert found["needy"].note == (
        "llama-cpp-python is not installed: python -m bench.peers --llama-cpp builds it"
    )


def test_a_case_may_be_asked_for_by_another_dtype(fake):
    party = fake(NAME, [0.7], OURS), fake("peer", [0.7])
    options = Options(dtypes=("float32",))
    assert run(*party, options=options, dtype="int8") == {}
    assert run(*party, options=options, dtype="int8", asked_as="float32")[NAME].rounds


def test_only_the_cpu(fake):
    found = run(fake(NAME, [0.7], OURS), options=Options(device="cuda"))
    assert found[NAME].note == "compared on the CPU only: --device cpu"


@pytest.mark.parametrize("keep", [True, False])
def test_the_allocator_is_as_chosen(monkeypatch, keep):
    monkeypatch.setenv("MALLOC_MMAP_MAX_", "7")
    found = Contender("a", OURS).environment(3, keep)
    assert {k: found[k] for k in workers.KEEP if k in found} == (workers.KEEP if keep else {})
    assert found["OMP_NUM_THREADS"] == found["MKL_NUM_THREADS"] == "3"


def test_an_ended_worker_says_why(fake, tmp_path):
    contender = fake("a", [0.7], dies=0)
    worker = Worker(
        contender.command(tmp_path, Path()),
        os.environ | {"PYTHONPATH": str(environment.ROOT)},
        tmp_path / "err",
    )
    worker.wait_ready()
    with pytest.raises(Failed, match="ended with status 1: no more memory"):
        worker.block(1)
    worker.kill()


def test_the_peers_side_of_the_protocol_needs_no_package():
    """It also runs in an environment that has neither fastllm nor our dependencies."""
    check = (
        "import sys, bench.steps.turns, bench.steps.job, bench.peers.environment\n"
        "assert not {'torch', 'fastllm', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", check], check=True, cwd=environment.ROOT)

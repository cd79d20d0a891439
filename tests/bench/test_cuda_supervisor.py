"""Workers that crash, hang, end early or speak at length, and what the supervisor makes of them."""

from __future__ import annotations

import sys
import time

import pytest

from bench.cuda import supervisor
from bench.cuda.protocol import Order
from bench.cuda.sections import Budget
from bench.cuda.supervisor import Crew
from bench.options import CUDA_SECTIONS, Options
from bench.records import OURS, Record

# A worker with three cases; what happens in the second is filled in.
WORKER = """
import json, os, sys, time
out = os.fdopen(int(sys.argv[1]), "w")
def say(kind, **what):
    out.write(json.dumps({{"kind": kind, **what}}) + "\\n"); out.flush()
for line in sys.stdin:
    order = json.loads(line)
    say("rates", rates={{"copy": 1.0}})
    for case in ("one | x | bf16", "two | x | bf16", "three | x | bf16"):
        if case in order["done"]:
            continue
        say("begin", case=case)
        name = case.split(" | ")[0]
        if name == "two":
            say("doing", what="a peer")
            {accident}
        say("record", record={{"section": order["section"], "name": name, "case": "x",
            "dtype": "bf16", "contender": "fastllm", "rounds": [1.0], "note": str(os.getpid())}})
        say("ended", case=case)
    say("finished")
"""


@pytest.fixture
def crew(tmp_path):
    crews = []

    def make(accident: str = "pass") -> Crew:
        script = tmp_path / "worker.py"
        script.write_text(WORKER.format(accident=accident))
        crews.append(Crew((sys.executable, str(script))))
        return crews[-1]

    yield make
    for one in crews:
        one.shrink()


def order(seconds: float = 60.0, section: str = "ops", **more) -> Order:
    return Order(section, "tiny", 2, 0, time.time() + seconds, **more)


def shown(records: list[Record]) -> list[str]:
    return [record.name if record.rounds else f"{record.name}: {record.note}" for record in records]


def test_a_worker_serves_one_section_after_another(crew):
    team, rates = crew(), {}
    first = list(supervisor.section(order(), team, rates))
    second = list(supervisor.section(order(section="head"), team, rates))
    assert shown(first) == shown(second) == ["one", "two", "three"]
    assert {record.note for record in first} == {record.note for record in second}
    assert rates == {"copy": 1.0}


@pytest.mark.parametrize(
    ("accident", "why"),
    [
        ("os._exit(3)", "its process ended with status 3"),
        ("os.kill(os.getpid(), 11)", "its process ended with status -11"),
        ("time.sleep(100)", "hangs: nothing was heard"),
    ],
)
def test_an_accident_costs_one_case(crew, monkeypatch, accident, why):
    monkeypatch.setattr(supervisor, "SILENCE_SECONDS", 2.0)
    found = list(supervisor.section(order(), crew(accident), {}))
    assert shown(found) == ["one", f"two: ERROR: {why} at a peer", "three"]
    assert found[1].contender == OURS and found[1].case == "x" and found[1].dtype == "bf16"
    assert len({found[0].note, found[2].note}) == 2  # another process


def test_a_section_ends_with_its_time(crew, monkeypatch):
    monkeypatch.setattr(supervisor, "GRACE_SECONDS", 0.5)
    found = list(supervisor.section(order(1.0), crew("time.sleep(100)"), {}))
    assert shown(found) == [
        "one",
        "two: ERROR: the section's time is over at a peer",
        "ops: ERROR: the cases after this one were left out",
    ]


def test_a_section_without_time_is_named(crew):
    (record,) = supervisor.section(order(-1.0), crew(), {})
    assert record.note == "left out: there was no time for it"


def test_a_worker_that_does_not_start_is_said_once(tmp_path):
    team = Crew((sys.executable, str(tmp_path / "nothing.py")))
    found = list(supervisor.section(order(), team, {}))
    assert len(found) == 2 and found[0].note.startswith("ERROR: its process ended with status")


def test_parts_run_at_a_time(crew):
    found = list(supervisor._in_parts(order(parts=3), crew(), {}))
    assert sorted(record.name for record in found) == ["one"] * 3 + ["three"] * 3 + ["two"] * 3
    assert len({record.note for record in found}) == 3


def test_the_time_is_divided_by_weight_and_what_is_left_over_passed_on():
    budget = Budget(ends=530.0)
    first = budget.deadline(0.0, CUDA_SECTIONS[0], CUDA_SECTIONS[1:])
    assert 0 < first <= 175
    assert budget.deadline(0.0, "decode", ()) == 175  # no section has more than three minutes
    assert budget.deadline(500.0, "decode", ()) == 530
    assert budget.deadline(600.0, "decode", ()) == 600
    now = 0.0
    for number, section in enumerate(CUDA_SECTIONS):
        now = budget.deadline(now, section, CUDA_SECTIONS[number + 1 :])
    assert now == pytest.approx(530.0)


def test_a_real_worker_on_the_cpu():
    options = Options(sections=("ceilings",), device="cpu", scale="tiny", seed=1, only="copy")
    (record,) = supervisor.run(options)
    assert record.name == "copy" and record.rate and record.rate > 0

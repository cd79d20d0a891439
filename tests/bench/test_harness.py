"""Turns, quiet rounds and disturbed ones."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator

import pytest

from bench import quiet
from bench.harness import QUIET, in_turns, repeated
from bench.quiet import Sample, foreign_share, own_ticks, parse

STAT = """cpu  1000 0 500 8000 100 0 20 30 5 0
cpu0 600 10 250 4000 50 1 10 20 5 0
cpu1 400 0 250 4000 50 0 10 10 0 0
cpu10 9 9 9 9 9 9 9 9 9 9
intr 12345 1 2 3
ctxt 99
"""


def test_parse_counts_our_processors_and_steal() -> None:
    total, busy = parse(STAT, {0})
    assert busy == 600 + 10 + 250 + 1 + 10 + 20
    assert total == busy + 4000 + 50
    assert parse(STAT, {0, 1})[1] == busy + 400 + 250 + 10 + 10


def test_share_of_others() -> None:
    before = Sample(total=1000, busy=400, own=50)
    after = Sample(total=2000, busy=900, own=250)
    rounding = quiet.ROUNDING_TICKS
    assert foreign_share(before, after) == pytest.approx((500 - 200 - rounding) / 1000)
    assert foreign_share(before, Sample(2000, 600, 250)) == 0.0
    assert foreign_share(None, after) is None
    assert foreign_share(before, before) is None


@pytest.mark.skipif(quiet.sample() is None, reason="no /proc/stat here")
def test_our_own_work_is_ours() -> None:
    before = own_ticks()
    end = time.process_time() + 0.1
    while time.process_time() < end:
        pass
    assert own_ticks() - before >= 0.07 * os.sysconf("SC_CLK_TCK")


def shares(*values: float) -> Callable[[], Sample]:
    """A machine on which others take these shares of the rounds."""

    def samples() -> Iterator[Sample]:
        total = busy = 0
        for value in values:
            yield Sample(total, busy, 0)
            total += 10_000
            busy += round(value * 10_000) + quiet.ROUNDING_TICKS
            yield Sample(total, busy, 0)

    found = samples()
    return lambda: next(found)


def counting(log: list[str], name: str) -> Callable[[], float]:
    def block() -> float:
        log.append(name)
        return float(len(log))

    return block


def test_order_alternates() -> None:
    log: list[str] = []
    blocks = {name: counting(log, name) for name in "ab"}
    turns = in_turns(blocks, 3, sample=shares(0, 0, 0))
    assert "".join(log) == "abbaab"
    assert turns.rounds == {"a": (1.0, 4.0, 5.0), "b": (2.0, 3.0, 6.0)}
    assert not turns.disturbed and turns.foreign == 0


def test_a_disturbed_round_is_taken_again_for_everybody() -> None:
    log: list[str] = []
    blocks = {name: counting(log, name) for name in "ab"}
    turns = in_turns(blocks, 2, sample=shares(0, 0.5, 0.01))
    assert turns.rounds == {"a": (1.0, 5.0), "b": (2.0, 6.0)}
    assert turns.kept == (0, 2)
    assert not turns.disturbed
    assert turns.foreign == pytest.approx(0.005)


def test_what_stays_disturbed_is_marked() -> None:
    turns = in_turns({"a": lambda: 1.0}, 2, retries=2, sample=shares(0.9, 0.3, 0.5, 0))
    assert turns.disturbed
    assert turns.foreign == pytest.approx(0.15), "the two calmest rounds are kept"
    record = next(turns.records("ops", "rope", "small"))
    assert record.disturbed and record.foreign == turns.foreign
    assert QUIET < 0.3


def test_nothing_is_known_without_counters() -> None:
    turns = in_turns({"a": lambda: 1.0}, 2, sample=lambda: None)
    assert turns.foreign is None and not turns.disturbed


def test_records_take_fields_by_contender() -> None:
    turns = in_turns({"a": lambda: 1.0, "b": lambda: 2.0}, 1, sample=lambda: None)
    records = list(turns.records("s", "n", "c", work=4, unit="B", peak_bytes={"a": 7.0}, x=3.0))
    assert [(r.contender, r.peak_bytes, r.x) for r in records] == [("a", 7.0, 3), ("b", None, 3)]
    assert [r.rate for r in records] == [4.0, 2.0]


def test_a_block_repeats_short_calls() -> None:
    calls: list[int] = []
    block = repeated(lambda: calls.append(1), block_seconds=10, most=20)
    warm = len(calls)
    assert block() > 0
    assert len(calls) - warm == 20

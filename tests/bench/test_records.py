"""Statistics, ratios and what is written to disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import compare, merge
from bench.records import OURS, Document, Ratio, Record, groups, ours_in, ratio


def timed(*rounds: float, contender: str = OURS, case: str = "small") -> Record:
    return Record("ops", "rope", case, "float32", contender, rounds, work=6.0, unit="B")


def test_median_spread_and_rate() -> None:
    record = timed(4.0, 1.0, 2.0)
    assert (record.seconds, record.spread, record.rate) == (2.0, 1.5, 3.0)


def test_no_rounds_no_figures() -> None:
    record = timed()
    assert record.seconds is record.spread is record.rate is None
    assert ratio(record, timed(1.0)) is ratio(timed(1.0), record) is None


def test_a_ratio_is_formed_round_by_round() -> None:
    """The machine slows down by half in the second round: no ratio notices."""
    found = ratio(timed(1.0, 2.0, 1.0), timed(3.0, 6.0, 3.0, contender="eager"))
    assert found == Ratio(3.0, 3.0, 3.0)
    assert not found.even


def test_rounds_of_other_runs_are_not_paired() -> None:
    found = ratio(timed(1.0, 2.0), timed(3.0, 6.0), in_turns=False)
    assert found == Ratio(3.0, 1.5, 6.0)
    assert ratio(timed(1.0, 2.0), timed(3.0, 6.0, 3.0, contender="eager")) == Ratio(2.0, 1.5, 6.0)


@pytest.mark.parametrize(
    ("found", "even"),
    [
        (Ratio(1.04, 1.03, 1.05), True),
        (Ratio(0.96, 0.95, 0.97), True),
        (Ratio(1.30, 0.99, 1.60), True),
        (Ratio(1.06, 1.01, 1.09), False),
        (Ratio(0.90, 0.85, 0.99), False),
    ],
)
def test_nothing_is_claimed_below_five_percent_or_against_a_round(found: Ratio, even: bool) -> None:
    assert found.even is even
    assert ("even" in str(found)) is even


def test_groups_keep_their_order() -> None:
    records = [timed(1.0), timed(2.0, case="large"), timed(3.0, contender="eager")]
    assert [len(group) for group in groups(records)] == [2, 1]
    assert ours_in(groups(records)[0]) is records[0]
    assert ours_in(records[2:]) is None


def test_json_and_back(document: Document, tmp_path: Path) -> None:
    path = tmp_path / "new" / "result.json"
    document.write(path)
    assert Document.read(path) == document
    first = json.loads(path.read_text())["records"][0]
    assert first["seconds"] == document.records[0].seconds


def test_another_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text("[]")
    with pytest.raises(ValueError, match="expected a saved benchmark"):
        Document.read(path)


def test_compare_prints_ratios_and_what_differs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    peers = [timed(2.0, contender="eager"), timed(2.0, contender="eager", case="large")]
    before = Document({"commit": "a"}, [timed(2.0, 2.2), *peers])
    after = Document({"commit": "b"}, [timed(1.0, 1.1), timed(9.0, case="new"), *peers])
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    before.write(paths[0])
    after.write(paths[1])
    assert compare.main([str(path) for path in paths]) == 0
    shown = capsys.readouterr().out
    assert "commit: a -> b" in shown
    assert "2.00x [1.82..2.20]" in shown
    assert "new" not in shown
    assert "the 2 figures of others: 1.00x" in shown
    assert compare.main([str(paths[0])]) == 2


def test_sections_run_one_by_one_become_one_result(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    machine = {"device": "Some CPU", "threads": 2, "peers": {"trl": "1"}}
    first = Document({**machine, "commit": "a"}, [timed(2.0), timed(3.0, case="large")])
    again = Document({**machine, "commit": "b", "peers": None}, [timed(1.0)])
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    first.write(paths[0])
    again.write(paths[1])
    assert merge.main([str(path) for path in paths], tmp_path) == 0
    merged = Document.read(tmp_path / "some-cpu.json")
    assert merged.machine == {**machine, "commit": "a, b", "quick": None, "variables": None}
    assert [record.seconds for record in merged.records] == [1.0, 3.0]
    assert (tmp_path / "some-cpu.html").is_file()


def test_a_piece_of_work_is_of_one_run() -> None:
    """What took part in an earlier run only would be compared with another run's rounds."""
    first = [timed(2.0), timed(4.0, contender="eager"), timed(1.0, case="large")]
    merged = merge.merge([Document({}, first), Document({}, [timed(3.0)])], ["a", "b"])
    assert [(r.case, r.contender, r.seconds) for r in merged.records] == [
        ("small", OURS, 3.0),
        ("large", OURS, 1.0),
    ]


def test_versions_known_to_one_part_only_are_no_contradiction() -> None:
    facts = [{"peers": {"torch": "2"}}, {"peers": {"torch": "2", "llama": "1"}}, {"peers": None}]
    merged = merge.merge([Document(fact) for fact in facts], ["a", "b", "c"])
    assert merged.machine["peers"] == {"torch": "2", "llama": "1"}
    with pytest.raises(ValueError, match="d: peers is '3', and '2' in a"):
        merge.merge([Document(facts[0]), Document({"peers": {"torch": "3"}})], ["a", "d"])


def test_results_of_two_machines_are_not_merged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for path, threads in zip(paths, (2, 4), strict=True):
        Document({"device": "Some CPU", "threads": threads}, []).write(path)
    assert merge.main([str(path) for path in paths], tmp_path) == 2
    assert "b.json: threads is 4, and 2 in" in capsys.readouterr().err
    assert merge.main([], tmp_path) == 2

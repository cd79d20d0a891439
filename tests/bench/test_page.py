"""The page: every record is on it, it is well formed, and it needs nothing from elsewhere."""

from __future__ import annotations

import dataclasses
import re
import xml.etree.ElementTree as ET

import pytest

from bench import page, svg, table
from bench.records import Document, Record, groups


def parsed(document: Document) -> ET.Element:
    return ET.fromstring(page.render(document).removeprefix("<!DOCTYPE html>\n"))


def test_the_page_has_every_record(document: Document) -> None:
    rows = [
        [cell.text or "" for cell in row.findall("td")]
        for row in parsed(document).findall(".//details/table/tr")
    ]
    for record in document.records:
        wanted = [record.section, record.name, record.case, record.dtype, record.contender]
        row = next(row for row in rows if row[:5] == wanted)
        assert row[5] == ("" if record.seconds is None else table.time(record.seconds))
        assert record.note in row[-1]


def test_the_page_needs_nothing_from_elsewhere(document: Document) -> None:
    text = page.render(document)
    assert not re.findall(r"\b(?:src|href|url|@import|<script|<link)\b", text)
    assert "http" not in text


def test_every_section_has_its_charts(document: Document) -> None:
    root = parsed(document)
    titles = [title.text for title in root.iter("h2")]
    assert titles == [
        "Training steps",
        "Ops",
        "How a step grows",
        "Threads",
        "Against what the machine can do",
    ]
    assert len(list(root.iter("svg"))) == 1 + 2 + 1 + 1
    hints = [hint.text for hint in root.iter("title")]
    assert any(hint.startswith("eager: 6.00x") for hint in hints)


def test_an_empty_run_is_a_page_too() -> None:
    assert len(parsed(Document({})).findall(".//svg")) == 0


def test_a_disturbed_record_is_marked(document: Document) -> None:
    first = dataclasses.replace(document.records[0], disturbed=True, foreign=0.31)
    document.records[0] = first
    text = page.render(document)
    assert "disturbed: 31%" in text and "other processes (1 records)" in text


def test_scales() -> None:
    scale = svg.Scale(1, 100, 0, 200, log=True)
    assert [scale(v) for v in (1, 10, 100)] == pytest.approx([0, 100, 200])
    assert scale.ticks() == [1, 2, 5, 10, 20, 50, 100]
    assert svg.Scale(1, 100, 0, 1, log=True, binary=True).ticks() == [1, 2, 4, 8, 16, 32, 64]
    assert svg.Scale(0.5, 2e5, 0, 1, log=True).ticks() == [1, 10, 100, 1e3, 1e4, 1e5]
    assert svg.Scale(0, 10, 0, 1).ticks() == [0, 2, 4, 6, 8, 10]


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(2.5e-6, "2.5 us"), (0.0123, "12.3 ms"), (0.123, "123 ms"), (2.0, "2 s"), (1234.5, "1234 s")],
)
def test_times(seconds: float, shown: str) -> None:
    assert table.time(seconds) == shown


def test_the_table_has_a_block_for_each_group(
    document: Document, capsys: pytest.CaptureFixture[str]
) -> None:
    assert list(table.as_they_come(document.records)) == document.records
    shown = capsys.readouterr().out
    sections = {record.section for record in document.records}
    assert shown.count("\n== ") == len(sections)
    assert len(re.findall(r"^\w.*", shown, re.MULTILINE)) == len(groups(document.records))
    assert "ours 6.00x [6.00..6.00]" in shown
    assert "not installed" in shown


def test_a_wrong_record_shows_its_note() -> None:
    record = Record("ops", "rope", "16", "float32", "eager", note="WRONG, not timed")
    assert "WRONG, not timed" in table.block([record])

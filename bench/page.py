"""One HTML file with all charts and every record: no script, nothing from elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path

from . import charts, table
from .records import OURS, Document, Record, groups, ours_in, ratio

STYLE = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")

WHOLE = {"steps": "Training steps", "scoring": "Scoring", "generate": "Generation"}


def write(document: Document, path: Path) -> None:
    """Write the page."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render(document), encoding="utf-8")


def render(document: Document) -> str:
    """The page as text."""
    of: dict[str, list[Record]] = {}
    for record in document.records:
        of.setdefault(record.section, []).append(record)
    body = [
        _head(document),
        *(_whole(of.get(name, []), title) for name, title in WHOLE.items()),
        _ops(of.get("ops", [])),
        _growth(of.get("growth", [])),
        _threads(of.get("threads", [])),
        _roofline(of.get("roofline", []), of.get("ops", [])),
        _all(document.records),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>'
        f"<title>fastllm, measured</title><style>{STYLE}</style></head><body><main>"
        + "\n".join(part for part in body if part)
        + "</main></body></html>\n"
    )


def _head(document: Document) -> str:
    facts = document.machine
    commit = (facts.get("commit") or "unknown")[:10]
    dirty = ", with changes" if (facts.get("commit") or "").endswith("+") else ""
    disturbed = sum(record.disturbed for record in document.records)
    shown = [
        f"<strong>{escape(str(facts.get('device')))}</strong>, threads: {facts.get('threads')}",
        f"commit {escape(commit)}{dirty}",
        f"PyTorch {escape(str(facts.get('versions', {}).get('torch')))}",
        f"allocator {escape(str(facts.get('allocator')))}",
    ]
    notes = [
        "Medians; contenders take turns, and whiskers go from the slowest round to the fastest. "
        "A ratio within 5 %, or where rounds disagree, is even and drawn hollow. "
        "Nobody has a figure whose results failed their check."
    ]
    if disturbed:
        notes.append(f"Marked *: disturbed by other processes ({disturbed} records).")
    rows = "".join(
        f"<tr><th>{escape(key)}</th><td>{escape(_fact(value))}</td></tr>"
        for key, value in facts.items()
    )
    return (
        f"<h1>fastllm, measured</h1><p class='facts'>{' &#183; '.join(shown)}</p>"
        f"<p class='note'>{' '.join(notes)}</p>"
        f"<details><summary>The machine and the settings</summary><table>{rows}</table></details>"
    )


def _fact(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {item}" for key, item in value.items()) or "none"
    return "not known" if value is None else str(value)


def _whole(records: Sequence[Record], title: str) -> str:
    if not records:
        return ""
    return f"<h2>{title}</h2>{charts.bars(records)}{_silent(records)}{_peaks(records)}"


def _silent(records: Sequence[Record]) -> str:
    """Who has no figure, and why, where no chart says it."""
    timed = {record.group for record in records if record.rounds}
    silent = [r for r in records if r.note and not r.rounds and r.group not in timed]
    lines = (f"{charts.words_of(r)}, {r.contender}: {r.note}" for r in silent)
    return "".join(f"<p class='note'>{escape(line)}</p>" for line in lines)


def _ops(records: Sequence[Record]) -> str:
    if not records:
        return ""
    parts = []
    ops = [record for record in records if record.name.endswith((" forward", "forward+backward"))]
    for dtype in dict.fromkeys(record.dtype for record in ops):
        mine = [record for record in ops if record.dtype == dtype]
        trained = {(_op(r), r.case) for r in mine if r.name.endswith("+backward")}
        second = [r for r in mine if r.name.endswith(" forward") and (_op(r), r.case) in trained]
        first = charts.speedups([record for record in mine if record not in second])
        forward = charts.speedups(second)
        parts.append(f"<h3>{escape(dtype)}, forward and backward</h3>{first}")
        if forward:
            parts.append(
                f"<details><summary>{escape(dtype)}, forward alone</summary>{forward}</details>"
            )
    other = charts.speedups([record for record in records if record not in ops])
    if other:
        parts.append(f"<h3>Beside the ops</h3>{other}")
    lead = (
        "<p class='note'>How many times faster fastllm is than PyTorch written out (eager), "
        "compiled, and other forms: PyTorch's own kernels, or the way models are usually written. "
        "Further right is better; the numbers are against the fastest of each kind. What has no "
        "backward pass is timed forward.</p>"
    )
    wrong = "".join(
        f"<p class='note'>{escape(charts.words_of(r))}, {escape(r.contender)}: {escape(r.note)}</p>"
        for r in records
        if r.note and not r.rounds
    )
    return f"<h2>Ops</h2>{lead}{''.join(parts)}{wrong}{_peaks(records)}"


def _op(record: Record) -> str:
    return record.name.partition(" ")[0]


def _growth(records: Sequence[Record]) -> str:
    return _panels(
        records,
        "How a step grows",
        "Time per token of a whole SFT step, both axes logarithmic. The dashed line is the first "
        "point scaled by the arithmetic alone.",
        lambda seconds, record: seconds / record.work * 1e6,
        "microseconds per token",
        log=True,
        expected="the arithmetic",
    )


def _threads(records: Sequence[Record]) -> str:
    return _panels(
        records,
        "Threads",
        "Tokens per second. The dashed line is one thread's rate times their number.",
        lambda seconds, record: record.work / seconds,
        "tokens per second",
        log=False,
        expected="in proportion",
    )


def _panels(
    records: Sequence[Record],
    title: str,
    lead: str,
    value: Callable[[float, Record], float],
    unit: str,
    log: bool,
    expected: str,
) -> str:
    panels = []
    for name, dtype in dict.fromkeys((r.name, r.dtype) for r in records if r.rounds):
        mine = [record for record in records if (record.name, record.dtype) == (name, dtype)]
        chart = charts.curves(mine, mine[0].axis, value, unit, log, expected)
        panels.append(f"<figure><figcaption>{escape(name)}, {dtype}</figcaption>{chart}</figure>")
    if not panels:
        return ""
    return f"<h2>{title}</h2><p class='note'>{lead}</p><div class='panels'>{''.join(panels)}</div>"


def _roofline(rates: Sequence[Record], ops: Sequence[Record]) -> str:
    reached = [record for record in ops if record.roofline is not None and record.contender == OURS]
    if not rates and not reached:
        return ""
    parts = ["<h2>Against what the machine can do</h2>"]
    figures = "".join(
        _bandwidths(rates, name, title, axis)
        for name, title, axis in (
            ("copy", "Copies", "bytes read and written"),
            ("read", "Reads", "bytes read"),
        )
    )
    if figures:
        parts.append(
            "<p class='note'>Measured rates. A copy counts each byte read and each byte written."
            f"</p><div class='panels'>{figures}<figure>{_products(rates)}</figure></div>"
        )
    if reached:
        rows = "".join(_reached(record) for record in reached)
        parts.append(
            "<p class='note'>What fastllm's ops reach of them: of the better copy of the same "
            "number of bytes, or of the best large matrix product in the same dtype. Work is what "
            "a fused kernel cannot avoid; recomputation is not counted.</p>"
            "<table class='wide'><tr><th>op</th><th>case</th>"
            "<th>dtype</th><th class='n'>time</th><th class='n'>rate</th>"
            f"<th>share of the roofline</th></tr>{rows}</table>"
        )
    return "".join(parts)


def _bandwidths(rates: Sequence[Record], name: str, title: str, axis: str) -> str:
    records = [record for record in rates if record.name == name and record.rounds]
    if not records:
        return ""
    chart = charts.curves(
        records,
        axis,
        lambda seconds, record: record.work / seconds / 1e9,
        "GB/s",
        log=True,
        expected="",
    )
    return f"<figure><figcaption>{title}</figcaption>{chart}</figure>"


def _products(rates: Sequence[Record]) -> str:
    cells = "".join(
        f"<tr><td>{escape(r.dtype)}</td><td>{escape(r.contender)}</td>"
        f"<td class='n'>{table.amount(r.rate or 0.0, r.unit)}/s</td></tr>"
        for r in rates
        if r.dtype and r.rounds
    )
    case = next((r.case for r in rates if r.dtype), "")
    return f"<figcaption>Matrix product, {case}</figcaption><table>{cells}</table>"


def _reached(record: Record) -> str:
    share = record.roofline or 0.0
    return (
        f"<tr><td>{escape(record.name)}</td><td>{escape(record.case)}</td>"
        f"<td>{escape(record.dtype)}</td><td class='n'>{table.time(record.seconds or 0.0)}</td>"
        f"<td class='n'>{table.amount(record.rate or 0.0, record.unit)}/s</td>"
        f"<td><span class='share'><span style='width:{min(share, 1.0):.0%}'></span></span>"
        f" {share:.0%}</td></tr>"
    )


def _peaks(records: Sequence[Record]) -> str:
    found = [g for g in groups(records) if any(record.peak_bytes is not None for record in g)]
    if not found:
        return ""
    rows = []
    for group in found:
        ours = ours_in(group)
        title = charts.words_of(group[0])
        for record in group:
            if record.peak_bytes is None:
                continue
            times = ""
            if ours is not None and ours.peak_bytes and record is not ours:
                times = f"{record.peak_bytes / ours.peak_bytes:.2f} times ours"
            what, title = title, ""
            rows.append(
                f"<tr><td>{escape(what)}</td>"
                f"<td>{escape(record.contender)}</td>"
                f"<td class='n'>{table.amount(record.peak_bytes, 'B')}</td><td>{times}</td></tr>"
            )
    return (
        "<h3>Memory at most</h3><table class='wide'><tr><th>work</th><th>by</th>"
        f"<th class='n'>peak</th><th></th></tr>{''.join(rows)}</table>"
    )


def _all(records: Iterable[Record]) -> str:
    rows = "".join(
        row for group in groups(records) for row in (_row(r, ours_in(group)) for r in group)
    )
    heads = ("section", "work", "case", "dtype", "by", "time", "range", "rate", "ours is", "note")
    head = "".join(f"<th>{name}</th>" for name in heads)
    return (
        "<details><summary>Every record</summary><table class='wide small'>"
        f"<tr>{head}</tr>{rows}</table></details>"
    )


def _row(record: Record, ours: Record | None) -> str:
    how_much = None if ours is None or ours is record else ratio(ours, record)
    notes = [record.note, f"disturbed: {record.foreign or 0:.0%}" * record.disturbed]
    figures = ["", "", ""]
    if record.seconds is not None:
        figures = [
            table.time(record.seconds),
            f"{table.time(min(record.rounds))} to {table.time(max(record.rounds))}",
            f"{table.amount(record.rate, record.unit)}/s" if record.rate else "",
        ]
    cells = [
        record.section,
        record.name,
        record.case,
        record.dtype,
        record.contender,
        *figures,
        str(how_much or ""),
        "; ".join(note for note in notes if note),
    ]
    return "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>"

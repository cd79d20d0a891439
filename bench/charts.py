"""The charts of the page, each from the records that it shows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from . import svg, table
from .records import OTHER_WORK, OURS, Ratio, Record, groups, ours_in, ratio

WIDTH = 960.0
ROW = 24.0
LABELS = 300.0
BAR_LABELS = 220.0
COLUMN = 82.0

# Kinds of contenders: their colour and, among the marks, their shape.
KINDS = {"eager": "eager", "compile": "compile", "peer": "other form"}


def kind(contender: str) -> str:
    """The class that draws a contender."""
    if contender == OURS:
        return "ours"
    if contender.startswith("compile") or contender.endswith("compile"):
        return "compile"
    return "eager" if contender == "eager" or contender.startswith("torch.") else "peer"


def speedups(records: Sequence[Record]) -> str:
    """A row for each piece of work: how many times faster ours is than each other contender."""
    rows = [(group, _against(group)) for group in groups(records)]
    rows = [(group, others) for group, others in rows if others]
    if not rows:
        return ""
    ratios = [r for _, others in rows for _, r in others if r is not None]
    ends = [1.0, 2.0, *(r.low for r in ratios), *(r.high for r in ratios)]
    low, high = svg.around(ends, log=True, margin=0.04)
    right = WIDTH - COLUMN * len(KINDS)
    scale = svg.Scale(min(low, 0.8), high, LABELS, right - 16, log=True, binary=True)
    top, bottom = 58.0, 58.0 + ROW * len(rows)
    parts = [svg.rectangle(LABELS, top, scale(1.0) - LABELS, bottom - top, "slower")]
    for tick in scale.ticks():
        parts.append(svg.line(scale(tick), top, scale(tick), bottom, "grid"))
        parts.append(svg.text(scale(tick), top - 8, f"{tick:g}x", "axis", "middle"))
    parts.append(svg.line(scale(1.0), top - 4, scale(1.0), bottom, "even-line"))
    for index, (name, words) in enumerate(KINDS.items()):
        x = right + COLUMN * index + 12
        parts.append(svg.mark(x, top - 34, name))
        parts.append(svg.text(x + 10, top - 30, words, "legend"))
    for index, (group, others) in enumerate(rows):
        parts += _speedup_row(group, others, scale, top + ROW * (index + 0.5), right)
    return svg.drawing(WIDTH, bottom + 8, parts, "how many times faster fastllm is")


def _against(group: Sequence[Record]) -> list[tuple[Record, Ratio | None]]:
    ours = ours_in(group)
    if ours is None or not ours.rounds:
        return []
    return [(record, ratio(ours, record)) for record in group if record is not ours]


def _speedup_row(
    group: Sequence[Record],
    others: Sequence[tuple[Record, Ratio | None]],
    scale: svg.Scale,
    y: float,
    right: float,
) -> list[str]:
    first = group[0]
    op = first.name.removesuffix(" forward+backward").removesuffix(" forward")
    mark = " *" if any(record.disturbed for record in group) else ""
    label = f"{op}  {first.case}{mark}"
    parts = [svg.text(LABELS - 14, y + 4, label, "label", "end")]
    parts.append(svg.line(LABELS, y + ROW / 2, WIDTH, y + ROW / 2, "row"))
    closest: dict[str, Ratio] = {}
    for record, how_much in others:
        name = kind(record.contender)
        if how_much is None:
            continue
        hint = f"{record.contender}: {how_much} {record.note}".strip()
        parts.append(svg.line(scale(how_much.low), y, scale(how_much.high), y, f"range {name}"))
        hollow = " hollow" if how_much.even else ""
        parts.append(svg.mark(scale(how_much.median), y, name + hollow, hint))
        if record.note == OTHER_WORK:
            continue
        if name not in closest or how_much.median < closest[name].median:
            closest[name] = how_much
    for index, name in enumerate(KINDS):
        x = right + COLUMN * index + 22
        if name in closest:
            weight = "number" if not closest[name].even else "number faint"
            parts.append(svg.text(x, y + 4, f"{closest[name].median:.2f}x", weight))
    return parts


def bars(records: Sequence[Record]) -> str:
    """For each piece of work a bar per contender: its rate, whiskers from round to round."""
    found = [g for g in groups(records) if any(record.rounds for record in g)]
    if not found:
        return ""
    parts: list[str] = []
    y = 0.0
    for group in found:
        title = words_of(group[0])
        mark = " *" if any(record.disturbed for record in group) else ""
        parts.append(svg.text(0, y + 18, title + mark, "title"))
        if ours_in(group) is not None:
            parts.append(svg.text(WIDTH, y + 18, "fastllm is", "legend", "end"))
        y += 28
        best = max(_rates(record)[1] for record in group if record.rounds)
        scale = svg.Scale(0, best, BAR_LABELS, WIDTH - 230)
        for record in group:
            parts += _bar(record, ours_in(group), scale, y)
            y += ROW
        y += 18
    return svg.drawing(WIDTH, y, parts, "rates of whole pieces of work")


def _rates(record: Record) -> tuple[float, float]:
    """The slowest and the fastest round."""
    work = record.work or 1.0
    return work / max(record.rounds), work / min(record.rounds)


def _bar(record: Record, ours: Record | None, scale: svg.Scale, y: float) -> list[str]:
    name = kind(record.contender)
    parts = [svg.text(BAR_LABELS - 14, y + 15, record.contender, f"label {name}-text", "end")]
    if record.seconds is None:
        return [*parts, svg.text(BAR_LABELS, y + 15, record.note or "no figure", "label faint")]
    rate = (record.work or 1.0) / record.seconds
    low, high = (scale(value) for value in _rates(record))
    hint = f"{record.contender}: {table.time(record.seconds)}"
    parts.append(
        svg.rectangle(BAR_LABELS, y + 2, scale(rate) - BAR_LABELS, ROW - 6, f"bar {name}", hint)
    )
    parts.append(svg.line(low, y + ROW / 2 - 1, high, y + ROW / 2 - 1, "whisker"))
    words = f"{table.amount(rate, record.unit)}/s"
    if record is ours and record.roofline is not None:
        words += f", {record.roofline:.0%} of the limit"
    parts.append(svg.text(max(high, scale(rate)) + 10, y + 15, words, "label"))
    how_much = None if ours is None or record is ours else ratio(ours, record)
    if how_much is not None:
        shown = "even" if how_much.even else f"{how_much.median:.2f}x"
        weight = "number faint" if how_much.even else "number"
        parts.append(svg.text(WIDTH, y + 15, shown, weight, "end"))
    return parts


def words_of(record: Record) -> str:
    """What a group is about, in one line."""
    return " \u00b7 ".join(part for part in (record.name, record.case, record.dtype) if part)


def curves(
    records: Sequence[Record],
    axis: str,
    value: Callable[[float, Record], float],
    unit: str,
    log: bool,
    expected: str,
) -> str:
    """One panel: a line per contender, and a dashed one for what its arithmetic predicts."""
    points = [record for record in records if record.rounds and record.x is not None]
    if not points:
        return ""
    width, height = 470.0, 310.0
    xs = [record.x or 0.0 for record in points]
    values = [value(seconds, record) for record in points for seconds in record.rounds]
    values += [value(record.expected, record) for record in points if record.expected]
    low, high = (min(xs) / 1.2, max(xs) * 1.2) if log else (min(xs) - 0.2, max(xs) + 0.2)
    across = svg.Scale(low, high, 58, width - 14, log)
    up = svg.Scale(*svg.around(values, log), height - 44, 52, log)
    parts = []
    for tick in up.ticks():
        parts.append(svg.line(58, up(tick), width - 14, up(tick), "grid"))
        parts.append(svg.text(52, up(tick) + 4, svg.short(tick), "axis", "end"))
    marked = sorted(set(xs))
    for x in marked[:: math.ceil(len(marked) / 9)]:
        parts.append(svg.text(across(x), height - 26, _count(x), "axis", "middle"))
    parts.append(svg.text((58 + width - 14) / 2, height - 8, axis, "axis", "middle"))
    parts.append(svg.text(58, 18, unit, "title"))
    for index, contender in enumerate(dict.fromkeys(record.contender for record in points)):
        line = [record for record in points if record.contender == contender]
        parts += _curve(line, across, up, value)
        parts.append(svg.mark(64 + 110 * index, 36, kind(contender), size=4))
        parts.append(svg.text(73 + 110 * index, 40, contender, "legend"))
    if any(record.expected for record in points):
        parts.append(svg.line(280, 36, 304, 36, "expected eager-text"))
        parts.append(svg.text(310, 40, expected, "legend"))
    return svg.drawing(width, height, parts, f"{unit} by {axis}")


def _curve(
    points: Sequence[Record],
    across: svg.Scale,
    up: svg.Scale,
    value: Callable[[float, Record], float],
) -> list[str]:
    name = kind(points[0].contender)
    centres, parts, ideal = [], [], []
    for record in points:
        x, y = across(record.x or 0.0), up(value(record.seconds or 0.0, record))
        ends = [up(value(seconds, record)) for seconds in record.rounds]
        parts.append(svg.line(x, min(ends), x, max(ends), f"range {name}"))
        hint = f"{record.contender}, {record.case}: {table.time(record.seconds or 0.0)}"
        centres.append((x, y))
        ideal.append((x, up(value(record.expected, record)) if record.expected else y))
        parts.append(svg.mark(x, y, name, hint, 4))
    dashed = [svg.path(ideal, f"expected {name}-text")] if len(ideal) > 1 else []
    return [*dashed, svg.path(centres, f"curve {name}-text"), *parts]


def _count(value: float) -> str:
    """1024 as 1k where it is a length or a size."""
    for shift, suffix in ((20, "M"), (10, "k")):
        if value >= 1 << shift and value % (1 << shift) == 0:
            return f"{int(value) >> shift}{suffix}"
    return svg.short(value)

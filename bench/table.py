"""The results on a terminal, as they come: one block for each piece of work."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from .records import OURS, Record, ours_in, ratio

_TIMES = ((1e-3, 1e6, "us"), (1.0, 1e3, "ms"), (float("inf"), 1.0, "s"))
_AMOUNTS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def as_they_come(records: Iterable[Record]) -> Iterator[Record]:
    """Pass records on, and print each group as soon as it is whole."""
    group: list[Record] = []
    section = ""
    for record in records:
        if group and record.group != group[0].group:
            print(block(group), flush=True)
            group = []
        if record.section != section:
            section = record.section
            print(f"\n== {section}", flush=True)
        group.append(record)
        yield record
    if group:
        print(block(group), flush=True)


def block(group: list[Record]) -> str:
    """A title and one line for each contender."""
    first = group[0]
    title = "  ".join(part for part in (first.name, first.case, first.dtype) if part)
    marks = []
    if first.work and first.unit in ("B", "FLOP"):
        marks.append(amount(first.work, first.unit))
    if any(record.disturbed for record in group):
        marks.append(f"DISTURBED: others took {max(r.foreign or 0 for r in group):.0%}")
    ours = ours_in(group)
    lines = [f"\n{title}" + (f"  ({', '.join(marks)})" if marks else "")]
    lines += [_line(record, ours) for record in group]
    return "\n".join(lines)


def time(seconds: float) -> str:
    """Seconds with a unit that fits."""
    _, factor, unit = next(row for row in _TIMES if seconds < row[0])
    return (
        f"{seconds * factor:.3g} {unit}"
        if seconds * factor < 100
        else (f"{seconds * factor:.0f} {unit}")
    )


def amount(value: float, unit: str) -> str:
    """An amount with a prefix that fits."""
    for size, prefix in _AMOUNTS:
        if value >= size:
            return f"{value / size:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"


def _line(record: Record, ours: Record | None) -> str:
    if record.seconds is None:
        return f"  {record.contender:<24} {record.note}"
    cells = [
        f"  {record.contender:<24}{time(record.seconds):>9}",
        f"[{time(min(record.rounds))} .. {time(max(record.rounds))}]".ljust(24),
        (f"{amount(record.rate, record.unit)}/s" if record.rate else "").rjust(14),
        ("" if record.roofline is None else f"{record.roofline:.0%} of roof").rjust(13),
    ]
    if ours is not None and ours.rounds and record.contender != OURS:
        cells.append(f"ours {ratio(ours, record)}")
    if record.peak_bytes is not None:
        cells.append(f"peak {amount(record.peak_bytes, 'B')}")
    if record.expected:
        cells.append(f"{record.seconds / record.expected:.2f} of the arithmetic's growth")
    if record.goal:
        verdict = {True: "met", False: "NOT MET", None: "not known"}[record.met]
        cells.append(f"goal {record.goal}: {verdict}")
    if record.note:
        cells.append(f"({record.note})")
    return " ".join(cells).rstrip()

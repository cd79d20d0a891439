"""The last thing that a run prints: goals and what was reached, errors, what was left out."""

from __future__ import annotations

from collections.abc import Iterable

from .. import table
from ..records import OURS, Record, groups, ratio

LEFT_OUT = "left out"


def text(records: Iterable[Record]) -> str:
    """A few lines for each."""
    records = list(records)
    mine = [record for record in records if record.contender == OURS]
    wrong = [r for r in mine if r.note.startswith(("WRONG", "ERROR"))]
    absent = [r for r in records if r.note.startswith(LEFT_OUT)]
    checked = [r for r in mine if r.note.startswith("ok")]
    lines = ["", "== summary"]
    if checked:
        lines.append(f"{len(checked)} checks passed")
    for group in groups(records):
        lines += _goals(group)
    lines += [f"{_what(record)}: {record.note}" for record in wrong]
    lines += [f"{_what(r)}: {r.contender}: {r.note}" for r in absent]
    return "\n".join(lines)


def _goals(group: list[Record]) -> list[str]:
    """Ours against its goal and against the best of the others."""
    found = []
    for record in group:
        if not record.goal:
            continue
        verdict = {True: "met    ", False: "NOT MET", None: "unknown"}[record.met]
        reached = [table.time(record.seconds)] if record.seconds else []
        if record.roofline is not None:
            reached.append(f"{record.roofline:.1%}")
        if record.rate and record.unit in ("FLOP", "B"):
            reached.append(f"{table.amount(record.rate, record.unit)}/s")
        if record.peak_bytes is not None:
            reached.append(f"{table.amount(record.peak_bytes, 'B')} extra")
        who = "" if record.contender == OURS else f", {record.contender}"
        line = f"{verdict}  {_what(record)}{who}: {', '.join(reached)}; goal {record.goal}"
        found.append(line + _best_peer(record, group))
    return found


def _best_peer(record: Record, group: list[Record]) -> str:
    peers = [
        r
        for r in group
        if r.rounds and not r.contender.startswith(OURS) and not r.note.startswith("not the same")
    ]
    if not peers or not record.rounds or record.contender != OURS:
        return ""
    best = min(peers, key=lambda peer: peer.seconds or 0.0)
    return f"; {ratio(record, best)} against {best.contender}"


def _what(record: Record) -> str:
    return "  ".join(part for part in (record.name, record.case, record.dtype) if part)

"""`python -m bench compare A.json B.json`: how many times faster B is than A, record by record."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from .records import OURS, Document, ratio


def main(paths: list[str]) -> int:
    """Print the ratios of this project's records.

    The runs were made at different times: only what they say about peers, which did not change
    between them, tells whether the machine was the same.
    """
    if len(paths) != 2:
        print("compare: expected two files, A.json and B.json", file=sys.stderr)
        return 2
    before, after = (Document.read(Path(path)) for path in paths)
    for key in sorted(before.machine.keys() & after.machine.keys()):
        if before.machine[key] != after.machine[key]:
            print(f"{key}: {before.machine[key]} -> {after.machine[key]}")
    print("\n".join(lines(before, after)) or "the two have no record in common")
    return 0


def lines(before: Document, after: Document) -> Iterator[str]:
    """One line for each record that both have, and the peers' drift at the end."""
    old = {(*record.group, record.contender): record for record in before.records}
    drifts = []
    for record in after.records:
        earlier = old.get((*record.group, record.contender))
        change = None if earlier is None else ratio(record, earlier, in_turns=False)
        if change is None:
            continue
        if record.contender == OURS:
            what = "  ".join(part for part in record.group if part)
            yield f"{what:<72} {change}{' disturbed' * record.disturbed}"
        else:
            drifts.append(change.median)
    if drifts:
        drifts.sort()
        middle = drifts[len(drifts) // 2]
        yield f"the {len(drifts)} figures of others: {middle:.2f}x in the middle, " + (
            f"{drifts[0]:.2f}x to {drifts[-1]:.2f}x"
        )

"""`python -m bench merge A.json B.json ...`: one result of sections that were run one by one."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import machine, page
from .records import Document, Record

# What may differ between the parts, and is listed; all else must be the same machine's.
LISTED = ("commit", "quick", "variables")
OF_GPUS = ("seed",)


def main(paths: list[str], folder: Path) -> int:
    """Write the parts' records as one document and one page, in the folder of kept results."""
    if not paths:
        print("merge: expected files, A.json B.json ...", file=sys.stderr)
        return 2
    try:
        merged = merge([Document.read(Path(path)) for path in paths], paths)
    except ValueError as error:
        print(f"merge: {error}", file=sys.stderr)
        return 2
    kept = folder / machine.slug(merged.machine["device"])
    merged.write(kept.with_suffix(".json"))
    page.write(merged, kept.with_suffix(".html"))
    print(f"wrote {kept}.json and {kept}.html")
    return 0


def merge(parts: Sequence[Document], names: Sequence[str]) -> Document:
    """All records; of a piece of work that several parts have, the last part's.

    Raises:
        ValueError: the parts are of different machines, versions or settings.
    """
    facts = dict(parts[0].machine)
    work: dict[tuple[Any, ...], list[Record]] = {}
    for part, name in zip(parts, names, strict=True):
        for key in sorted(part.machine.keys() - {*LISTED, *OF_GPUS}):
            try:
                facts[key] = _agreed(facts.get(key), part.machine[key])
            except ValueError as error:
                raise ValueError(f"{name}: {key} is {error} in {names[0]}") from None
        # Rounds are compared with each other: those of another run do not stay beside them.
        renewed: dict[tuple[Any, ...], list[Record]] = {}
        for record in part.records:
            renewed.setdefault((*record.group, record.axis, record.x), []).append(record)
        work |= renewed
    for key in (*LISTED, *(key for key in OF_GPUS if key in facts)):
        facts[key] = _listed([part.machine.get(key) for part in parts])
    return Document(facts, [record for records in work.values() for record in records])


def _agreed(first: Any, second: Any) -> Any:
    """What two parts know; what one does not know (peers that were not asked for) is no matter.

    Raises:
        ValueError: they contradict each other.
    """
    if isinstance(first, dict) and isinstance(second, dict):
        return {key: _agreed(first.get(key), second.get(key)) for key in {**first, **second}}
    if first is not None and second is not None and first != second:
        raise ValueError(f"{second!r}, and {first!r}")
    return second if first is None else first


def _listed(values: list[Any]) -> Any:
    """The value that all parts have, else the distinct ones."""
    distinct = [value for index, value in enumerate(values) if value not in values[:index]]
    return distinct[0] if len(distinct) == 1 else ", ".join(map(str, distinct))

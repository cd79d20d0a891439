"""The last lines of a run: held-out figures, speed, where the files are."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any


def print_summary(folder: Path) -> None:
    """Print what `metrics.jsonl` of a finished run says."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = list(held_out(lines).items())
    speeds = [line["tokens_per_second"] for line in lines if "tokens_per_second" in line]
    if speeds:
        rows.append(("tokens/s", f"{statistics.median(speeds):,.0f}"))
    rows.append(("written to", str(folder)))
    print()
    print_table(rows)


def print_table(rows: list[tuple[str, str]]) -> None:
    """Print names and values in two columns."""
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:{width}}  {value}")


def held_out(lines: list[dict[str, Any]]) -> dict[str, str]:
    """The figures of the last evaluation, named for people."""
    evaluations = [line for line in lines if any(name.startswith("eval_") for name in line)]
    if not evaluations:
        return {}
    return {
        f"held-out {name.removeprefix('eval_')}": f"{value:.4g}"
        for name, value in evaluations[-1].items()
        if name.startswith("eval_")
    }

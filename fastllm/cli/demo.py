"""`fastllm demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .folder import check_run_folder
from .log import start_log


def demo(values: dict[str, Any]) -> int:
    """SFT, a reward model and GRPO on generated tasks, with a table at the end."""
    out = values.get("out", Path("runs/demo"))
    for folder in (out, *sorted(out.glob("*/"))):
        check_run_folder(folder, overwrite=values.get("overwrite", False))
    from fastllm.demo import run_demo

    start_log()
    run_demo(out, seed=values.get("seed", 0), quick=values.get("quick", False))
    return 0

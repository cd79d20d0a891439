"""`fastllm bench`: the benchmark suite of the source tree, in an interpreter of its own.

It measures under settings that have to hold when a process starts, so it is not called but run.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def bench(values: dict[str, Any]) -> int:
    """Run `python -m bench` with the same arguments.

    Raises:
        ModuleNotFoundError: this is an installed package, which has no suite.
    """
    if not (ROOT / "bench" / "__main__.py").is_file():
        raise ModuleNotFoundError(
            "the benchmark suite is part of the source tree, not of the installed package: "
            "run `python -m bench` in a checkout"
        )
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "FASTLLM_BENCH_PROG": "fastllm bench",
    }
    command = [sys.executable, "-m", "bench", *values["arguments"]]
    return subprocess.run(command, env=environment).returncode

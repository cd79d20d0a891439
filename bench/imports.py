"""What `import fastllm` costs, beside `import torch`: each in a new interpreter, in turns."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from .harness import Block, in_turns
from .options import Options
from .records import OURS, Record

NAME = "import"

TRAINERS = ("SFTTrainer", "RewardTrainer", "GRPOTrainer", "generate")

ROOT = Path(__file__).parents[1]


def run(options: Options) -> Iterator[Record]:
    """Seconds from the start of the interpreter to its end.

    A bare `import fastllm` loads little: its names load what they need when they are asked for.
    """
    cases = {
        "bare": "import fastllm",
        "with trainers": f"from fastllm import {', '.join(TRAINERS)}",
    }
    for case, statement in cases.items():
        blocks = {"import torch": _running("import torch"), OURS: _running(statement)}
        for block in blocks.values():  # the files are in the page cache from now on
            block()
        yield from in_turns(blocks, options.rounds).records("ops", NAME, case)


def _running(statement: str) -> Block:
    def block() -> float:
        begin = time.perf_counter()
        subprocess.run([sys.executable, "-c", statement], check=True, cwd=ROOT)
        return time.perf_counter() - begin

    return block

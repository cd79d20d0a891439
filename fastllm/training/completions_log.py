"""`completions.jsonl`: what a policy said, for people to read."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

from ..data.tokenizer import Tokenizer
from .groups import Group
from .scoring import as_rollout


def write_completions(path: Path, step: int, groups: Sequence[Group], tokenizer: Tokenizer) -> None:
    """Append a line for each completion: step, prompt, completion, reward, and what reward
    functions logged of it.
    """
    with path.open("a", encoding="utf-8") as file:
        for group in groups:
            prompts = [group.prompt] * len(group.completions)
            rollout = as_rollout(prompts, group.completions, tokenizer)
            rows = zip(rollout.completions, group.total.tolist(), group.extra, strict=True)
            for completion, reward, extra in rows:
                row = {
                    "step": step,
                    "prompt": group.prompt.prompt,
                    "completion": completion,
                    "reward": None if math.isnan(reward) else reward,
                    **extra,
                }
                file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")

"""What a worker is told: a folder with a model, records and `job.json`, the same for everybody.

Shared with the peers' environment: no torch, no fastllm.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Job:
    """One piece of work, the same for every contender but for its `settings`."""

    kind: str
    """rm, sft, grpo, score, score_pairs, generate or group_pass."""
    model: str = ""
    """A Hugging Face folder with its tokenizer."""
    reward_model: str = ""
    """GRPO: likewise; "" rewards `letters`."""
    records: list[dict[str, Any]] = field(default_factory=list)
    order: list[int] = field(default_factory=list)
    """The order in which fastllm's trainers draw the records of the first epoch."""
    batch: int = 8
    """Records (pairs, completions) of a step."""
    passes: int = 1
    """Passes of a step, each of batch / passes."""
    max_length: int = 1024
    learning_rate: float = 1e-3
    seed: int = 42
    group: int = 8
    """Completions of a prompt, in GRPO and where texts are generated."""
    new_tokens: int = 0
    """Tokens of a completion, unless its record has `new_tokens` of its own."""
    threads: int = 1
    settings: dict[str, Any] = field(default_factory=dict)
    """The contender's own: dtype, compile, ..."""

    endless = 1_000_000
    """Steps of a run that the parent ends."""

    @classmethod
    def read(cls, folder: Path, settings: dict[str, Any]) -> Job:
        """The job in a folder, for one contender."""
        return cls(**json.loads((folder / "job.json").read_text()), settings=settings)

    def write(self, folder: Path) -> None:
        """Leave the job for `read`."""
        content = dataclasses.asdict(self)
        del content["settings"]
        (folder / "job.json").write_text(json.dumps(content))

    @property
    def lengths(self) -> list[int]:
        """Tokens of each completion, those of the first prompt first."""
        return [
            record.get("new_tokens", self.new_tokens)
            for record in self.records
            for _ in range(self.group)
        ]

    @property
    def in_order(self) -> list[dict[str, Any]]:
        """The records as fastllm's trainers draw them."""
        return [self.records[i] for i in self.order] if self.order else self.records

    def batches(self, records: Sequence[Any]) -> Iterator[list[Any]]:
        """Whole batches of records, over and over."""
        whole = len(records) // self.batch * self.batch
        for first in itertools.cycle(range(0, whole, self.batch)):
            yield list(records[first : first + self.batch])


def letters(completions: Sequence[str], **_: Any) -> list[float]:
    """A reward that is pure Python: the share of ASCII letters in a completion."""
    return [
        sum(c.isascii() and c.isalpha() for c in text) / max(1, len(text)) for text in completions
    ]

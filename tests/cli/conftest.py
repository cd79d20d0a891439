"""A place to work in, a policy and a reward model, all made by the command itself."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

from fastllm.cli import main


@dataclass
class Workspace:
    """Data files in a folder, and what the command printed."""

    folder: Path
    capsys: pytest.CaptureFixture[str] | None = None
    quick: ClassVar[list[str]] = [
        *("--n_layer=1", "--n_head=2", "--n_kv_head=1", "--n_embd=16", "--block_size=64"),
        *("--max_steps=2", "--logging_steps=1", "--device=cpu"),
    ]

    def write(self, name: str, *records: object) -> str:
        """A file with one record to a line."""
        path = self.folder / name
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return str(path)

    def pairs(self) -> str:
        """24 preference pairs."""
        return self.write(
            "pairs.jsonl",
            *(
                {"prompt": f"{i}+1=", "chosen": str(i + 1), "rejected": str(i + 2)}
                for i in range(24)
            ),
        )

    def sft(self) -> str:
        """24 demonstrations."""
        return self.write(
            "sft.jsonl", *({"prompt": f"{i}+1=", "completion": str(i + 1)} for i in range(24))
        )

    def failing(self, argv: list[str]) -> tuple[int, str]:
        """Exit code and the one line of the error that a command must end in."""
        assert self.capsys is not None
        status = main(argv)
        lines = self.capsys.readouterr().err.splitlines()
        errors = [line for line in lines if line.startswith("fastllm: error: ")]
        assert len(errors) == 1, lines
        assert lines[-1] == errors[0]
        assert not any("Traceback" in line for line in lines)
        return status, errors[0].removeprefix("fastllm: error: ")


@pytest.fixture
def work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Workspace:
    return Workspace(tmp_path, capsys)


@pytest.fixture(scope="package", autouse=True)
def log_of_the_process() -> Iterator[None]:
    """A command sets up the log of its process, which other tests share."""
    logger = logging.getLogger("fastllm")
    level, propagate, handlers = logger.level, logger.propagate, list(logger.handlers)
    yield
    logger.setLevel(level)
    logger.propagate, logger.handlers = propagate, handlers


@pytest.fixture(scope="package")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy of two steps."""
    place = Workspace(tmp_path_factory.mktemp("policy"))
    out = place.folder / "run"
    assert main(["sft", "--data", place.sft(), "--out", str(out), *place.quick]) == 0
    return out


@pytest.fixture(scope="package")
def reward_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model of two steps."""
    place = Workspace(tmp_path_factory.mktemp("reward"))
    out = place.folder / "run"
    assert main(["rm", "--data", place.pairs(), "--out", str(out), *place.quick]) == 0
    return out

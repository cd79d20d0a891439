"""Every example runs as it stands; here with few steps, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))

# Arguments that make an example short, and what it prints.
SHORT = {
    "quick_rm": (["--steps=5", "--out=run"], "of the 100 pairs"),
    "reward_model": (["--steps=5", "--pairs=200", "--out=run"], "held-out accuracy"),
    "validate_reward_model": (["--steps=5", "--pairs=40"], "saved and loaded"),
    "full_pipeline": (
        ["--sft-steps=5", "--rm-steps=5", "--grpo-steps=2", "--out=run"],
        "held-out exact match",
    ),
}


def run(example: Path, arguments: list[str], folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, str(example), *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example(example: Path, tmp_path: Path) -> None:
    arguments, printed = SHORT[example.stem]
    assert printed in run(example, arguments, tmp_path)


def test_an_example_runs_a_second_time(tmp_path: Path) -> None:
    (tmp_path / "run/checkpoint-1").mkdir(parents=True)
    run(ROOT / "examples/reward_model.py", SHORT["reward_model"][0], tmp_path)


def test_the_data_files_are_what_the_commands_read() -> None:
    from fastllm.data import preference_records, prompt_records, sft_records

    data = ROOT / "examples/data"
    assert len(sft_records(data / "sft.jsonl")) == 48
    assert len(preference_records(data / "pairs.jsonl")) == 48
    assert all("answer" in record.columns for record in prompt_records(data / "prompts.jsonl"))

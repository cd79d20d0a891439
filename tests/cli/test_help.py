"""Help: at once, without torch, from the config classes; and `fastllm env`."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastllm.cli import main
from fastllm.cli.commands import COMMANDS
from fastllm.training.config import GRPOConfig, RewardConfig, SFTConfig

ROOT = Path(__file__).parents[2]

HELP_SECONDS = 0.5


@pytest.mark.parametrize("argv", [[], *([name] for name in COMMANDS)])
def test_help_imports_no_torch(argv: list[str]) -> None:
    code = (
        f"import sys; from fastllm.cli import main; status = main({[*argv, '--help']}); "
        "heavy = {'torch', 'tokenizers', 'rich', 'yaml', 'numpy'} & set(sys.modules); "
        "assert not heavy, heavy; sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: fastllm")


def test_help_answers_at_once() -> None:
    def seconds() -> float:
        start = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "fastllm", "grpo", "--help"],
            cwd=ROOT,
            check=True,
            stdout=subprocess.DEVNULL,
        )
        return time.perf_counter() - start

    # The best of some tries: the others may have waited for a busy processor.
    assert min(seconds() for _ in range(5)) < HELP_SECONDS


def test_help_shows_each_field_with_its_docstring(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["grpo", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(GRPOConfig):
        assert re.search(rf"--(\[no-\])?{field.name}\b", text), field.name
    assert "Completions of each prompt (G). (default: 8)" in text
    assert "--no_packing" not in text.replace("--[no-]packing", "")
    assert "--max-steps" not in text  # taken, but shown once


def test_no_command_is_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "usage: fastllm" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    import fastllm

    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == fastllm.__version__


@pytest.mark.parametrize("config", [SFTConfig, RewardConfig, GRPOConfig])
def test_every_field_of_a_config_is_an_option(config: type) -> None:
    names = {SFTConfig: "sft", RewardConfig: "rm", GRPOConfig: "grpo"}
    options = {option.name for option in COMMANDS[names[config]].options()}
    assert {field.name for field in dataclasses.fields(config)} <= options


def test_env_as_json(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from fastllm import ops

    monkeypatch.setenv("FASTLLM_BACKEND", "torch")
    assert main(["env", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["variables"]["FASTLLM_BACKEND"] == "torch"
    assert set(facts["ops"]) == set(ops.OPS)
    assert facts["ops"]["rms_norm"]["cpu"].startswith("torch (requested: torch)")
    assert "cpu" in facts["devices"]


def test_env_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env"]) == 0
    printed = capsys.readouterr().out
    for word in (
        *("versions:", "torch:", "rms_norm on cpu:", "isa:"),
        *("threads:", "of an op:", "waiting:", "tokenizers:", "allocator:"),
    ):
        assert word in printed


def test_python_dash_m() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fastllm", "sft", "--nonsense"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 2
    assert done.stderr.startswith("fastllm: error: unknown option --nonsense")

"""What a command sets for its threads before torch is loaded, and what it leaves alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastllm.cli import threads

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Nothing is set, and what a test sets is gone after it."""
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("RAYON_NUM_THREADS", "")
    monkeypatch.delenv("RAYON_NUM_THREADS")
    return monkeypatch


def test_threads_spin_only_briefly() -> None:
    threads.settle()
    assert {name: os.environ[name] for name in threads.SETTINGS} == threads.SETTINGS
    assert "set by fastllm" in threads.wait_policy()
    assert "RAYON_NUM_THREADS" not in os.environ


@pytest.mark.parametrize("name", ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"])
def test_a_user_who_has_set_something_has_set_everything(
    environment: pytest.MonkeyPatch, name: str
) -> None:
    environment.setenv(name, "7")
    before = dict(os.environ)
    threads.settle()
    assert dict(os.environ) == before
    assert threads.wait_policy() == f"as the environment says ({name}=7)"


def test_tokenizers_take_as_many_threads_as_the_ops(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("OMP_NUM_THREADS", "3, 1")
    threads.settle()
    assert os.environ["RAYON_NUM_THREADS"] == "3"
    environment.setenv("OMP_NUM_THREADS", "5")
    threads.settle()
    assert os.environ["RAYON_NUM_THREADS"] == "3"


def test_the_allocator_and_its_settings(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("MALLOC_MMAP_MAX_", "0")
    assert "MALLOC_MMAP_MAX_=0" in threads.allocator()


def test_only_the_command_line_changes_the_environment() -> None:
    code = (
        "import os; before = dict(os.environ); import fastllm.training.rm, fastllm.generation, "
        "fastllm.data.tokenizer; changed = set(os.environ) - set(before); "
        "assert not {name for name in changed if 'OMP' in name or 'RAYON' in name}, changed"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

"""What `import fastllm` loads: no more than it needs, and torch only where it is used."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Each costs tens of milliseconds or more, and none is needed to import a trainer.
HEAVY = {
    "jinja2",
    "pandas",
    "peft",
    "requests",
    "rich",
    "scipy",
    "sympy",
    "tensorboard",
    "torch._dynamo",
    "torch._inductor",
    "torch.utils.tensorboard",
    "transformers",
    "triton",
    "yaml",
}
EVERYTHING = "fastllm.training.sft, fastllm.training.rm, fastllm.training.grpo, fastllm.generation"


def loaded(statement: str) -> set[str]:
    """Modules that a fresh interpreter has after a statement."""
    code = f"{statement}\nimport json, sys; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.fixture(scope="module")
def of_torch() -> set[str]:
    return loaded("import torch")


def test_the_package_itself_is_nothing() -> None:
    modules = loaded("import fastllm")
    assert not modules & {"torch", "numpy", "tokenizers", *HEAVY}
    assert len([name for name in modules if name.startswith("fastllm")]) == 1


@pytest.mark.parametrize("config", ["SFTConfig", "RewardConfig", "GRPOConfig"])
def test_a_config_needs_no_torch(config: str) -> None:
    assert not loaded(f"from fastllm import {config}") & {"torch", "numpy", "tokenizers", *HEAVY}


def test_trainers_load_little_beside_torch(of_torch: set[str]) -> None:
    added = loaded(f"import {EVERYTHING}") - of_torch
    assert not added & HEAVY
    others = {name for name in added if name.partition(".")[0] != "fastllm"}
    assert len(others) < 100, sorted(others)

"""Rules for the source of the kernels that no numeric test would catch."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

KERNELS = sorted((Path(__file__).resolve().parents[2] / "kernels").glob("*.py"))


def calls(path: Path) -> list[ast.Call]:
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.stem)
def test_program_ids_are_int64(path):
    """An offset made from a 32-bit program id overflows at 2^31 elements."""
    found = calls(path)
    widened = {
        id(call.func.value)
        for call in found
        if isinstance(call.func, ast.Attribute)
        and call.func.attr == "to"
        and [ast.unparse(argument) for argument in call.args] == ["tl.int64"]
    }
    narrow = [
        f"{path.name}:{call.lineno}"
        for call in found
        if ast.unparse(call.func) == "tl.program_id" and id(call) not in widened
    ]
    assert not narrow, f"not followed by .to(tl.int64): {narrow}"


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.stem)
def test_no_atomics_and_no_autotuning(path):
    """Sums in a fixed order, and the same kernels in every run."""
    banned = [
        f"{path.name}:{call.lineno}: {ast.unparse(call.func)}"
        for call in calls(path)
        if ast.unparse(call.func).startswith(("tl.atomic", "triton.autotune"))
    ]
    assert not banned

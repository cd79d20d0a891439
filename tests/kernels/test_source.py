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
    """An offset made from a 32-bit program id overflows at 2^31 elements.

    An id may be divided first, since that is slow in 64 bits.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    narrow = [
        f"{path.name}:{call.lineno}"
        for function in functions
        for call in ast.walk(function)
        if isinstance(call, ast.Call)
        and ast.unparse(call.func) == "tl.program_id"
        and not (widened(call, function) or only_divided(call, function))
    ]
    assert not narrow, f"not followed by .to(tl.int64): {narrow}"


def widened(program_id: ast.Call, function: ast.FunctionDef) -> bool:
    return any(
        isinstance(call, ast.Call)
        and isinstance(call.func, ast.Attribute)
        and call.func.value is program_id
        and ast.unparse(call).endswith(".to(tl.int64)")
        for call in ast.walk(function)
    )


def only_divided(program_id: ast.Call, function: ast.FunctionDef) -> bool:
    """Whether an id is assigned to a name, and that is only read to be divided."""
    names = [
        ast.unparse(node.targets[0])
        for node in ast.walk(function)
        if isinstance(node, ast.Assign) and node.value is program_id
    ]
    divided = {
        id(node.left)
        for node in ast.walk(function)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.FloorDiv | ast.Mod)
    }
    reads = [
        node
        for node in ast.walk(function)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in names
    ]
    return bool(reads) and all(id(node) in divided for node in reads)


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.stem)
def test_no_atomics_and_no_autotuning(path):
    """Sums in a fixed order, and the same kernels in every run."""
    banned = [
        f"{path.name}:{call.lineno}: {ast.unparse(call.func)}"
        for call in calls(path)
        if ast.unparse(call.func).startswith(("tl.atomic", "triton.autotune"))
    ]
    assert not banned

"""The rules of the house (docs of each rule: the design), checked on the sources themselves."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastllm.ops import OPS

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "fastllm"

# A room may import those that it names, and itself. `fastllm/__init__.py` and `__main__.py` are
# the front door: they may import everything.
MAY_IMPORT = {
    "layout": set(),
    "ops": {"layout"},
    "model": {"layout", "ops"},
    "data": {"layout"},
    "generation": {"layout", "ops", "model"},
    "training": {"layout", "ops", "model", "data", "generation"},
    "demo": {"layout", "ops", "model", "data", "generation", "training"},
    "cli": {"layout", "ops", "model", "data", "generation", "training", "demo"},
}
FILE_LINES, FUNCTION_LINES, KERNEL_LINES = 400, 80, 100


def sources(*folders: str) -> list[Path]:
    """Python files, but not twice through the link fastllm/kernels."""
    found = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    return [path for path in found if (PACKAGE / "kernels") not in path.parents]


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def shown(path: Path, node: ast.AST | None = None) -> str:
    line = f":{node.lineno}" if node is not None else ""
    return f"{path.relative_to(ROOT)}{line}"


def imported(path: Path) -> Iterator[tuple[ast.stmt, str]]:
    """Every import of a file, in functions too, as (node, absolute dotted name)."""
    package = list(path.relative_to(ROOT).with_suffix("").parts)[:-1]
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = [*base, *([node.module] if node.module else [])]
            for alias in node.names:
                yield node, ".".join([*origin, alias.name])


def room(path: Path) -> str | None:
    name = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return None if name.startswith("__") else name


def calls(path: Path) -> Iterator[tuple[ast.Call, str]]:
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Call):
            yield node, ast.unparse(node.func)


def test_imports_only_go_down():
    wrong = []
    for path in sources("fastllm"):
        here = room(path)
        if here is None:
            continue
        assert here in MAY_IMPORT, f"{shown(path)}: no such room; give it a place in MAY_IMPORT"
        for node, name in imported(path):
            parts = name.split(".")
            if parts[0] != "fastllm" or len(parts) == 1:
                continue
            allowed = MAY_IMPORT[here] | {here}
            if parts[1] in MAY_IMPORT and parts[1] not in allowed:
                wrong.append(f"{shown(path, node)}: {here} imports {parts[1]}")
            if parts[1] == "kernels" and here != "ops":
                wrong.append(f"{shown(path, node)}: only ops calls kernels")
    assert not wrong, "\n".join(wrong)


def test_kernels_import_nothing_of_fastllm():
    wrong = [
        f"{shown(path, node)}: {name}"
        for path in sources("kernels")
        for node, name in imported(path)
        if name.split(".")[0] == "fastllm"
    ]
    assert not wrong, "\n".join(wrong)


def test_nobody_imports_the_top_level_name_kernels():
    """It belongs to a package that people use; ours is fastllm.kernels."""
    wrong = [
        shown(path, node)
        for path in sources("fastllm", "kernels", "tests", "bench", "examples")
        for node, name in imported(path)
        if name.split(".")[0] == "kernels" and getattr(node, "level", 0) == 0
    ]
    assert not wrong, "\n".join(wrong)


def test_kernels_are_installed_through_a_link():
    link = PACKAGE / "kernels"
    assert link.is_symlink() and link.readlink() == Path("../kernels")
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    "file",
    [
        "kernels/{}.py",
        "csrc/{}.cpp",
        "fastllm/ops/{}.py",
        "tests/ops/test_{}.py",
        "bench/ops/{}.py",
    ],
)
def test_an_op_goes_by_the_same_name_in_every_room(op, file):
    assert (ROOT / file.format(op)).is_file(), f"missing {file.format(op)}"


def test_every_op_is_listed():
    # A GPU's matrix products are its vendor's: matmul has no Triton kernel. The optimizer is
    # measured as a step (bench/optimizer_step.py).
    helpers = {"__init__", "backend", "cpp", "inputs", "matmul", "shapes"}
    helpers |= {"adamw_reference", "optimizer", "working"}
    helpers |= {"logit_chunks", "registered", "tracing", "varlen"}
    # On a CPU these are made of the others.
    composed = {"lora_linear", "reward_loss"}
    assert {path.stem for path in sources("fastllm/ops")} - helpers == {*OPS, *composed}
    assert {path.stem for path in sources("bench/ops")} - helpers == {*OPS, *composed}
    for op in composed:
        assert (ROOT / f"tests/ops/test_{op}.py").is_file()


def test_test_folders_are_not_packages():
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_files_are_short():
    long = {
        shown(path): lines
        for path in sources("fastllm", "kernels")
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > FILE_LINES
    }
    assert not long, f"more than {FILE_LINES} lines: {long}"


@pytest.mark.parametrize(
    ("folder", "limit"), [("fastllm", FUNCTION_LINES), ("kernels", KERNEL_LINES)]
)
def test_functions_are_short(folder, limit):
    long = {
        f"{shown(path, node)} {node.name}": lines
        for path in sources(folder)
        for node in ast.walk(parsed(path))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and (lines := node.end_lineno - node.lineno + 1) > limit
    }
    assert not long, f"more than {limit} lines: {long}"


def test_nothing_executes_data():
    """No pickle (its exception is harmless), no eval, and torch.load reads weights only."""
    wrong = [
        f"{shown(path, node)}: imports {name}"
        for path in sources("fastllm")
        for node, name in imported(path)
        if name != "pickle.UnpicklingError"
        and name.split(".")[0]
        in {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve"}
    ]
    for path in sources("fastllm"):
        for call, name in calls(path):
            keywords = {k.arg: ast.unparse(k.value) for k in call.keywords}
            if name in {"eval", "exec"}:
                wrong.append(f"{shown(path, call)}: calls {name}")
            if name == "torch.load" and keywords.get("weights_only") != "True":
                wrong.append(f"{shown(path, call)}: torch.load without weights_only=True")
            if name.endswith("np.load") and keywords.get("allow_pickle", "False") != "False":
                wrong.append(f"{shown(path, call)}: {name} with allow_pickle")
    assert not wrong, "\n".join(wrong)


def test_no_error_is_swallowed():
    wrong = [
        shown(path, node)
        for path in sources("fastllm", "kernels")
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or ast.unparse(node.type) in {"Exception", "BaseException"})
        and not any(isinstance(inner, ast.Raise) for inner in ast.walk(node))
    ]
    assert not wrong, "\n".join(wrong)


def test_public_functions_are_annotated_and_documented():
    wrong = []
    for path in sources("fastllm/ops", "fastllm/model", "fastllm/training", "fastllm/generation"):
        for node in parsed(path).body:
            if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"):
                continue
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            missing = [a.arg for a in arguments if a.annotation is None]
            if missing or node.returns is None:
                wrong.append(f"{shown(path, node)}: {node.name} lacks types: {missing or 'result'}")
            if not ast.get_docstring(node):
                wrong.append(f"{shown(path, node)}: {node.name} has no docstring")
    assert not wrong, "\n".join(wrong)

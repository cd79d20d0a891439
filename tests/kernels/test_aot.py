"""Every kernel, compiled ahead of time for GPUs that are not here.

The public functions of `kernels/` run on meta tensors under a driver that stands for the target:
what is compiled is exactly what they launch. The compiler's output is then read for the mistakes
that cost most on a GPU: registers spilled to memory, more shared memory than there is, fp64, memory
read a few bytes at a time, and matrix products that miss the tensor cores.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from triton.compiler import ASTSource  # noqa: E402

from fastllm.kernels.launch import launch  # noqa: E402
from tests.kernels.case import Case, all_cases  # noqa: E402
from tests.kernels.machine_code import (  # noqa: E402
    SHARED_MEMORY,
    TARGETS,
    AbsentGPU,
    assembly,
    multiplies_on_tensor_cores,
    resources,
    wide,
)

# The constants were counted with Triton 3.9; earlier ones give up a few bytes more.
OLDER_COMPILERS = 0 if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9) else 64
KERNELS = Path(__file__).resolve().parents[2] / "kernels"
CASES = all_cases()


@pytest.fixture(scope="module", autouse=True)
def other_end(request: pytest.FixtureRequest) -> Iterator[None]:
    """Where most tests of this file run, a second process compiles from the last case on."""
    ours = [item for item in request.session.items if item.path == Path(__file__)]
    if len(ours) < 50:
        yield
        return
    command = [sys.executable, "-m", "tests.kernels.precompile"]
    root = Path(__file__).resolve().parents[2]
    with subprocess.Popen(command, cwd=root, stdout=subprocess.DEVNULL) as process:
        yield
        process.kill()


@pytest.fixture(params=TARGETS)
def target(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of the GPU that kernels are compiled for while the test runs."""
    monkeypatch.setattr(triton.runtime.driver, "_active", AbsentGPU(request.param))
    return request.param


def compiled(case: Case) -> list[Any]:
    """The kernels that a case launches, each variant once."""
    with launch.compiling() as kernels:
        case.launch()
    return list({kernel.hash: kernel for kernel in kernels}.values())


def named(parts: Iterable[str], name: str) -> bool:
    return any(part in name for part in parts)


@pytest.mark.parametrize(
    ("case", "target"),
    [
        pytest.param(case, target, id=f"{op}-{case.label}-{target}")
        for op, cases in CASES.items()
        for case in cases
        for target in case.targets
    ],
    indirect=["target"],
)
def test_compiles_well(case, target):
    kernels = compiled(case)
    names = " ".join(kernel.metadata.name for kernel in kernels)
    assert names
    for part in (*case.multiplies, *case.narrow):
        assert part in names, f"{part} is not among {names}"
    for kernel in kernels:
        name, usage = kernel.metadata.name, resources(kernel)
        limit = case.spills.get((target, name), (0, ""))[0] + OLDER_COMPILERS
        assert usage["spilled"] <= limit, f"{name} spills registers: {usage}"
        assert usage["shared"] <= SHARED_MEMORY[target], f"{name}: {usage}"
        assert not re.findall(r"[._]f64\b", assembly(kernel)), f"{name} computes in fp64"
        if named(case.multiplies, name):
            assert multiplies_on_tensor_cores(kernel, target), f"{name}: not on the tensor cores"
        if not named(case.narrow, name):
            assert wide(kernel, "load"), f"{name}: no loads of 16 bytes"
            assert wide(kernel, "store"), f"{name}: no stores of 16 bytes"


@pytest.mark.parametrize("target", ["sm_90"], indirect=True)
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=f"{op}-{case.label}")
        for op, cases in CASES.items()
        for case in cases
        if case.again
    ],
)
def test_lengths_do_not_recompile(case, target):
    """Batch sizes and lengths are run-time arguments: other values find the same kernels."""
    found = {kernel.hash for kernel in compiled(case)}
    for launch_again in case.again:
        with launch.compiling() as kernels:
            launch_again()
        assert {kernel.hash for kernel in kernels} <= found


@pytest.mark.parametrize("target", ["sm_90"], indirect=True)
def test_every_kernel_has_a_case(target):
    """After the tests above, everything is compiled already."""
    launched = {
        kernel.metadata.name
        for cases in CASES.values()
        for case in cases
        if target in case.targets
        for kernel in compiled(case)
    }
    written = {
        node.name
        for path in KERNELS.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")
    }
    assert written - launched == set()


@pytest.mark.parametrize("op", sorted(CASES))
def test_exemptions_have_reasons(op):
    reasons = [why for case in CASES[op] for why in case.narrow.values()]
    reasons += [why for case in CASES[op] for _, why in case.spills.values()]
    assert all(len(why) > 10 for why in reasons), reasons


@pytest.mark.parametrize("target", ["sm_90"], indirect=True)
@pytest.mark.parametrize("op", sorted(CASES))
def test_fp64_scalars_do_not_spread(op, target):
    """torch.compile passes Python floats as fp64: they may be converted, never computed with."""
    for kernel in compiled(next(case for case in CASES[op] if target in case.targets)):
        source = kernel.src
        signature = {k: "fp64" if t == "fp32" else t for k, t in source.signature.items()}
        if signature == source.signature:
            continue
        wide_scalars = triton.compile(
            ASTSource(source.fn, signature, source.constants, source.attrs),
            target=TARGETS[target],
            options={"num_warps": kernel.metadata.num_warps, "enable_fp_fusion": True},
        )
        used = set(re.findall(r"\b([a-z]\w*(?:\.\w+)*\.f64)\b", assembly(wide_scalars)))
        assert used <= {"cvt.rn.f32.f64"}, f"{kernel.metadata.name}: {used}"

"""The kernels on a processor that is not this one: built for AArch64 (NEON), run in an emulator."""

from __future__ import annotations

import ast
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
CHECKED = ("rms_norm", "rope", "swiglu", "linear_logprob", "optimizer")

pytestmark = [
    pytest.mark.reference,
    pytest.mark.skipif(
        not (shutil.which(COMPILER) and shutil.which(EMULATOR)),
        reason=f"needs {COMPILER} and {EMULATOR} (Debian: g++-aarch64-linux-gnu, qemu-user)",
    ),
]


def constant(name: str) -> str | tuple[str, ...]:
    """A constant of setup.py, which cannot be imported."""
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == name:
            return ast.literal_eval(node.value)
    raise LookupError(name)


def compiled(source: Path, folder: Path) -> Path:
    """The object of a source, built as setup.py does on AArch64."""
    flags = f"{constant('CXXFLAGS')} {constant('KERNEL_FLAGS')} -Werror -DFASTLLM_ISA=baseline"
    made = folder / f"{source.stem}.o"
    command = [COMPILER, *flags.split(), f"-I{ROOT / 'csrc'}", "-c", str(source), "-o", str(made)]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    return made


@pytest.mark.parametrize("op", sorted(set(constant("OPS")) - set(CHECKED)))
def test_kernels_compile(op, tmp_path):
    compiled(ROOT / "csrc" / f"{op}.cpp", tmp_path)


def test_kernels_are_right(tmp_path):
    sources = [ROOT / "csrc" / f"{op}.cpp" for op in CHECKED]
    objects = [compiled(source, tmp_path) for source in sources]
    objects.append(compiled(ROOT / "tests" / "ops" / "kernel_check.cpp", tmp_path))
    program = tmp_path / "check"
    subprocess.run([COMPILER, "-static", *map(str, objects), "-o", str(program)], check=True)
    found = subprocess.run([EMULATOR, str(program)], capture_output=True, text=True)
    assert (found.returncode, found.stdout) == (0, "all right\n")

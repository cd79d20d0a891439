"""What a machine needs before anything is measured: said in a few lines, done where it can be."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from fastllm.ops import cpp

ROOT = Path(__file__).parents[2]
BUILD_SECONDS = 120


def prepare() -> None:
    """Build the C++ kernels where they are missing and a compiler is there; GPU ops go without."""
    if cpp.available():
        return
    if not (shutil.which("c++") or shutil.which("g++")):
        print("C++ kernels: not built, and there is no compiler; nothing here needs them")
        return
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    try:
        built = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=BUILD_SECONDS
        )
        said = (built.stderr or built.stdout).strip().splitlines()[-1:]
        outcome = "built" if built.returncode == 0 else f"not built: {' '.join(said)}"
    except subprocess.TimeoutExpired:
        outcome = f"not built within {BUILD_SECONDS} s"
    print(f"C++ kernels: {outcome}", flush=True)

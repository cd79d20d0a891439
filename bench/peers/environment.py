"""Where the peers' virtual environment is, how it is made, and what it holds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(os.environ.get("FASTLLM_PEERS") or ROOT / ".peers-venv")
PACKAGES = ("transformers", "trl", "peft", "datasets", "accelerate")
COMMAND = "python -m bench.peers"

# llama.cpp is compiled for the processor that it runs on, which takes minutes.
LLAMA = "llama-cpp-python"
EXTRAS = (LLAMA, "gguf")
EXTRA_COMMAND = f"{COMMAND} --llama-cpp"
NATIVE = "-DGGML_NATIVE=ON"

_VERSIONS = (
    "import json, sys\n"
    "from importlib import metadata\n"
    "found = {}\n"
    "for name in sys.argv[1:]:\n"
    "    try:\n"
    "        found[name] = metadata.version(name)\n"
    "    except metadata.PackageNotFoundError:\n"
    "        pass\n"
    "print(json.dumps(found))\n"
)


def python(folder: Path = FOLDER) -> Path | None:
    """The interpreter of a complete environment; None where there is none."""
    found = folder / "bin" / "python"
    return found if found.exists() and not missing(found) else None


def missing(interpreter: Path) -> list[str]:
    """The packages that an interpreter lacks."""
    found = versions(interpreter)
    return [name for name in ("torch", *PACKAGES) if name not in found]


def versions(interpreter: Path) -> dict[str, str]:
    """Versions of the peers as an interpreter has them, torch first."""
    answer = subprocess.run(
        [str(interpreter), "-c", _VERSIONS, "torch", *PACKAGES, *EXTRAS],
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(answer.stdout)


def set_up(folder: Path, llama: bool = False) -> dict[str, str]:
    """Make the environment, or complete one that is there; what it holds already stays.

    Args:
        folder: the environment.
        llama: build llama.cpp too (a C++ compiler and some minutes).
    """
    interpreter = folder / "bin" / "python"
    if not interpreter.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    lacking = missing(interpreter)
    if "torch" in lacking:
        _install(interpreter, [torch_requirement()])
    if rest := [name for name in lacking if name != "torch"]:
        _install(interpreter, [*rest, torch_requirement()])
    found = versions(interpreter)
    if llama and (wanted := [name for name in EXTRAS if name not in found]):
        _install(interpreter, wanted)
    return versions(interpreter)


def torch_requirement() -> str:
    """The torch that runs here: a comparison between two versions would measure PyTorch."""
    return f"torch=={metadata.version('torch').partition('+')[0]}"


def _install(interpreter: Path, requirements: list[str]) -> None:
    pip = [str(interpreter), "-m", "pip", "--disable-pip-version-check", "install", "-q"]
    environment = {"CMAKE_ARGS": NATIVE} | os.environ
    subprocess.run([*pip, *requirements], check=True, env=environment)

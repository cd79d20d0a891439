"""Builds the C++ kernels (csrc/) as the module fastllm._C, with ninja. Metadata: pyproject.toml.

Needs a C++17 compiler and PyTorch's headers, and does without either: the package then installs
as pure Python, runs on PyTorch, and says what is missing. Environment:

    CXX, CXXFLAGS          the compiler, and more flags for it
    FASTLLM_REQUIRE_CPP=1  fail when the kernels cannot be built
    FASTLLM_NO_CPP=1       do not build them
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
OLDEST_TORCH = (2, 10)

# One object per op and instruction set, chosen when the library is loaded (csrc/dispatch.cpp).
OPS = (
    "matmul",
    "packed_matmul",
    "rms_norm",
    "rope",
    "swiglu",
    "attention",
    "decode_attention",
    "linear_logprob",
    "sampling",
    "pairwise_loss",
    "optimizer",
)
AVX512 = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c"
X86_LEVELS = {
    "baseline": "",
    "avx2": "-mavx2 -mfma -mf16c",
    "avx512": AVX512,
    "avx512_bf16": f"{AVX512} -mavx512bf16",
}
BINDINGS = (
    "bindings",
    "bindings_attention",
    "bindings_decode_attention",
    "bindings_matmul",
    "bindings_packed_matmul",
    "bindings_optimizer",
    "bindings_sampling",
)

# Not -ffast-math: with some compilers it makes the whole process flush subnormals to zero.
CXXFLAGS = "-std=c++17 -O3 -fPIC -fvisibility=hidden -Wall -Wextra"
KERNEL_FLAGS = "-fno-math-errno -fno-trapping-math -ffp-contract=fast -fno-exceptions -fno-rtti"


class CannotBuild(Exception):
    """Something the C++ kernels need is missing; the message says what, and how to get it."""


class NinjaBuild(build_ext):
    """Writes build.ninja and runs ninja, or leaves the kernels out and says why."""

    def run(self) -> None:
        try:
            super().run()
        except CannotBuild as error:
            if os.environ.get("FASTLLM_REQUIRE_CPP") == "1":
                raise SystemExit(f"fastllm: FASTLLM_REQUIRE_CPP=1, but {error}") from error
            self.extensions = []
            print(f"fastllm: no C++ kernels, PyTorch serves instead: {error}", file=sys.stderr)

    def build_extension(self, ext: Extension) -> None:
        if os.environ.get("FASTLLM_NO_CPP") == "1":
            raise CannotBuild("FASTLLM_NO_CPP=1")
        output = Path(self.get_ext_fullpath(ext.name)).absolute()
        output.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(self.build_temp).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text(_build_file(output))
        try:
            subprocess.run([_ninja(), "-C", str(folder)], check=True)
        except subprocess.CalledProcessError as error:
            raise CannotBuild(
                f"the compiler failed (see above; status {error.returncode})"
            ) from error


def _build_file(output: Path) -> str:
    """The text of build.ninja: what to compile with which flags, and the link."""
    torch, flags = _torch(), os.environ.get("CXXFLAGS", "")
    torch_flags = f"-DTORCH_TARGET_VERSION={_target_version()} -isystem {torch / 'include'}"
    lines = [
        "ninja_required_version = 1.5",
        f"cxx = {_compiler()}",
        f"cxxflags = {CXXFLAGS} {flags}",
        "rule compile",
        "  command = $cxx $cxxflags $flags -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = $out",
        "rule link",
        "  command = $cxx $in -o $out $flags",
        "  description = $out",
    ]
    objects = []

    def compile_(source: str, flags: str, suffix: str = "") -> None:
        objects.append(f"{source}{suffix}.o")
        lines.append(f"build {objects[-1]}: compile {_escaped(CSRC / source)}.cpp")
        lines.append(f"  flags = {flags}")

    # The slowest first, so that none of them is left alone at the end.
    python_flags = f"-I{_pybind11()} -I{sysconfig.get_path('include')}"
    compile_("module", python_flags)
    compile_("bindings_decoder", python_flags)
    compile_("decoder", torch_flags)
    for source in BINDINGS:
        compile_(source, torch_flags)
    compile_("dispatch", "")
    compile_("memory", "")
    compile_("processor", "")
    for isa, isa_flags in _levels().items():
        for op in OPS:
            compile_(op, f"{KERNEL_FLAGS} -DFASTLLM_ISA={isa} {isa_flags}", f".{isa}")
    lines.append(f"build {_escaped(output)}: link {' '.join(objects)}")
    lines.append(f"  flags = {_link_flags(torch)}")
    return "\n".join([*lines, ""])


def _levels() -> dict[str, str]:
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return X86_LEVELS if x86 else {"baseline": ""}


def _link_flags(torch: Path) -> str:
    # PyTorch is imported before fastllm._C, so its library is found by name, without a run path.
    libraries = f"-L{torch / 'lib'} -ltorch_cpu"
    if sys.platform == "darwin":
        return f"-bundle -undefined dynamic_lookup {libraries}"
    return f"-shared -Wl,--no-as-needed {libraries}"


def _target_version() -> str:
    """OLDEST_TORCH as torch/csrc/stable/version.h writes versions: one byte each, on the left."""
    major, minor = OLDEST_TORCH
    return f"0x{major:02x}{minor:02x}000000000000"


def _torch() -> Path:
    """Folder of PyTorch: importable, or beside the Python that runs this.

    pip builds in an environment of its own, from which an installed PyTorch cannot be imported;
    its headers are all that is needed, and a second PyTorch would be a download of gigabytes.
    """
    spec = importlib.util.find_spec("torch")
    candidates = [Path(spec.origin).parent] if spec and spec.origin else []
    candidates += [Path(sysconfig.get_path(name)) / "torch" for name in ("platlib", "purelib")]
    for folder in candidates:
        if (folder / "include/torch/csrc/stable/library.h").exists():
            return _new_enough(folder)
    raise CannotBuild(
        f"PyTorch was not found in {', '.join(dict.fromkeys(map(str, candidates)))}: install it "
        "first (pip install torch), then fastllm, with pip's option --no-build-isolation if your "
        "installer builds in an environment elsewhere"
    )


def _new_enough(folder: Path) -> Path:
    found = re.search(r"'(\d+)\.(\d+)", (folder / "version.py").read_text())
    if not found or tuple(map(int, found.groups())) < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        raise CannotBuild(f"PyTorch in {folder} is older than {oldest}: pip install -U torch")
    return folder


def _compiler() -> str:
    wanted = os.environ.get("CXX")
    for name in [wanted] if wanted else ["g++", "clang++", "c++"]:
        if shutil.which(name.split()[0]):
            return name
    raise CannotBuild(
        f"no C++ compiler was found ({wanted or 'g++, clang++, c++'}): install one "
        "(apt install g++, dnf install gcc-c++, xcode-select --install) and install fastllm again"
    )


def _pybind11() -> str:
    try:
        import pybind11
    except ModuleNotFoundError as error:
        raise CannotBuild("pybind11 is not installed: pip install pybind11") from error
    return pybind11.get_include()


def _ninja() -> str:
    try:
        import ninja
    except ModuleNotFoundError:
        found = shutil.which("ninja")
        if found is None:
            raise CannotBuild("ninja is not installed: pip install ninja") from None
        return found
    return str(Path(ninja.BIN_DIR) / "ninja")


def _escaped(path: Path) -> str:
    return re.sub(r"([$: ])", r"$\1", str(path))


setup(
    ext_modules=[Extension("fastllm._C", sources=[])],
    cmdclass={"build_ext": NinjaBuild},
)

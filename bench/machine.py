"""The machine, the versions, the settings and the commit that results belong to."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from fastllm.ops import cpp

from .options import Options
from .peers import environment

PACKAGES = ("torch", "triton", "transformers", "numpy")

# Settings of the environment that change speed.
VARIABLES = (
    "FASTLLM_BACKEND",
    "FASTLLM_ISA",
    "LD_PRELOAD",
    "MALLOC_MMAP_MAX_",
    "MALLOC_TOP_PAD_",
    "MALLOC_TRIM_THRESHOLD_",
    "MKL_NUM_THREADS",
    "OMP_NUM_THREADS",
    "OMP_WAIT_POLICY",
    "THP_MEM_ALLOC_ENABLE",
    "TORCH_BLAS_PREFER_CUBLASLT",
)


def describe(options: Options) -> dict[str, Any]:
    """Everything that a reader needs to place a figure; what is not known here is None."""
    gpu = options.device == "cuda"
    return {
        "device": torch.cuda.get_device_name() if gpu else processor(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "usable_cores": _usable(),
        "threads": torch.get_num_threads(),
        "memory_gb": _memory_gb(),
        "governor": _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "huge_pages": _chosen(_read("/sys/kernel/mm/transparent_hugepage/enabled")),
        "isa": cpp.isa() if cpp.available() else None,
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "mkl": torch.backends.mkl.is_available(),
        "allocator": options.malloc,
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "platform": platform.platform(terse=True),
        "libc": " ".join(platform.libc_ver()),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "peers": environment.versions(peers) if (peers := environment.python()) else None,
        "commit": commit(),
        "quick": options.quick,
        **(_gpu(options) if gpu else {}),
    }


def _gpu(options: Options) -> dict[str, Any]:
    """What a GPU and its peers add."""
    properties = torch.cuda.get_device_properties(0)
    peers = ("liger-kernel", "trl", "flash-attn", "quack-kernels")
    return {
        "seed": options.seed,
        "gpu_memory_gb": round(properties.total_memory / 1e9, 1),
        "multiprocessors": properties.multi_processor_count,
        "capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda or torch.version.hip,
        "cudnn": torch.backends.cudnn.version(),
        "gpu_peers": {name: _version(name) for name in peers},
    }


def line(facts: dict[str, Any]) -> str:
    """The facts that matter most, in one line."""
    commit = facts["commit"] or "no commit"
    shown = [
        facts["device"],
        f"{facts['threads']} threads of {facts['usable_cores']} cores",
        f"C++ {facts['isa'] or 'not built'}",
        f"torch {facts['versions']['torch']} ({facts['torch_isa']})",
        f"allocator {facts['allocator']}",
        commit[:10] + "+" * commit.endswith("+"),
    ]
    if "seed" in facts:
        absent = [name for name, version in facts["gpu_peers"].items() if version is None]
        shown += [f"triton {facts['versions']['triton']}", f"seed {facts['seed']}"]
        shown += [f"not installed: {', '.join(absent)}"] if absent else []
    return " | ".join(shown)


def slug(name: str) -> str:
    """A device's name as a file name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def processor() -> str:
    """The model of the processor."""
    info = _read("/proc/cpuinfo") or ""
    match = re.search(r"^model name\s*:\s*(.+)$", info, re.MULTILINE)
    return match.group(1) if match else platform.processor() or platform.machine()


def commit() -> str | None:
    """The commit, with "+" for a changed tree; None outside a git checkout."""
    git = ["git", "-C", os.path.dirname(__file__)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
    except FileNotFoundError:
        return None
    if head.returncode:
        return None
    changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True)
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def _usable() -> int | None:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _memory_gb() -> float | None:
    match = re.search(r"^MemTotal:\s*(\d+) kB", _read("/proc/meminfo") or "", re.MULTILINE)
    return round(int(match.group(1)) * 1024 / 1e9, 1) if match else None


def _chosen(text: str | None) -> str | None:
    """The word in brackets, as the kernel shows a choice."""
    match = re.search(r"\[(\w+)\]", text or "")
    return match.group(1) if match else None


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None

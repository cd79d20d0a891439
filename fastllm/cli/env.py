"""`fastllm env`: what is installed, what runs where on this machine, and why."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sys
from typing import Any

from . import threads

PACKAGES = (
    "torch",
    "triton",
    "tokenizers",
    "safetensors",
    "jinja2",
    "rich",
    "pyyaml",
    "transformers",
    "peft",
    "datasets",
)
VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "MKL_NUM_THREADS",
    "OMP_NUM_THREADS",
    "TOKENIZERS_PARALLELISM",
    "TRITON_INTERPRET",
)


def env(values: dict[str, Any]) -> int:
    """Print the report, as text or as JSON."""
    facts = environment()
    if values.get("json", False):
        print(json.dumps(facts, indent=2))
        return 0
    for title, content in facts.items():
        print(f"{title}:")
        for line in _lines(content):
            print(f"  {line}")
    return 0


def environment() -> dict[str, Any]:
    """Versions, devices, threads, what serves each op, and the variables that change it."""
    import fastllm
    from fastllm import ops
    from fastllm.generation import native_step
    from fastllm.ops import cpp

    return {
        "versions": {
            "fastllm": fastllm.__version__,
            "python": platform.python_version(),
            **{name: _version(name) for name in PACKAGES},
        },
        "machine": {"system": platform.platform(), "python": sys.executable},
        "devices": _devices(),
        "threads": _threads(),
        "memory": {"allocator": threads.allocator()},
        "C++": {"status": cpp.reason(), "isa": cpp.isa() if cpp.available() else "none"},
        "ops": ops.report(),
        "generation": {"token step on a CPU": native_step.status()},
        "variables": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith("FASTLLM_") or name in VARIABLES
        },
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _threads() -> dict[str, str]:
    import torch

    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "of an op": f"{torch.get_num_threads()} ({usable} usable cores of {os.cpu_count()})",
        "between ops": str(torch.get_num_interop_threads()),
        "waiting": threads.wait_policy(),
        "tokenizers": os.environ.get("RAYON_NUM_THREADS", f"{usable} (one for each usable core)"),
    }


def _devices() -> dict[str, dict[str, str]]:
    import torch

    devices = {
        "cpu": {
            "name": platform.processor() or platform.machine(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "dtypes": "fp32 (auto), bf16, fp16",
        }
    }
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        bf16 = torch.cuda.is_bf16_supported()
        devices[f"cuda:{index}"] = {
            "name": facts.name,
            "memory": f"{facts.total_memory / 2**30:.1f} GiB",
            "runtime": f"HIP {torch.version.hip}"
            if torch.version.hip
            else f"CUDA {torch.version.cuda}",
            "dtypes": "bf16 (auto), fp32, fp16" if bf16 else "fp32 (auto), fp16",
        }
    if torch.backends.mps.is_available():
        devices["mps"] = {"name": platform.machine(), "dtypes": "fp32 (auto), fp16"}
    return devices


def _lines(content: dict[str, Any]) -> list[str]:
    lines: list[str] = []
    for key, value in content.items():
        if isinstance(value, dict):
            lines += [f"{key}:"] if len(value) != 1 else []
            prefix = f"{key} on " if len(value) == 1 else "  "
            lines += [f"{prefix}{name}: {text}" for name, text in value.items()]
        else:
            lines.append(f"{key}: {value}")
    return lines or ["none set"]

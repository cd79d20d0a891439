"""A driver for GPUs that are not here, and what their compilers' output says."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_86": GPUTarget("cuda", 86, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_MEMORY = {
    "sm_80": 163 << 10,
    "sm_86": 99 << 10,
    "sm_90": 227 << 10,
    "sm_100": 227 << 10,
    "gfx942": 64 << 10,
}
TENSOR_CORES = {
    "sm_80": r"\bHMMA\b",
    "sm_86": r"\bHMMA\b",
    "sm_90": r"\bHGMMA\b",
    "sm_100": r"\b(UTC\w*MMA|HMMA)\b",
    "gfx942": r"\bv_mfma",
}
# Sixteen bytes to or from memory, by whatever instruction: plain, asynchronous copy, or bulk copy.
WIDE = {
    "cuda": {
        "load": r"ld\.global[\w.:]*\.v[48]\.[bfu]32|ld\.global[\w.:]*\.v2\.[bfu]64"
        r"|cp\.async\.c[ga]\.shared\.global[^;]*,\s*(16|0x10)\b|cp\.async\.bulk",
        "store": r"st\.global[\w.:]*\.v[48]\.[bfu]32|st\.global[\w.:]*\.v2\.[bfu]64"
        r"|cp\.async\.bulk",
    },
    "hip": {
        "load": r"(global|buffer)_load_(dwordx4|b128)",
        "store": r"(global|buffer)_store_(dwordx4|b128)",
    },
}
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class AbsentGPU:
    """As much of a driver as the compiler asks for."""

    def __init__(self, name: str) -> None:
        self.name = name

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.name]

    def get_current_device(self) -> int:
        # Triton keeps what it has compiled by device.
        return 1000 + list(TARGETS).index(self.name)

    def get_current_stream(self, device: int) -> int:
        return 0


def assembly(kernel: Any) -> str:
    """PTX, or AMD's assembly."""
    return kernel.asm["ptx" if "ptx" in kernel.asm else "amdgcn"]


def resources(kernel: Any) -> dict[str, int]:
    """Registers and spilled bytes of a thread, and bytes of shared memory of a block."""
    usage = _cuda_resources if "cubin" in kernel.asm else _amd_resources
    return {**usage(kernel), "shared": kernel.metadata.shared}


def multiplies_on_tensor_cores(kernel: Any, target: str) -> bool:
    """Whether a kernel's machine code has the target's matrix instructions."""
    code = assembly(kernel) if target == "gfx942" else _of_cubin(kernel, "nvdisasm", "-c")
    return re.search(TENSOR_CORES[target], code) is not None


def wide(kernel: Any, direction: str) -> bool:
    """Whether a kernel loads ("load") or stores ("store") 16 bytes at a time."""
    backend = "cuda" if "ptx" in kernel.asm else "hip"
    return re.search(WIDE[backend][direction], assembly(kernel)) is not None


def _cuda_resources(kernel: Any) -> dict[str, int]:
    text = _of_cubin(kernel, "cuobjdump", "-res-usage")
    usage = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text))
    return {"registers": int(usage["REG"]), "spilled": int(usage["STACK"]) + int(usage["LOCAL"])}


def _of_cubin(kernel: Any, tool: str, option: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [_TOOLS / tool, option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _amd_resources(kernel: Any) -> dict[str, int]:
    usage = dict(
        re.findall(r"\.(vgpr_count|private_segment_fixed_size):\s*(\d+)", assembly(kernel))
    )
    return {
        "registers": int(usage["vgpr_count"]),
        "spilled": int(usage["private_segment_fixed_size"]),
    }

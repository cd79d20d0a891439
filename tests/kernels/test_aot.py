"""Every kernel, compiled ahead of time for GPUs that are not here.

The public functions of `kernels/` run on meta tensors under a driver that stands for the target:
what is compiled is exactly what they launch. The compiler's output is then read for the mistakes
that cost most on a GPU: registers spilled to memory, more shared memory than there is, fp64, and
matrix products that miss the tensor cores.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource, CompiledKernel  # noqa: E402
from triton.runtime.driver import driver  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from fastllm import PackedLayout  # noqa: E402
from fastllm.kernels import (  # noqa: E402
    attention,
    decode_attention,
    linear_logprob,
    pairwise_loss,
    rms_norm,
    rope,
    swiglu,
)

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_MEMORY = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# A grouped batch: a prompt and two answers, and a segment on its own.
LAYOUT = PackedLayout([300, 200, 150, 400], [-1, 0, 0, -1], "meta")


class _AbsentGPU:
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


@pytest.fixture(params=TARGETS)
def target(request: pytest.FixtureRequest) -> Iterator[str]:
    """Name of the GPU that kernels are compiled for while the test runs."""
    driver.set_active(_AbsentGPU(request.param))
    yield request.param
    driver.reset_active()


@pytest.fixture
def compiled(target: str, monkeypatch: pytest.MonkeyPatch) -> list[CompiledKernel]:
    """The kernels that were launched, which this fixture compiles instead."""
    kernels: list[CompiledKernel] = []
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, warmup: bool, **kwargs: Any) -> None:
        kernels.append(run(self, *args, warmup=True, **kwargs))

    monkeypatch.setattr(JITFunction, "run", compile_only)
    return kernels


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def indices(*shape: int) -> torch.Tensor:
    return meta(*shape, dtype=torch.int32)


# -- what to launch: one function per op and size class ---------------------------------------------


def launch_rms_norm(dtype: torch.dtype, columns: int) -> None:
    x, weight, rstd = meta(512, columns, dtype=dtype), meta(columns, dtype=dtype), meta(512)
    rms_norm.forward(x, weight, 1e-6, None)
    rms_norm.forward(x, weight, 1e-6, x)
    rms_norm.backward(x, None, x, weight, rstd, False)
    rms_norm.backward(x, x, x, weight, rstd, True)


def launch_rope(dtype: torch.dtype, head_dim: int) -> None:
    q, k = meta(512, 28, head_dim, dtype=dtype), meta(512, 4, head_dim, dtype=dtype)
    tables = meta(4096, head_dim // 2), meta(4096, head_dim // 2)
    rope.forward(q, k, *tables, indices(512), False)
    rope.forward(q, k, *tables, indices(512), True)


def launch_swiglu(dtype: torch.dtype, _: int) -> None:
    gate = meta(512, 18944, dtype=dtype)
    swiglu.forward(gate, gate)
    swiglu.backward(gate, gate, gate)


def launch_linear_logprob(dtype: torch.dtype, vocabulary: int) -> None:
    logits, targets, row = meta(64, vocabulary, dtype=dtype), meta(64, dtype=torch.int64), meta(64)
    for softcap in (0.0, 30.0):
        linear_logprob.forward(logits, targets, 0.7, softcap)
        linear_logprob.backward_(logits, targets, row, row, row, row, 0.7, softcap)


def launch_pairwise_loss(dtype: torch.dtype, pairs: int) -> None:
    score = meta(pairs, dtype=dtype)
    pairwise_loss.forward(score, score, None, 0.01)
    pairwise_loss.forward(score, score, score, 0.01)


def launch_attention(dtype: torch.dtype, head_dim: int, layout: PackedLayout = LAYOUT) -> None:
    q = meta(layout.num_queries, 28, head_dim, dtype=dtype)
    k = meta(layout.total_tokens, 4, head_dim, dtype=dtype)
    out, lse = attention.forward(q, k, k, layout, 0.1, 0)
    attention.backward(out, q, k, k, out, lse, layout, 0.1, 0)


def launch_attention_of_few(dtype: torch.dtype, head_dim: int) -> None:
    launch_attention(dtype, head_dim, LAYOUT.select([299, 400, 649, 1049]))


def launch_decode_attention(dtype: torch.dtype, head_dim: int) -> None:
    decode_attention.forward(
        meta(32, 28, head_dim, dtype=dtype),
        *[meta(2000, 4, head_dim, dtype=dtype)] * 2,
        indices(5),
        indices(32),
        *[meta(40, 1024, 4, head_dim, dtype=dtype)] * 2,
        indices(32),
        indices(32),
        0.1,
        0,
    )


CASES: list[tuple[Callable[[torch.dtype, int], None], str, int]] = [
    (launch_rms_norm, "bf16", 128),
    (launch_rms_norm, "bf16", 3584),
    (launch_rms_norm, "fp32", 8192),
    (launch_rope, "bf16", 128),
    (launch_rope, "fp32", 80),
    (launch_swiglu, "bf16", 0),
    (launch_swiglu, "fp32", 0),
    (launch_linear_logprob, "bf16", 151936),
    (launch_linear_logprob, "fp32", 151936),
    (launch_linear_logprob, "fp32", 50257),
    (launch_pairwise_loss, "bf16", 8),
    (launch_pairwise_loss, "fp32", 4096),
    (launch_attention, "bf16", 64),
    (launch_attention, "bf16", 128),
    (launch_attention, "fp16", 80),
    (launch_attention, "bf16", 256),
    (launch_attention, "fp32", 128),
    (launch_attention_of_few, "bf16", 128),
    (launch_decode_attention, "bf16", 128),
    (launch_decode_attention, "fp16", 256),
    (launch_decode_attention, "fp32", 64),
]


@pytest.mark.parametrize(
    ("launch", "dtype", "size"),
    CASES,
    ids=[f"{launch.__name__.removeprefix('launch_')}-{d}-{size}" for launch, d, size in CASES],
)
def test_compiles_well(launch, dtype, size, target, compiled):
    launch(DTYPES[dtype], size)
    assert compiled
    for kernel in compiled:
        name, usage = kernel.metadata.name, resources(kernel)
        assert usage["spilled"] == 0, f"{name} spills {usage['spilled']} bytes per thread: {usage}"
        assert usage["shared"] <= SHARED_MEMORY[target], f"{name}: {usage}"
        assert not fp64_instructions(kernel), name
        if "attention" in launch.__name__ and "combine" not in name and dtype != "fp32":
            assert tensor_core_instructions(kernel), f"{name}: no tensor cores"


def resources(kernel: CompiledKernel) -> dict[str, int]:
    """Registers and spilled bytes of a thread, and bytes of shared memory of a block."""
    if "cubin" not in kernel.asm:
        number = {
            key: int(re.search(rf"\.{key}:\s*(\d+)", kernel.asm["amdgcn"])[1])
            for key in ("vgpr_count", "private_segment_fixed_size")
        }
        registers, spilled = number["vgpr_count"], number["private_segment_fixed_size"]
    else:
        registers, spilled = _cuda_resources(kernel.asm["cubin"])
    return {"registers": registers, "spilled": spilled, "shared": kernel.metadata.shared}


def _cuda_resources(cubin: bytes) -> tuple[int, int]:
    tool = Path(find_spec("triton").origin).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists():
        pytest.skip(f"{tool} is missing")
    path = _scratch("kernel.cubin")
    path.write_bytes(cubin)
    text = subprocess.run(
        [tool, "-res-usage", path], capture_output=True, text=True, check=True
    ).stdout
    usage = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text))
    return int(usage["REG"]), int(usage["STACK"]) + int(usage["LOCAL"])

"""Every kernel, compiled ahead of time for GPUs that are not here.

The public functions of `kernels/` run on meta tensors under a driver that stands for the target:
what is compiled is exactly what they launch. The compiler's output is then read for the mistakes
that cost most on a GPU: registers spilled to memory, more shared memory than there is, fp64, and
matrix products that miss the tensor cores.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable
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
# ptxas may give up a few bytes to fit one more block on a processor; a mistake costs hundreds.
SPILL_LIMIT = 32
MATRIX_PRODUCT = {
    "sm_80": r"mma\.sync",
    "sm_90": r"wgmma\.mma_async|mma\.sync",
    "sm_100": r"tcgen05\.mma|mma\.sync",
    "gfx942": r"v_mfma",
}
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
def target(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of the GPU that kernels are compiled for while the test runs."""
    monkeypatch.setattr(driver, "_active", _AbsentGPU(request.param))
    return request.param


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


# -- what to launch: one function per op -----------------------------------------------------------


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
        meta(700, 4, head_dim, 64, dtype=dtype),
        meta(700, 4, 64, head_dim, dtype=dtype),
        indices(4, 17),
        indices(4),
        indices(32),
        indices(32, 16),
        indices(32),
        0.1,
        0,
    )


# (what, dtype, size, targets): the common sizes everywhere, the others on one.
EVERYWHERE = tuple(TARGETS)
CASES: list[tuple[Callable[[torch.dtype, int], None], str, int, tuple[str, ...]]] = [
    (launch_rms_norm, "bf16", 128, EVERYWHERE),
    (launch_rms_norm, "bf16", 3584, EVERYWHERE),
    (launch_rms_norm, "fp32", 8192, EVERYWHERE),
    (launch_rms_norm, "bf16", 8192, ("sm_90",)),
    (launch_rope, "bf16", 128, EVERYWHERE),
    (launch_rope, "fp32", 80, EVERYWHERE),
    (launch_swiglu, "bf16", 18944, EVERYWHERE),
    (launch_swiglu, "fp32", 18944, EVERYWHERE),
    (launch_linear_logprob, "bf16", 151936, EVERYWHERE),
    (launch_linear_logprob, "fp32", 151936, EVERYWHERE),
    (launch_linear_logprob, "fp32", 50257, ("sm_90",)),
    (launch_pairwise_loss, "bf16", 8, EVERYWHERE),
    (launch_pairwise_loss, "fp32", 4096, EVERYWHERE),
    (launch_attention, "bf16", 64, EVERYWHERE),
    (launch_attention, "bf16", 128, EVERYWHERE),
    (launch_attention, "fp32", 64, EVERYWHERE),
    (launch_attention, "fp16", 80, ("sm_90",)),
    (launch_attention, "bf16", 256, ("sm_90",)),
    (launch_attention_of_few, "bf16", 128, ("sm_90", "gfx942")),
    (launch_decode_attention, "bf16", 128, EVERYWHERE),
    (launch_decode_attention, "fp32", 64, EVERYWHERE),
    (launch_decode_attention, "fp16", 256, ("sm_90",)),
]


def case_name(case: tuple[Callable[..., None], str, int, tuple[str, ...]]) -> str:
    return f"{case[0].__name__.removeprefix('launch_')}-{case[1]}-{case[2]}"


@pytest.mark.parametrize(
    ("case", "target"),
    [
        pytest.param(case, target, id=f"{case_name(case)}-{target}")
        for case in CASES
        for target in case[3]
    ],
    indirect=["target"],
)
def test_compiles_well(case, target, compiled):
    launch, dtype, size, _ = case
    launch(DTYPES[dtype], size)
    assert compiled
    for kernel in compiled:
        name, usage = kernel.metadata.name, resources(kernel)
        assert usage["spilled"] <= SPILL_LIMIT, f"{name} spills registers: {usage}"
        assert usage["shared"] <= SHARED_MEMORY[target], f"{name}: {usage}"
        assert not re.findall(r"[._]f64\b", assembly(kernel)), f"{name} computes in fp64"
        if "attention" in name or name.startswith("decode"):
            assert re.search(MATRIX_PRODUCT[target], assembly(kernel)), f"{name}: no tensor cores"


@pytest.mark.parametrize("target", ["sm_90"], indirect=True)
@pytest.mark.parametrize(
    ("launch", "size"),
    [
        (launch_rms_norm, 3584),
        (launch_rope, 128),
        (launch_swiglu, 18944),
        (launch_linear_logprob, 151936),
    ],
)
def test_memory_is_read_and_written_in_16_byte_vectors(launch, size, target, compiled):
    launch(torch.bfloat16, size)
    for kernel in compiled:
        for instruction in (
            ("ld", "st") if "logprob_forward" not in kernel.metadata.name else ("ld",)
        ):
            vectors = rf"{instruction}\.global(\.\w+)*\.v4\.b32"
            assert re.search(vectors, assembly(kernel)), f"{kernel.metadata.name}: no {vectors}"


@pytest.mark.parametrize("target", ["sm_90"], indirect=True)
def test_hopper_attention_multiplies_in_warp_groups(target, compiled):
    launch_attention(torch.bfloat16, 128)
    assert [k.metadata.name for k in compiled if "wgmma" not in assembly(k)] == []


@pytest.mark.parametrize("target", ["sm_90"], indirect=True)
@pytest.mark.parametrize(
    ("launch", "size"),
    [
        (launch_rms_norm, 3584),
        (launch_linear_logprob, 151936),
        (launch_pairwise_loss, 8),
        (launch_attention, 64),
        (launch_decode_attention, 64),
    ],
)
def test_fp64_scalars_do_not_spread(launch, size, target, compiled):
    """torch.compile passes Python floats as fp64: they may be converted, never computed with."""
    launch(torch.bfloat16, size)
    checked = 0
    for kernel in compiled:
        source = kernel.src
        signature = {k: "fp64" if t == "fp32" else t for k, t in source.signature.items()}
        if signature == source.signature:
            continue
        wide = triton.compile(
            ASTSource(source.fn, signature, source.constants, source.attrs),
            target=TARGETS[target],
            options={"num_warps": kernel.metadata.num_warps, "enable_fp_fusion": True},
        )
        used = set(re.findall(r"\b([a-z]\w*(?:\.\w+)*\.f64)\b", assembly(wide)))
        assert used <= {"cvt.rn.f32.f64"}, f"{kernel.metadata.name}: {used}"
        checked += 1
    assert checked


@pytest.mark.parametrize("target", ["sm_90"], indirect=True)
def test_lengths_do_not_recompile(target, compiled):
    """Batch sizes and lengths are run-time arguments: other values find the same kernel."""
    for layout in (PackedLayout([n, n + 7, 200], [-1, 0, -1], "meta") for n in (97, 144, 160)):
        launch_attention(torch.bfloat16, 64, layout)
    for rows in (17, 32, 513):
        x = meta(rows, 3584, dtype=torch.bfloat16)
        rms_norm.forward(x, x[0], 1e-6, None)
    for pairs in (3, 16, 31):
        pairwise_loss.forward(meta(pairs), meta(pairs), None, 0.0)
    variants = {kernel.metadata.name: set() for kernel in compiled}
    for kernel in compiled:
        variants[kernel.metadata.name].add(kernel.hash)
    assert {name: len(hashes) for name, hashes in variants.items()} == dict.fromkeys(variants, 1)


# -- reading the compiler's output -----------------------------------------------------------------


def assembly(kernel: CompiledKernel) -> str:
    return kernel.asm["ptx" if "ptx" in kernel.asm else "amdgcn"]


def resources(kernel: CompiledKernel) -> dict[str, int]:
    """Registers and spilled bytes of a thread, and bytes of shared memory of a block."""
    usage = _cuda_resources if "cubin" in kernel.asm else _amd_resources
    return {**usage(kernel), "shared": kernel.metadata.shared}


def _cuda_resources(kernel: CompiledKernel) -> dict[str, int]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [tool, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text))
    return {"registers": int(usage["REG"]), "spilled": int(usage["STACK"]) + int(usage["LOCAL"])}


def _amd_resources(kernel: CompiledKernel) -> dict[str, int]:
    usage = dict(
        re.findall(r"\.(vgpr_count|private_segment_fixed_size):\s*(\d+)", assembly(kernel))
    )
    return {
        "registers": int(usage["vgpr_count"]),
        "spilled": int(usage["private_segment_fixed_size"]),
    }

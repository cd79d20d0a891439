"""The launcher's keys, and the table of constants: what can be said of them without a GPU."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("the interpreter launches nothing", allow_module_level=True)

import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402

from fastllm.kernels import configs, swiglu  # noqa: E402
from fastllm.kernels import launch as module  # noqa: E402
from tests.kernels.case import meta  # noqa: E402
from tests.kernels.machine_code import TARGETS, AbsentGPU  # noqa: E402


@triton.jit(do_not_specialize=["count"])
def add_kernel(x_ptr, y_ptr, count, shift, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets, mask=offsets < count)
    tl.store(y_ptr + offsets, x + tl.cast(shift, tl.float32), mask=offsets < count)


class Compiled:
    """Stands for a compiled kernel, and notes how it is launched."""

    def __init__(self) -> None:
        self.launches: list[tuple] = []

    def __getitem__(self, grid):
        return lambda *args: self.launches.append((grid, *args))


@pytest.fixture
def compiled(monkeypatch):
    """What stands for the compiled kernel; each compilation is noted in `times`."""
    made = Compiled()
    made.times = 0

    def run(kernel, grid, args, constants, warmup):
        made.times += 1
        return made

    monkeypatch.setattr(module, "_run", run)
    return made


def test_compiles_once_and_passes_constants_in_the_kernels_order(compiled):
    launch, x = module.Launcher(), torch.zeros(64)
    for shift in (0.5, 0.5, 2.0):
        launch(add_kernel, (3,), x, x, 100, shift, num_warps=4, num_stages=2, BLOCK=32)
    assert compiled.times == 1
    assert compiled.launches == [((3, 1, 1), x, x, 100, shift, 32) for shift in (0.5, 2.0)]


@pytest.mark.parametrize(
    "other",
    [
        {"x": torch.zeros(64, dtype=torch.bfloat16)},
        {"x": torch.zeros(65)[1:]},
        {"x": None},
        {"count": 1},
        {"count": 96},
        {"count": 2**33},
        {"BLOCK": 64},
        {"num_warps": 8},
    ],
    ids=str,
)
def test_what_triton_compiles_for_is_in_the_key(compiled, other):
    launch = module.Launcher()
    given = {"x": torch.zeros(64), "count": 100, "BLOCK": 32, "num_warps": 4}
    for change in ({}, other, {}, other):
        now = given | change
        x, count = now.pop("x"), now.pop("count")
        launch(add_kernel, (1,), torch.zeros(4), x, count, 0.5, **now)
    assert (compiled.times, len(compiled.launches)) == (2, 2)


@pytest.mark.parametrize("count", [101, 2**20 + 3, -5])
def test_other_numbers_find_the_same_kernel(compiled, count):
    launch, x = module.Launcher(), torch.zeros(64)
    for number in (99, count):
        launch(add_kernel, (1,), x, x, number, 0.5, BLOCK=32)
    assert compiled.times == 1


@pytest.mark.parametrize(("rocm", "times"), [(True, 2), (False, 1)])
def test_amd_compiles_for_memory_beyond_32_bits(compiled, monkeypatch, rocm, times):
    monkeypatch.setattr(module, "_ROCM", rocm)
    launch, large = module.Launcher(), meta(2**29 + 16)
    for x in (large[:64].clone(), large, large[:64]):
        launch(add_kernel, (1,), x, x, 99, 0.5, BLOCK=32)
    assert compiled.times == times


def test_compiling_runs_nothing(monkeypatch):
    monkeypatch.setattr(triton.runtime.driver, "_active", AbsentGPU("sm_90"))
    with module.launch.compiling() as kernels:
        swiglu.forward(meta(8, 64), meta(8, 64))
    assert [type(kernel).__name__ for kernel in kernels] == ["CompiledKernel"]
    assert module.launch._collected is None


@pytest.mark.parametrize(
    ("gpu", "expected"),
    [
        (("cuda", 80), ("sm_80",)),
        (("cuda", 75), ("sm_80",)),
        (("cuda", 86), ("sm_86", "sm_80")),
        (("cuda", 89), ("sm_86", "sm_80")),
        (("cuda", 90), ("sm_90", "sm_80")),
        (("cuda", 103), ("sm_100", "sm_90", "sm_80")),
        (("cuda", 120), ("sm_86", "sm_80")),
        (("hip", "gfx950"), ("gfx942",)),
    ],
)
def test_tables_of_a_gpu(gpu, expected):
    assert configs.architectures(GPUTarget(*gpu, 32)) == expected


def test_class_of_a_size(monkeypatch):
    classes = {"2": {"64": {"BLOCK": 1}, "4096": {"BLOCK": 2}}}
    monkeypatch.setattr(configs, "_tables", lambda: {("sm_80", "some_kernel"): classes})
    monkeypatch.setattr(triton.runtime.driver, "_active", AbsentGPU("sm_90"))
    found = [configs.config("some_kernel", torch.bfloat16, n)["BLOCK"] for n in (1, 64, 65, 9999)]
    assert found == [1, 1, 2, 2]
    with pytest.raises(LookupError, match=r"other_kernel on cuda 90"):
        configs.config("other_kernel", torch.bfloat16, 1)


@pytest.mark.parametrize("arch", TARGETS)
def test_every_table_names_its_warps(arch):
    for (of_arch, kernel), by_bytes in configs._tables().items():
        if of_arch != arch:
            continue
        for classes in by_bytes.values():
            for size, constants in classes.items():
                where = f"{kernel} {arch} {size}: {constants}"
                assert "num_warps" in constants, where
                assert constants["num_warps"] in (1, 2, 4, 8, 16, 32), where

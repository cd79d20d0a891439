"""The choice of a backend: automatic, asked for, and refused."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from fastllm import ops
from fastllm.ops import cpp, report, rms_norm, use_backend

interpreted = os.environ.get("TRITON_INTERPRET") == "1"
needs_cpp = pytest.mark.skipif(not cpp.available(), reason="the C++ kernels are not built")
pytestmark = pytest.mark.reference


def normed(dtype=torch.float32, device="cpu"):
    x = torch.randn(2, 8, device=device, dtype=dtype)
    return rms_norm(x, torch.ones(8, device=device, dtype=dtype))


def served_by(op="rms_norm", device="cpu"):
    return report()[op][device].split()[0].rstrip(":")


def in_a_new_process(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | environment,
        capture_output=True,
        text=True,
    )


def test_unknown_name():
    with (
        pytest.raises(ValueError, match=r"use_backend.*torch, cpp, triton.*'cuda'"),
        use_backend("cuda"),
    ):
        pass


@pytest.mark.parametrize("name", ["cpp", "triton"])
def test_no_kernels_for_fp64(name):
    with use_backend(name), pytest.raises(RuntimeError, match=rf"'{name}'.*float64"):
        normed(torch.float64)


def test_fp64_falls_back_to_torch_when_nobody_asked():
    with use_backend("auto"):
        assert normed(torch.float64).dtype == torch.float64


@pytest.mark.skipif(interpreted, reason="the interpreter serves the CPU")
def test_triton_on_the_cpu_without_the_interpreter():
    with use_backend("triton"), pytest.raises(RuntimeError, match=r"'triton'.*TRITON_INTERPRET=1"):
        normed()


@pytest.mark.cuda
def test_cpp_on_a_gpu():
    with use_backend("cpp"), pytest.raises(RuntimeError, match=r"'cpp'.*CPU.*cuda"):
        normed(device="cuda")


@pytest.mark.skipif(cpp.available(), reason="the C++ kernels are built")
def test_cpp_that_is_not_built():
    with use_backend("cpp"), pytest.raises(RuntimeError, match="'cpp'"):
        normed()
    assert served_by() == "torch"


def test_request_ends_with_the_block():
    outside = served_by()
    with use_backend("torch"):
        assert served_by() == "torch"
        with use_backend("auto"):
            assert served_by() == outside
        assert served_by() == "torch"
    assert served_by() == outside


def test_request_ends_with_an_exception():
    outside = served_by()
    with pytest.raises(ZeroDivisionError), use_backend("torch"):
        raise ZeroDivisionError
    assert served_by() == outside


@needs_cpp
def test_cpp_serves_the_cpu_by_itself():
    with use_backend("auto"):
        assert {served_by(op) for op in ops.OPS} == {"cpp"}


def test_report_names_every_op_and_gives_a_reason():
    found = report()
    assert set(found) == set(ops.OPS)
    for devices in found.values():
        assert "cpu" in devices
        for line in devices.values():
            backend, reason = line.split(":", 1)
            assert backend.split()[0] in ("torch", "cpp", "triton", "none") and reason.strip()


@pytest.mark.skipif(interpreted, reason="the interpreter serves the CPU")
def test_report_says_why_a_request_cannot_be_met():
    with use_backend("triton"):
        assert report()["rms_norm"]["cpu"].startswith("none (requested: triton): ")


def test_unknown_name_in_the_environment():
    run = in_a_new_process(
        "import torch; from fastllm.ops import swiglu; swiglu(torch.ones(2), torch.ones(2))",
        FASTLLM_BACKEND="nonsense",
    )
    assert run.returncode != 0
    assert "ValueError: FASTLLM_BACKEND" in run.stderr and "'nonsense'" in run.stderr


def test_environment_is_weaker_than_use_backend():
    code = """
import torch
from fastllm.ops import report, use_backend
line = lambda: report()["swiglu"]["cpu"]
assert line().startswith("torch (requested: torch)"), line()
with use_backend("auto"):
    assert "requested" not in line(), line()
"""
    run = in_a_new_process(code, FASTLLM_BACKEND="torch")
    assert run.returncode == 0, run.stderr


def test_requests_do_not_leak_between_threads():
    from concurrent.futures import ThreadPoolExecutor

    outside = served_by()
    with use_backend("torch"), ThreadPoolExecutor(1) as pool:
        assert pool.submit(served_by).result() == outside


def test_backward_runs_on_the_backend_of_the_forward():
    """Autograd calls backward from another thread and after the block has ended."""
    x = torch.randn(3, 8, requires_grad=True)
    weight = torch.ones(8)
    with use_backend("torch"):
        y = rms_norm(x, weight)
    y.sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.cuda
def test_tensors_on_two_devices():
    with pytest.raises(ValueError, match="all tensors must be on cuda"):
        rms_norm(torch.randn(2, 8, device="cuda"), torch.ones(8))

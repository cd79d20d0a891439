"""Fixtures that every test may ask for.

Each op is tested on every backend that can run here. `pytest tests` covers PyTorch and C++; the
Triton interpreter is read at import, so it has a process of its own, which runs only what the
first one could not: `TRITON_INTERPRET=1 pytest tests/ops tests/invariants`.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and not torch.cuda.is_available()

# How far an exact kernel may be from the fp64 reference, relative to the largest element: for the
# low precisions half a unit in the last place, which is what one rounding costs. The interpreter
# cuts bf16 off instead of rounding it.
ROUNDING = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.bfloat16: 2.0**-7 if INTERPRETED else 2.0**-8,
    torch.float16: 2.0**-11,
}


def pytest_configure(config: pytest.Config) -> None:
    for marker in (
        "reference: checks the PyTorch definition alone (once, not per backend)",
        "large: too many programs for the Triton interpreter",
        "cuda: needs a CUDA device",
    ):
        config.addinivalue_line("markers", marker)


def pytest_report_header() -> str:
    skipped = "" if "triton" in _backends() else " (triton: TRITON_INTERPRET=1 or a CUDA device)"
    return f"backends: {', '.join(_backends())}{skipped}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if INTERPRETED and item.get_closest_marker("reference"):
            item.add_marker(pytest.mark.skip(reason="runs in the process without the interpreter"))
        if INTERPRETED and item.get_closest_marker("large"):
            item.add_marker(pytest.mark.skip(reason="too large for the Triton interpreter"))
        if item.get_closest_marker("cuda") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" in metafunc.fixturenames:
        on_gpu = metafunc.definition.get_closest_marker("cuda")
        metafunc.parametrize("backend", ["triton"] if on_gpu else _backends(), indirect=True)


def _backends() -> list[str]:
    if INTERPRETED:
        return ["triton"]
    return ["torch", "cpp", *(["triton"] if torch.cuda.is_available() else [])]


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    """Fixed seeds, deterministic algorithms, and NaN in memory that nobody wrote."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    random.seed(0)
    torch.manual_seed(0)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Name of the backend that serves every op in this test."""
    from fastllm.ops import cpp, use_backend

    name = request.param
    if name == "cpp" and not cpp.available():
        if os.environ.get("FASTLLM_REQUIRE_CPP") == "1":
            pytest.fail(cpp.reason())
        pytest.skip(cpp.reason())
    with use_backend(name):
        yield name


@pytest.fixture
def cpp_kernels() -> Any:
    """The raw C++ kernels, for what they promise beyond the ops."""
    from fastllm.ops import cpp

    if INTERPRETED or not cpp.available():
        pytest.skip(cpp.reason())
    return cpp


@pytest.fixture
def device(backend: str) -> torch.device:
    """Where the tensors of this test live."""
    on_gpu = backend == "triton" and torch.cuda.is_available()
    return torch.device("cuda" if on_gpu else "cpu")


@pytest.fixture
def rounds_bf16() -> None:
    """For tests that compare bits: skips where bf16 is cut off instead of rounded."""
    if INTERPRETED:
        pytest.skip("the Triton interpreter cuts bf16 off instead of rounding it")


@pytest.fixture
def assert_error_ratio() -> Callable[..., None]:
    """FlashAttention's rule: at most twice the error of the same computation in PyTorch."""
    return _assert_error_ratio


@pytest.fixture
def matches_reference(device: torch.device) -> Callable[..., SimpleNamespace]:
    """Run an op, and compare its outputs and every gradient with the fp64 reference.

    ``check(op, reference, inputs, dtype, strides=..., constants=..., frozen=..., **options)``:
    `inputs` are cast to `dtype` and, but for the names in `frozen`, differentiated; `constants`
    (fp32 tables, say) are not cast; `strides` names the memory layout of the inputs and
    `grad_strides` that of the output gradients (see `restrided`); `atol`, and `rtol` of the
    largest element, are allowed on top, for results that are small differences of large numbers.
    """

    def check(
        op: Callable[..., Any],
        reference: Callable[..., Any],
        inputs: dict[str, Tensor | None],
        dtype: torch.dtype = torch.float32,
        *,
        strides: str = "contiguous",
        grad_strides: str = "contiguous",
        constants: dict[str, Tensor] | None = None,
        frozen: tuple[str, ...] = (),
        only_output: int | None = None,
        atol: float = 0.0,
        rtol: float = 0.0,
        **options: Any,
    ) -> SimpleNamespace:
        constants = constants or {}
        given = {
            name: None if t is None else _restrided(t.to(device, dtype), strides)
            for name, t in inputs.items()
        }
        run = _Run(given, frozen, grad_strides, only_output)
        fixed = {name: t.to(device) for name, t in constants.items()}
        exact_fixed = {name: t.double() for name, t in fixed.items() if t.is_floating_point()}
        exact = run(reference, torch.float64, {**fixed, **exact_fixed}, options)
        low = run(reference, dtype, fixed, options)
        got = run(op, dtype, fixed, options)
        for name, value in exact.items():
            assert name in got, f"no {name}"
            _assert_error_ratio(got[name], value, low[name], name, atol, rtol)
        for name in got.keys() - exact.keys():
            assert not got[name].any(), f"{name}: expected none, or zeros"
        return SimpleNamespace(**{name.replace(" ", "_"): t for name, t in got.items()})

    return check


@pytest.fixture
def restrided() -> Callable[[Tensor, str], Tensor]:
    """The same tensor in another memory layout, its surroundings filled with NaN."""
    return _restrided


class _Run:
    """One op or reference on the same inputs and output gradients, in any dtype."""

    def __init__(
        self,
        given: dict[str, Tensor | None],
        frozen: tuple[str, ...],
        grad_strides: str,
        only_output: int | None,
    ) -> None:
        self.given, self.frozen = given, frozen
        self.grad_strides, self.only_output = grad_strides, only_output

    def __call__(
        self,
        function: Callable[..., Any],
        dtype: torch.dtype,
        constants: dict[str, Tensor],
        options: dict[str, Any],
    ) -> dict[str, Tensor]:
        leaves = {name: self._leaf(name, t, dtype) for name, t in self.given.items()}
        before = {name: t.detach().clone() for name, t in leaves.items() if t is not None}
        result = function(**leaves, **constants, **options)
        outputs = result if isinstance(result, tuple) else (result,)
        self._backward(outputs)
        found = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
        for name, leaf in leaves.items():
            if leaf is None:
                continue
            assert torch.equal(leaf.detach(), before[name]), f"{name} was written to"
            if not leaf.requires_grad:
                assert leaf.grad is None, f"{name} is frozen but has a gradient"
            elif leaf.grad is not None:
                assert leaf.grad.dtype == dtype, f"gradient of {name}"
                found[f"gradient of {name}"] = leaf.grad
        return found

    def _leaf(self, name: str, tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        if tensor is None:
            return None
        leaf = tensor.detach() if tensor.dtype == dtype else tensor.detach().to(dtype)
        return leaf.requires_grad_(name not in self.frozen)

    def _backward(self, outputs: tuple[Tensor, ...]) -> None:
        """The same random output gradients, whatever the dtype of this run."""
        generator = torch.Generator().manual_seed(7)
        asked, gradients = [], []
        for index, output in enumerate(outputs):
            random_gradient = torch.randn(output.shape, generator=generator).to(torch.bfloat16)
            if self.only_output in (None, index) and output.requires_grad:
                asked.append(output)
                gradients.append(
                    _restrided(random_gradient.to(output.device, output.dtype), self.grad_strides)
                )
        if asked:
            torch.autograd.backward(asked, gradients)


def _restrided(tensor: Tensor, strides: str) -> Tensor:
    if strides == "contiguous" or tensor.dim() == 0:
        return tensor
    shape = tensor.shape
    match strides:
        case "every_other_row":
            room = tensor.new_full((2 * shape[0], *shape[1:]), float("nan"))[::2]
        case "every_other_column":
            room = tensor.new_full((*shape[:-1], 2 * shape[-1]), float("nan"))[..., ::2]
        case "inside":
            room = tensor.new_full((*shape[:-1], shape[-1] + 3), float("nan"))[..., 1:-2]
        case "transposed":
            room = tensor.new_empty(shape[::-1]).permute(*reversed(range(tensor.dim())))
        case "expanded":
            return tensor[:1].clone().expand(shape)
        case _:
            raise ValueError(f"unknown strides {strides!r}")
    return room.copy_(tensor)


def _assert_error_ratio(
    got: Tensor,
    exact: Tensor,
    low: Tensor,
    name: str = "result",
    atol: float = 0.0,
    rtol: float = 0.0,
) -> None:
    assert got.shape == exact.shape, f"{name}: shape {got.shape}, expected {exact.shape}"
    assert got.dtype == low.dtype, f"{name}: {got.dtype}, expected {low.dtype}"
    if exact.numel() == 0:
        return
    assert exact.isfinite().all(), f"{name}: the fp64 reference is not finite"
    assert got.isfinite().all(), f"{name}: not finite where the fp64 reference is"
    error, low_error = _largest(got.double() - exact), _largest(low.double() - exact)
    slack = (ROUNDING[got.dtype] + rtol) * _largest(exact) + atol
    assert error <= 2 * low_error + slack, (
        f"{name} ({got.dtype}): error {error:.3g}, PyTorch's own {low_error:.3g}, slack {slack:.3g}"
    )


def _largest(tensor: Tensor) -> float:
    return float(tensor.abs().max())

"""The two-node block against the op-by-op block: hidden states and every gradient."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from fastllm import ModelConfig, PackedLayout, Transformer
from fastllm.model import fused
from fastllm.model.transformer import Block
from fastllm.ops import use_backend

LAYOUT = ([5, 3, 2, 1, 0, 6], [-1, 0, 0, -1, -1, 3])
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 3e-2}


def gradients(
    model: Transformer, layout: PackedLayout, rows: Tensor | None, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Hidden states, and the gradients of all parameters for one random output gradient."""
    model.zero_grad()
    model.model.compute_dtype = dtype
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 40, (layout.total_tokens,), generator=generator)
    hidden = model.hidden(ids, layout, rows)
    hidden.backward(torch.randn(hidden.shape, generator=generator).to(hidden.dtype))
    named = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"hidden": hidden.detach(), **named}


def assert_near(found: dict[str, Tensor], expected: dict[str, Tensor], dtype: torch.dtype) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        error = (found[name].double() - value.double()).norm()
        assert error <= TOLERANCE[dtype] * value.double().norm().clamp(min=1e-6), name


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The calls of the attention half."""
    calls: list[Any] = []
    original = fused.attention_half
    monkeypatch.setattr(
        fused, "attention_half", lambda *a, **k: calls.append(a) or original(*a, **k)
    )
    return calls


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("chosen", [None, [0, 6, 7, 9, 16]], ids=["all", "rows"])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("recompute", [False, True])
def test_it_is_the_op_by_op_block(
    backend: str,
    sizes: dict[str, Any],
    counted: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    chosen: list[int] | None,
    window: int | None,
    recompute: bool,
) -> None:
    torch.manual_seed(0)
    config = ModelConfig(**sizes, sliding_window=window, model_type="mistral")
    model = Transformer(config)
    model.model.gradient_checkpointing = recompute
    layout, rows = PackedLayout(*LAYOUT), None if chosen is None else torch.tensor(chosen)
    with use_backend(backend):
        found = gradients(model, layout, rows, dtype)
        assert bool(counted) == (backend != "torch")
        monkeypatch.setattr(Block, "_is_plain", lambda self: False)
        counted.clear()
        expected = gradients(model, layout, rows, dtype)
    assert not counted
    assert_near(found, expected, dtype)


def test_frozen_weights_get_no_gradient(sizes: dict[str, Any], counted: list[Any]) -> None:
    model = Transformer(ModelConfig(**sizes))
    whole = gradients(copy.deepcopy(model), PackedLayout(*LAYOUT), None, torch.float32)
    frozen = [n for n, _ in model.named_parameters() if "q_proj" in n or "layernorm" in n]
    frozen += [n for n, _ in model.named_parameters() if "down_proj" in n or "embed" in n]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    found = gradients(model, PackedLayout(*LAYOUT), None, torch.float32)
    expected = {name: value for name, value in whole.items() if name not in frozen}
    assert_near(found, expected, torch.float32)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("chosen", [None, [0, 6, 7, 9, 16]], ids=["all", "rows"])
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_query_biases_and_head_norms(
    backend: str,
    sizes: dict[str, Any],
    counted: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    chosen: list[int] | None,
    family: str,
) -> None:
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**sizes, model_type=family, head_dim=8))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape)
    layout, rows = PackedLayout(*LAYOUT), None if chosen is None else torch.tensor(chosen)
    with use_backend(backend):
        found = gradients(model, layout, rows, dtype)
        assert bool(counted) == (backend != "torch")
        monkeypatch.setattr(Block, "_is_plain", lambda self: False)
        expected = gradients(model, layout, rows, dtype)
    assert_near(found, expected, dtype)
    names = {"qwen2": "k_proj.bias", "qwen3": "k_norm.weight"}
    assert sum(name.endswith(names[family]) for name in found) == 2


@pytest.mark.parametrize("frozen", ["q_norm", "k_proj.bias", "_norm", "bias"])
def test_frozen_biases_and_head_norms_get_no_gradient(
    backend: str, sizes: dict[str, Any], frozen: str
) -> None:
    family = "qwen3" if "norm" in frozen else "qwen2"
    model = Transformer(ModelConfig(**sizes, model_type=family, head_dim=8))
    with use_backend(backend):
        whole = gradients(model, PackedLayout(*LAYOUT), None, torch.float32)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(frozen not in name)
        found = gradients(model, PackedLayout(*LAYOUT), None, torch.float32)
    expected = {name: value for name, value in whole.items() if frozen not in name}
    assert len(expected) < len(whole)
    assert_near(found, expected, torch.float32)


@pytest.mark.parametrize(
    "options", [{"attention_bias": True}, {"mlp_bias": True}], ids=["output bias", "MLP biases"]
)
def test_other_blocks_run_op_by_op(
    sizes: dict[str, Any], counted: list[Any], options: dict[str, Any]
) -> None:
    model = Transformer(ModelConfig(**sizes, **options))
    gradients(model, PackedLayout(*LAYOUT), None, torch.float32)
    assert not counted

"""Low-rank adapters (Hu et al., 2021) with PEFT's names."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from .layers import Linear
from .lora_config import LoraConfig


class LoRALinear(Linear):
    """x W^T + scaling * dropout(x) A^T B^T; W is frozen, B starts at zero."""

    def __init__(self, base: Linear, config: LoraConfig) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        place: dict[str, Any] = {"device": base.weight.device, "dtype": torch.float32}
        self.lora_A = Linear(base.in_features, config.r, bias=False, **place)
        self.lora_B = Linear(config.r, base.out_features, bias=False, **place)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=5**0.5)
        nn.init.zeros_(self.lora_B.weight)
        self.dropout = nn.Dropout(config.lora_dropout)
        self.scaling = config.scaling
        self.enabled = True

    def forward(self, x: Tensor) -> Tensor:
        if not self.enabled:
            return super().forward(x)
        return ops.lora_linear(
            x,
            self.weight,
            self.bias,
            self.lora_A.weight,
            self.lora_B.weight,
            self.scaling,
            self.dropout.p if self.training else 0.0,
        )


def add_lora(model: Any, config: LoraConfig) -> None:
    """Freeze `model` and put adapters on its projections, in place.

    A reward model's `score` head stays trainable: it is new, so no adapter can carry it.
    """
    model.requires_grad_(False)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Linear) and name in config.target_modules:
                setattr(parent, name, LoRALinear(child, config))
    if hasattr(model, "score"):
        model.score.weight.requires_grad_(True)
    model.lora_config = config


def adapters(model: nn.Module) -> list[LoRALinear]:
    """The adapted projections of a model."""
    return [module for module in model.modules() if isinstance(module, LoRALinear)]


@contextlib.contextmanager
def disable_lora(model: nn.Module) -> Iterator[None]:
    """The model without its adapters: the reference of a policy that trains adapters."""
    switched = [adapter for adapter in adapters(model) if adapter.enabled]
    for adapter in switched:
        adapter.enabled = False
    try:
        yield
    finally:
        for adapter in switched:
            adapter.enabled = True


@torch.no_grad()
def merge_lora(model: nn.Module) -> None:
    """Add the adapters into the weights in fp64, round once, and remove them, in place.

    fp32 would round a few weights in 100,000 the wrong way (MPS has nothing wider).
    """
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, LoRALinear):
                wide = torch.float32 if child.weight.device.type == "mps" else torch.float64
                update = child.lora_B.weight.to(wide) @ child.lora_A.weight.to(wide)
                merged = child.weight.to(wide) + child.scaling * update
                child.weight.copy_(merged.to(child.weight.dtype))
                setattr(parent, name, _plain(child))
    del model.lora_config


def _plain(adapter: LoRALinear) -> Linear:
    linear = Linear(adapter.in_features, adapter.out_features, bias=False, device="meta")
    linear.weight, linear.bias = adapter.weight, adapter.bias
    return linear

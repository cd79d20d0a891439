"""Small random models of each family, and the same models in `transformers`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastllm.model import ModelConfig, Transformer

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "qwen2": {"num_key_value_heads": 1},
    "qwen3": {"head_dim": 16},
    # A window that the prompts of these tests pass, and their completions slide over.
    "mistral": {"sliding_window": 6},
}


@pytest.fixture
def build() -> Callable[..., Transformer]:
    """`build(family, **config)`: a model whose every parameter is random, biases too."""
    return _build


@pytest.fixture
def to_transformers() -> Callable[[Transformer], Any]:
    """The same model as Hugging Face's class."""
    return _to_transformers


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def prompts() -> list[list[int]]:
    """Prompts of different lengths, one of a single token."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, 61, (n,), generator=generator).tolist() for n in (9, 1, 14, 4, 7)]


def _build(family: str = "llama", seed: int = 0, **overrides: Any) -> Transformer:
    settings: dict[str, Any] = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
    }
    config = ModelConfig(model_type=family, **{**settings, **FAMILIES[family], **overrides})
    generator = torch.Generator().manual_seed(seed)
    model = Transformer(config)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = torch.randn(parameter.shape, generator=generator)
            scale = 0.5 if parameter.dim() == 1 else 1.3 / parameter.shape[-1] ** 0.5
            centre = parameter if parameter.dim() == 1 else 0
            parameter.copy_(centre + spread * scale)
    return model


def _to_transformers(model: Transformer) -> Any:
    transformers = pytest.importorskip("transformers")
    raw = {key: value for key, value in model.config.to_dict().items() if key != "extra"}
    name = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "mistral": "Mistral"}
    prefix = name[model.config.model_type]
    config = getattr(transformers, f"{prefix}Config")(**raw)
    config._attn_implementation = "eager"
    theirs = getattr(transformers, f"{prefix}ForCausalLM")(config)
    theirs.load_state_dict(model.state_dict())
    return theirs.eval()

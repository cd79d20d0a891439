"""The model's configuration: its fields are the keys of Hugging Face's `config.json`."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass, field
from typing import Any

_log = logging.getLogger("fastllm")

# What a class name in `architectures` ends with.
LANGUAGE_MODEL, REWARD_MODEL = "ForCausalLM", "ForSequenceClassification"
# Class name prefix in `architectures`, and what sets the family's blocks apart.
FAMILIES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
# Kinds of rotary scaling, and the settings that each one needs.
ROPE_TYPES: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
}

LAYER_TYPES = ("full_attention", "sliding_attention")

# What transformers takes for a key that a `config.json` leaves out, where that is not our default.
_QWEN_DEFAULTS: dict[str, Any] = {
    "num_key_value_heads": 32,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
_FAMILY_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"bos_token_id": 1, "eos_token_id": 2},
    "mistral": {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    },
    "qwen2": _QWEN_DEFAULTS,
    "qwen3": _QWEN_DEFAULTS | {"head_dim": 128},
}

# Keys that name code to run or where a file came from: not written back.
_FOREIGN = ("architectures", "auto_map", "_name_or_path", "transformers_version")

# Keys that change the computation in a way this model does not have: (key, harmless values).
_UNSUPPORTED: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ("quantization_config", (None,)),
    ("partial_rotary_factor", (None, 1.0)),
    ("num_experts", (None, 0)),
    ("num_local_experts", (None, 0)),
)


@dataclass(kw_only=True)
class ModelConfig:
    """A Llama-type transformer: RMSNorm, rotary positions, grouped-query attention, SwiGLU."""

    vocab_size: int
    """Rows of the embedding table (V)."""
    hidden_size: int
    """Width of the residual stream (C)."""
    intermediate_size: int
    """Width of the feed-forward (F)."""
    num_hidden_layers: int
    num_attention_heads: int
    """Query heads (H)."""
    num_key_value_heads: int = None  # type: ignore[assignment]  # settled in __post_init__
    """Key/value heads (K); None for as many as query heads."""
    head_dim: int = None  # type: ignore[assignment]  # settled in __post_init__
    """Head size (D); None for hidden_size / num_attention_heads."""
    model_type: str = "llama"
    """llama, mistral, qwen2 (bias on q, k, v) or qwen3 (norms on q and k)."""
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    """None, or {"rope_type": "linear" | "llama3", ...} as in Hugging Face."""
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    sliding_window: int | None = None
    """Tokens that a layer of type "sliding_attention" sees, itself included."""
    layer_types: list[str] | None = None
    """"full_attention" or "sliding_attention" for each layer; None derives it."""
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    initializer_range: float = 0.02
    extra: dict[str, Any] = field(default_factory=dict)
    """Keys of a foreign `config.json` that say nothing about the computation; written back."""

    def __post_init__(self) -> None:
        if self.model_type not in FAMILIES:
            raise ValueError(
                f"model_type: expected one of {', '.join(FAMILIES)}; found {self.model_type!r}"
            )
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
            if self.head_dim * self.num_attention_heads != self.hidden_size:
                raise ValueError(
                    f"hidden_size {self.hidden_size} does not divide into "
                    f"{self.num_attention_heads} heads"
                )
        if self.head_dim % 2:
            raise ValueError(f"the head size must be even for rotary pairs, found {self.head_dim}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is no multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.rope_scaling and "rope_theta" in self.rope_scaling:
            raise ValueError("rope_theta is a field of its own, not a part of rope_scaling")
        if self.rope_type not in ROPE_TYPES:
            raise ValueError(
                f"rope_type: expected one of {', '.join(ROPE_TYPES)}; found {self.rope_type!r}"
            )
        for key in ROPE_TYPES[self.rope_type]:
            if not isinstance((self.rope_scaling or {}).get(key), int | float):
                raise ValueError(f"rope_type {self.rope_type!r} needs a number for {key!r}")
        if self.layer_types is None:
            kind = "sliding_attention" if self.model_type == "mistral" else "full_attention"
            self.layer_types = [kind] * self.num_hidden_layers
        if len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"layer_types: expected {self.num_hidden_layers} entries, "
                f"found {len(self.layer_types)}"
            )
        unknown = sorted(set(self.layer_types) - set(LAYER_TYPES))
        if unknown:
            raise ValueError(f"layer_types: {', '.join(unknown)} is not supported")

    @property
    def rope_type(self) -> str:
        return (self.rope_scaling or {}).get("rope_type", "default")

    @property
    def qkv_bias(self) -> bool:
        """Qwen2 always has a bias on q, k and v; the others follow `attention_bias`."""
        return self.attention_bias or self.model_type == "qwen2"

    @property
    def output_bias(self) -> bool:
        return self.attention_bias and self.model_type != "qwen2"

    @property
    def qk_norm(self) -> bool:
        return self.model_type == "qwen3"

    @property
    def eos_token_ids(self) -> list[int]:
        """All ids that end a sequence."""
        ids = self.eos_token_id
        return [] if ids is None else list(ids) if isinstance(ids, list) else [ids]

    def window(self, layer: int) -> int | None:
        """Sliding window of a layer, or None when it sees everything."""
        assert self.layer_types is not None
        return self.sliding_window if self.layer_types[layer] == "sliding_attention" else None

    @classmethod
    def scratch(
        cls,
        *,
        vocab_size: int,
        n_layer: int,
        n_head: int,
        n_kv_head: int,
        n_embd: int,
        block_size: int,
        **token_ids: int | None,
    ) -> ModelConfig:
        """A small Llama to train from nothing; the feed-forward is 8/3 of the width."""
        return cls(
            vocab_size=vocab_size,
            hidden_size=n_embd,
            intermediate_size=(8 * n_embd // 3 + 7) // 8 * 8,
            num_hidden_layers=n_layer,
            num_attention_heads=n_head,
            num_key_value_heads=n_kv_head,
            max_position_embeddings=block_size,
            tie_word_embeddings=False,
            **token_ids,  # type: ignore[arg-type]
        )

    @classmethod
    def from_dict(cls, raw: dict[str, Any], source: str = "config.json") -> ModelConfig:
        """Read a Hugging Face `config.json`, in the spelling of transformers 4 or 5.

        Raises:
            ValueError: a model that this package does not compute exactly.
        """
        raw = {key: value for key, value in raw.items() if key not in _FOREIGN}
        for key, harmless in _UNSUPPORTED:
            if raw.pop(key, None) not in harmless:
                raise ValueError(f"{source}: {key} is not supported")
        act = raw.pop("hidden_act", "silu")
        if act not in ("silu", "swish"):
            raise ValueError(f"{source}: hidden_act must be 'silu', found {act!r}")
        if raw.get("model_type") not in FAMILIES:
            raise ValueError(
                f"{source}: model_type must be one of {', '.join(FAMILIES)}, "
                f"found {raw.get('model_type')!r}"
            )
        if raw.get("attention_dropout"):
            _log.warning("%s: attention_dropout is ignored, there is no dropout here", source)
        raw = _FAMILY_DEFAULTS[raw["model_type"]] | raw
        _check_types(raw, source)
        _read_rope(raw, source)
        _read_windows(raw)
        names = {f.name for f in dataclasses.fields(cls)} - {"extra"}
        missing = _REQUIRED - raw.keys()
        if missing:
            raise ValueError(f"{source}: missing {', '.join(sorted(missing))}")
        known = {key: value for key, value in raw.items() if key in names}
        known["extra"] = {key: value for key, value in raw.items() if key not in names}
        try:
            return cls(**known)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """The content of `config.json`, with the rotary settings in both spellings."""
        raw = dataclasses.asdict(self)
        extra = raw.pop("extra")
        rope = {"rope_type": "default", **(self.rope_scaling or {}), "rope_theta": self.rope_theta}
        raw |= {"hidden_act": "silu", "rope_parameters": rope}
        if self.model_type.startswith("qwen"):
            raw["use_sliding_window"] = "sliding_attention" in (self.layer_types or [])
        else:  # in these families all layers are alike
            del raw["layer_types"]
        if self.model_type == "llama":
            del raw["sliding_window"]
        return extra | raw


_REQUIRED = {
    f.name
    for f in dataclasses.fields(ModelConfig)
    if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
}


def _check_types(raw: dict[str, Any], source: str) -> None:
    """Sizes are positive whole numbers, `rope_theta` and `rms_norm_eps` positive numbers."""
    sizes = (*sorted(_REQUIRED), "num_key_value_heads", "head_dim", "sliding_window")
    numbers = ("rope_theta", "rms_norm_eps")
    for key in raw.keys() & {*sizes, *numbers}:
        value: Any = raw[key]
        if value is None and key not in _REQUIRED:
            continue
        kinds = (int,) if key in sizes else (int, float)
        if not (type(value) in kinds and value > 0):
            kind = "whole number" if key in sizes else "number"
            raise ValueError(f"{source}: {key} must be a positive {kind}, found {value!r}")


def _read_rope(raw: dict[str, Any], source: str) -> None:
    """Fold `rope_parameters` (version 5) into `rope_theta` and `rope_scaling` (version 4)."""
    parameters = raw.pop("rope_parameters", None) or {}
    scaling = parameters or raw.get("rope_scaling") or {}
    if not isinstance(scaling, dict):
        raise ValueError(f"{source}: rotary settings must be an object, found {scaling!r}")
    scaling = dict(scaling)
    theta = scaling.pop("rope_theta", None)
    if theta is not None:
        raw["rope_theta"] = theta
    if raw.get("rope_theta") is None:
        raw.pop("rope_theta", None)
    if scaling.pop("partial_rotary_factor", None) not in (None, 1.0):
        raise ValueError(f"{source}: partial_rotary_factor is not supported")
    if "type" in scaling:  # the spelling before version 4.43
        scaling.setdefault("rope_type", scaling.pop("type"))
    if not isinstance(scaling.get("rope_type", ""), str):
        raise ValueError(f"{source}: rope_type must be text, found {scaling['rope_type']!r}")
    raw["rope_scaling"] = None if scaling.get("rope_type", "default") == "default" else scaling


def _read_windows(raw: dict[str, Any]) -> None:
    """Settle which layers slide: Qwen's switch and `max_window_layers` become `layer_types`."""
    switched_on = raw.pop("use_sliding_window", True)
    first_sliding = raw.pop("max_window_layers", 0)
    layers = raw.get("num_hidden_layers", 0)
    if raw["model_type"] == "llama" or not switched_on:
        raw["sliding_window"] = None
    if raw.get("sliding_window") is None:
        raw["layer_types"] = ["full_attention"] * layers
    elif raw["model_type"] == "mistral":
        raw["layer_types"] = ["sliding_attention"] * layers
    elif raw.get("layer_types") is None:
        raw["layer_types"] = [
            "sliding_attention" if layer >= first_sliding else "full_attention"
            for layer in range(layers)
        ]


# Keys that only say how a classifier's head is read: a language model does not inherit them.
_HEAD_KEYS = (
    "id2label",
    "label2id",
    "num_labels",
    "problem_type",
    "sbert_ce_default_activation_function",
)


def config_of(model: Any) -> dict[str, Any]:
    """The content of `config.json` for a model."""
    raw = {key: value for key, value in model.config.to_dict().items() if key not in _HEAD_KEYS}
    dtype = str(model.model.embed_tokens.weight.dtype).removeprefix("torch.")
    raw["architectures"] = [FAMILIES[model.config.model_type] + model.head_name]
    raw |= {"dtype": dtype, "torch_dtype": dtype}  # the spellings of transformers 5 and 4
    if model.head_name == REWARD_MODEL:
        raw |= {"num_labels": 1, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
        # vLLM puts scores through a sigmoid unless a model says otherwise.
        raw["sbert_ce_default_activation_function"] = "torch.nn.modules.linear.Identity"
    return raw

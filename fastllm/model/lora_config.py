"""Settings of low-rank adapters, in PEFT's names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

# Settings of PEFT that change the computation in a way we do not have: (key, harmless values).
_UNSUPPORTED: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ("peft_type", ("LORA",)),
    ("bias", (None, "none")),
    ("use_dora", (None, False)),
    ("lora_bias", (None, False)),
    ("fan_in_fan_out", (None, False)),
    ("rank_pattern", (None, {})),
    ("alpha_pattern", (None, {})),
    ("layers_to_transform", (None,)),
    ("exclude_modules", (None,)),
    ("layer_replication", (None,)),
    ("target_parameters", (None,)),
    ("trainable_token_indices", (None,)),
    ("megatron_config", (None,)),
    ("use_qalora", (None, False)),
    ("alora_invocation_tokens", (None,)),
    ("arrow_config", (None,)),
)
# Initialisations that leave the base model as it is; the others change it.
_HARMLESS_STARTS = (True, False, "gaussian", "orthogonal", "eva")


@dataclass(kw_only=True)
class LoraConfig:
    """Adapter settings; the fields are those of `peft.LoraConfig` that are supported."""

    r: int = 16
    """Rank."""
    lora_alpha: float = 32
    """The update is scaled by lora_alpha / r (by lora_alpha / sqrt(r) with `use_rslora`)."""
    lora_dropout: float = 0.0
    target_modules: Sequence[str] | str = ALL_LINEAR
    """Names of the projections to adapt, or "all-linear"."""
    use_rslora: bool = False

    def __post_init__(self) -> None:
        if self.target_modules == "all-linear":
            self.target_modules = ALL_LINEAR
        unknown = sorted(set(self.target_modules) - set(ALL_LINEAR))
        if isinstance(self.target_modules, str) or unknown:
            raise ValueError(
                f"target_modules: expected names among {', '.join(ALL_LINEAR)} or 'all-linear'; "
                f"found {self.target_modules if not unknown else ', '.join(unknown)}"
            )
        if self.r < 1:
            raise ValueError(f"r must be at least 1, found {self.r}")

    @property
    def scaling(self) -> float:
        return self.lora_alpha / (self.r**0.5 if self.use_rslora else self.r)

    @classmethod
    def from_dict(cls, raw: dict[str, Any], source: str) -> LoraConfig:
        """Read the content of an `adapter_config.json`.

        Raises:
            ValueError: a setting that is not supported, with `source` in front.
        """
        for key, harmless in _UNSUPPORTED:
            if raw.get(key) not in harmless:
                raise ValueError(f"{source}: {key} {raw.get(key)!r} is not supported")
        # PEFT names the head of every classifier there, whether the model has one or not.
        foreign = set(raw.get("modules_to_save") or ()) - {"score", "classifier"}
        if foreign:
            raise ValueError(f"{source}: modules_to_save {sorted(foreign)} is not supported")
        start = raw.get("init_lora_weights", True)
        if start not in _HARMLESS_STARTS:
            raise ValueError(f"{source}: init_lora_weights {start!r} is not supported")
        if not isinstance(raw.get("r"), int) or not isinstance(raw.get("lora_alpha"), int | float):
            raise ValueError(f"{source}: expected numbers for r and lora_alpha")
        try:
            return cls(
                r=raw["r"],
                lora_alpha=raw["lora_alpha"],
                lora_dropout=raw.get("lora_dropout") or 0.0,
                target_modules=_targets(raw.get("target_modules")),
                use_rslora=bool(raw.get("use_rslora")),
            )
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error

    @classmethod
    def from_peft(cls, config: Any) -> LoraConfig:
        """Our settings from a `peft.LoraConfig`.

        Raises:
            ValueError: a setting that is not supported.
        """
        if isinstance(config, cls):
            return config
        raw = dict(config.to_dict())
        raw["target_modules"] = raw["target_modules"] or ["q_proj", "v_proj"]  # as PEFT for Llama
        return cls.from_dict(raw, "peft_config")


def _targets(value: Any) -> list[str] | str:
    if value == "all-linear":
        return str(value)
    if isinstance(value, list | set | tuple) and value:
        return sorted(value)
    raise ValueError(f"target_modules: expected a list of names or 'all-linear', found {value!r}")

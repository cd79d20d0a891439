"""Adapters on disk, in PEFT's format."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import safe_open
from torch import Tensor, nn

from . import tensors
from .config import config_of
from .files import read_json_object, write_json
from .lora import LoraConfig, add_lora

if TYPE_CHECKING:
    from .reward import RewardModel
    from .transformer import Transformer

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
MODEL_CONFIG = "model_config.json"
HEAD = "score.weight"
_PREFIX = "base_model.model."


def is_adapter_name(name: str) -> bool:
    """Whether a parameter belongs to an adapter and not to the base model."""
    return ".lora_A." in name or ".lora_B." in name


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter."""
    return (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file()


def carries_head(folder: Path) -> bool:
    """Whether an adapter brings a score head with it."""
    with safe_open(str(folder / WEIGHTS), framework="pt") as file:
        return _PREFIX + HEAD in file.keys()  # noqa: SIM118


def base_of(folder: Path) -> Path:
    """Where an adapter's base model is: an absolute path, or one from here or from `folder`.

    Raises:
        ValueError: it is not there. Nothing is downloaded.
    """
    name = read_json_object(folder / CONFIG).get("base_model_name_or_path")
    places = [Path(name), folder / name] if isinstance(name, str) and name else []
    for place in places:
        if place.exists():
            return place
    raise ValueError(
        f"{folder / CONFIG}: its base model {name!r} is not on this machine; "
        "download it and say where it is"
    )


def save_adapter(
    model: Transformer | RewardModel, folder: str | Path, base_path: str | Path
) -> None:
    """Write a model's adapters; a reward model's score head goes with them.

    Beside PEFT's two files lies the model's configuration, for the ids of its special tokens: a
    base model often has no pad token, and a reward model is read by it. It is not called
    config.json, because transformers would then look for a whole model in the folder.

    Raises:
        ValueError: a model without adapters, or a folder that holds a whole model, which would be
            found before the adapter.
    """
    folder = Path(folder)
    if not hasattr(model, "lora_config"):
        raise ValueError("save_adapter: the model has no adapters")
    if (folder / tensors.WEIGHTS).exists() or (folder / tensors.INDEX).exists():
        raise ValueError(f"{folder}: expected a folder without a whole model for the adapter")
    folder.mkdir(parents=True, exist_ok=True)
    base = str(Path(base_path).absolute()) if Path(base_path).exists() else str(base_path)
    state = {_PREFIX + name: t for name, t in adapter_state(model).items()}
    tensors.write_file(folder / WEIGHTS, state)
    write_json(folder / MODEL_CONFIG, config_of(model))
    write_json(
        folder / CONFIG,
        _peft_config(cast(LoraConfig, model.lora_config), base, is_reward=_is_reward(model)),
    )


def load_adapter(model: nn.Module, folder: str | Path) -> None:
    """Put the adapter in a folder on its base model, in place; it is not merged.

    Raises:
        ValueError: settings that are not supported, or tensors that do not fit the model.
    """
    folder = Path(folder)
    raw = read_json_object(folder / CONFIG)
    add_lora(model, LoraConfig.from_dict(raw, str(folder / CONFIG)))
    stored = tensors.read_file(folder / WEIGHTS)
    state = {name.removeprefix(_PREFIX): tensor for name, tensor in stored.items()}
    expected = adapter_state(model)
    if _is_reward(model) and HEAD not in state:
        del expected[HEAD]  # the base is a reward model and keeps its head
    _check(state, expected, folder / WEIGHTS)
    with torch.no_grad():
        for name, target in expected.items():
            target.copy_(state[name])


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """The adapter's tensors and a reward model's head, by name; they share the model's memory."""
    kept = {HEAD} if _is_reward(model) else set()
    return {k: t for k, t in model.state_dict().items() if is_adapter_name(k) or k in kept}


def _is_reward(model: nn.Module) -> bool:
    return hasattr(model, "score")


def _peft_config(config: LoraConfig, base: str, is_reward: bool) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if is_reward else "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "target_modules": list(config.target_modules),
        "use_rslora": config.use_rslora,
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": ["score"] if is_reward else None,
        "inference_mode": True,
    }


def _check(state: dict[str, Tensor], expected: dict[str, Tensor], source: Path) -> None:
    for what, names in (
        ("misses", expected.keys() - state.keys()),
        ("has unexpected", state.keys() - expected.keys()),
    ):
        if names:
            raise ValueError(f"{source}: the adapter {what} {', '.join(sorted(names)[:5])}")
    for name, target in expected.items():
        if state[name].shape != target.shape:
            raise ValueError(
                f"{source}: {name}: expected shape {list(target.shape)}, "
                f"found {list(state[name].shape)}"
            )

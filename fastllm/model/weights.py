"""Models on disk: Hugging Face folders, `.pt` files and adapters, read and written."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from . import adapters, pt_file, tensors
from .config import FAMILIES, LANGUAGE_MODEL, REWARD_MODEL, ModelConfig, config_of
from .files import read_json_object, write_json
from .lora import merge_lora

if TYPE_CHECKING:
    from .reward import RewardModel
    from .transformer import Transformer

_log = logging.getLogger("fastllm")

Model = TypeVar("Model", "Transformer", "RewardModel")

MAX_SHARD_SIZE = 5 * 10**9
CONFIG = "config.json"
PT_FILES = ("model_final.pt", "model_last.pt")

_KINDS = {LANGUAGE_MODEL: "language model", REWARD_MODEL: "reward model"}
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def resolve(path: str | Path) -> Path:
    """Find the model at a path: the folder that holds its files, or a `.pt` file.

    A path is a run folder, a `checkpoint-N` folder, a `.pt` file or a Hugging Face folder. A run
    folder with Hugging Face files and `.pt` files stands for the former.

    Raises:
        ValueError: there is no model, with what was found instead.
    """
    path = Path(path)
    if path.is_file() and path.suffix == ".pt":
        return path
    if path.is_dir():
        if _has_weights(path) or adapters.is_adapter(path):
            return path
        for name in PT_FILES:
            if (path / name).is_file():
                return path / name
    raise ValueError(
        f"{path}: expected a run folder, a checkpoint-N folder, a .pt file or a Hugging Face "
        f"folder ({CONFIG} and {tensors.WEIGHTS}); found {_describe(path)}"
    )


def load_model(
    path: str | Path,
    cls: type[Model],
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
    new_head: bool = False,
    base: str | Path | None = None,
) -> Model:
    """Load a model, in evaluation mode. No code from the folder is run.

    Args:
        path: what `resolve` takes. An adapter is put on its base model and not merged.
        cls: Transformer or RewardModel.
        dtype: of the weights; None or "auto" for the stored one (the widest, where they differ).
        device: where the weights go.
        new_head: let a RewardModel start from a language model: the vocabulary head is left out
            and a score head is drawn from torch's default generator.
        base: where an adapter's base model is, instead of where the adapter says.

    Raises:
        ValueError: no model there, the other kind of model, tensors that are missing, unexpected
            or of another shape, or a model that this package does not compute exactly.
    """
    place = resolve(path)
    if place.is_dir() and not _has_weights(place):
        return _load_adapted(place, cls, dtype, device, new_head, base)
    if place.is_dir():
        raw, weights = read_json_object(place / CONFIG), tensors.read_weights(place)
        kind = _kind_of(raw, weights, f"{place / CONFIG}")
    else:
        raw, weights, kind = pt_file.load(place)
    _check_kind(kind, cls, new_head, place)
    config = ModelConfig.from_dict(raw, str(place / CONFIG if place.is_dir() else place))
    if cls.head_name == REWARD_MODEL and kind == _KINDS[LANGUAGE_MODEL]:
        weights.pop("lm_head.weight", None)
        weights["score.weight"] = _new_head(config)
    return _build(cls, config, weights, dtype, device, place).eval()


def save_model(
    model: Transformer | RewardModel, folder: str | Path, max_shard_size: int = MAX_SHARD_SIZE
) -> None:
    """Write a Hugging Face folder: config.json, the weights and, for a language model,
    generation_config.json. Adapters are not in it: `merge_lora` first, or `save_adapter`."""
    folder = Path(folder)
    if hasattr(model, "lora_config"):
        _log.warning("%s: only the base model's weights go there, not the adapter", folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors.write_weights(folder, plain_state(model), max_shard_size)
    write_json(folder / CONFIG, config_of(model))
    if model.head_name == LANGUAGE_MODEL:
        write_json(folder / "generation_config.json", _generation_config(model.config))


def save_pt(
    model: Transformer | RewardModel, path: str | Path, tokenizer_json: str | None = None
) -> None:
    """Write config, weights and tokenizer as one `.pt` file, for `weights_only=True`."""
    pt_file.save(
        Path(path), _KINDS[model.head_name], config_of(model), plain_state(model), tokenizer_json
    )


def plain_state(model: Transformer | RewardModel) -> dict[str, Tensor]:
    """The state dict as it goes to disk: no adapters, and a tied head once."""
    state = {
        name: t for name, t in model.state_dict().items() if not adapters.is_adapter_name(name)
    }
    if model.head_name == LANGUAGE_MODEL and model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    return state


def tokenizer_in(path: str | Path) -> str | None:
    """The tokenizer that a `.pt` file carries, as `save_pt` was given it."""
    return pt_file.tokenizer(Path(path))


def _load_adapted(
    folder: Path,
    cls: type[Model],
    dtype: torch.dtype | str | None,
    device: torch.device | str,
    new_head: bool,
    base: str | Path | None,
) -> Model:
    # A reward adapter brings its head along, so its base may be a language model.
    brings_head = cls.head_name == REWARD_MODEL and adapters.carries_head(folder)
    place = adapters.base_of(folder) if base is None else Path(base)
    model = load_model(place, cls, dtype, device, new_head or brings_head)
    if hasattr(model, "lora_config"):
        merge_lora(model)
    adapters.load_adapter(model, folder)
    if (folder / adapters.MODEL_CONFIG).is_file():  # the base may have no pad token
        own = read_json_object(folder / adapters.MODEL_CONFIG)
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(model.config, key, own.get(key))
    return model.eval()


class _Uninitialised(TorchFunctionMode):
    """Leaves new parameters as they are. (On "meta", initialising one that has no memory would
    import PyTorch's compiler: two seconds and 110 MB.)"""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


def _build(
    cls: type[Model],
    config: ModelConfig,
    weights: dict[str, Tensor],
    dtype: torch.dtype | str | None,
    device: torch.device | str,
    source: Path,
) -> Model:
    with torch.device("meta"), _Uninitialised():  # no memory, and no numbers to be overwritten
        model = cls(config)
    weights = {k: t for k, t in weights.items() if not k.endswith("rotary_emb.inv_freq")}
    shapes = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    is_tied = cls.head_name == LANGUAGE_MODEL and config.tie_word_embeddings
    if is_tied:
        _tie(weights, source)
    _check_tensors(weights, shapes, source)
    wanted = _dtype(dtype, weights, source)
    placed = {name: t.to(device=device, dtype=wanted) for name, t in weights.items()}
    model.load_state_dict(placed, strict=True, assign=True)
    if is_tied:
        model.tie_weights()  # type: ignore[operator]
    return model


def _new_head(config: ModelConfig) -> Tensor:
    return torch.empty(1, config.hidden_size).normal_(std=config.initializer_range)


def _tie(weights: dict[str, Tensor], source: Path) -> None:
    """Put the embedding table in the place of the head, which the file may leave out."""
    table, head = weights.get("model.embed_tokens.weight"), weights.get("lm_head.weight")
    if table is None:
        return
    if head is not None and not torch.equal(head, table):
        raise ValueError(
            f"{source}: tie_word_embeddings is true, but lm_head.weight is not the embedding table"
        )
    weights["lm_head.weight"] = table


def _check_tensors(
    weights: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], source: Path
) -> None:
    """Exactly the model's tensors, in its shapes."""
    for what, names in (
        ("misses", shapes.keys() - weights.keys()),
        ("has unexpected", weights.keys() - shapes.keys()),
    ):
        if names:
            raise ValueError(f"{source}: the checkpoint {what} {_listing(sorted(names))}")
    for name, shape in shapes.items():
        if tuple(weights[name].shape) != shape:
            raise ValueError(
                f"{source}: {name}: expected shape {list(shape)}, found {list(weights[name].shape)}"
            )


def _dtype(
    dtype: torch.dtype | str | None, weights: Mapping[str, Tensor], source: Path
) -> torch.dtype:
    for name, tensor in weights.items():
        if tensor.dtype not in _FLOATS:
            raise ValueError(f"{source}: {name} is {tensor.dtype}, expected a plain float dtype")
    if dtype is None or dtype == "auto":
        widest = torch.float16 if not weights else next(iter(weights.values())).dtype
        for tensor in weights.values():
            widest = torch.promote_types(widest, tensor.dtype)
        return widest
    named = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if named not in _FLOATS:
        raise ValueError(f"dtype: expected 'auto' or a float dtype of torch, found {dtype!r}")
    return named


def _kind_of(raw: Mapping[str, Any], weights: Mapping[str, Tensor], source: str) -> str:
    """Which model a folder holds: what config.json says, else what its tensors say."""
    labels = len(raw["id2label"]) if raw.get("id2label") else raw.get("num_labels")
    named = (raw.get("architectures") or [None])[0]
    if named is None:
        return _KINDS[REWARD_MODEL if "score.weight" in weights else LANGUAGE_MODEL]
    family = FAMILIES.get(raw.get("model_type", ""), "<Family>")
    known = {family + head: kind for head, kind in _KINDS.items()}
    if family == "<Family>":
        ModelConfig.from_dict(dict(raw), source)  # names the model types there are
    if named not in known:
        raise ValueError(f"{source}: architectures must name {' or '.join(known)}, found {named!r}")
    if known[named] == _KINDS[REWARD_MODEL] and labels not in (None, 1):
        raise ValueError(f"{source}: a reward model has num_labels 1, found {labels}")
    return known[named]


def _check_kind(
    kind: str, cls: type[Transformer] | type[RewardModel], new_head: bool, source: Path
) -> None:
    wanted = _KINDS[cls.head_name]
    if kind == wanted or (new_head and cls.head_name == REWARD_MODEL):
        return
    hint = ""
    if cls.head_name == REWARD_MODEL:
        hint = "; train one with `fastllm rm`, or pass new_head=True for an untrained score head"
    raise ValueError(f"{source}: expected a {wanted}, found a {kind}{hint}")


def _generation_config(config: ModelConfig) -> dict[str, Any]:
    ids = {key: getattr(config, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return {"_from_model_config": True} | {k: v for k, v in ids.items() if v is not None}


def _has_weights(folder: Path) -> bool:
    stored = (folder / tensors.WEIGHTS).is_file() or (folder / tensors.INDEX).is_file()
    return stored and (folder / CONFIG).is_file()


def _describe(path: Path) -> str:
    if path.is_file():
        return "a file of another kind"
    if not path.exists():
        return "nothing there"
    names = sorted(entry.name for entry in path.iterdir())
    if any(name.startswith("pytorch_model") for name in names):
        return "pytorch_model*.bin, which is a pickle and not read: save it as safetensors first"
    checkpoints = [name for name in names if name.startswith("checkpoint-")]
    if checkpoints:
        newest = max(checkpoints, key=lambda name: (len(name), name))
        return f"an unfinished run: name one of its checkpoints, for example {path / newest}"
    return _listing(names) if names else "an empty folder"


def _listing(names: list[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def from_transformers(model: Any, cls: type[Model]) -> Model:
    """Our model with the weights of a `transformers` model; the tensors are shared.

    Raises:
        ValueError: something that is no transformers model, or one that this package does not
            compute exactly.
    """
    if not hasattr(model, "config") or not hasattr(model.config, "to_dict"):
        raise ValueError(
            f"model: expected a path, a {cls.__name__}, a ModelConfig or a transformers model; "
            f"found {type(model).__name__}"
        )
    source = type(model).__name__
    config = ModelConfig.from_dict(model.config.to_dict(), source)
    return _build(cls, config, dict(model.state_dict()), None, "cpu", Path(source))

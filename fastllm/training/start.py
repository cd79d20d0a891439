"""What the `train_*` functions share: where a run starts from, and its `.pt` files."""

from __future__ import annotations

import copy
import difflib
import shutil
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..data.tokenizer import Tokenizer, choose_tokenizer
from ..model import weights
from ..model.config import ModelConfig
from ..model.lora import merge_lora
from . import distributed
from .config import TrainingConfig


@dataclass(frozen=True)
class Sizes:
    """A model to build from nothing, in the names of the `train_*` functions."""

    n_layer: int = 4
    n_head: int = 4
    n_kv_head: int = 2
    n_embd: int = 128
    block_size: int = 256
    vocab_size: int | None = None
    """Of the tokenizer to train; the model takes the tokenizer's size."""


def starting_point(
    model: str | Path | None,
    tokenizer: Any,
    texts: Callable[[], Iterable[str]],
    sizes: Sizes,
) -> tuple[str | Path | ModelConfig, Tokenizer]:
    """The model to start from and its tokenizer.

    Args:
        model: folder or `.pt` file, or None for a new model of `sizes`.
        tokenizer: see `choose_tokenizer`; None chooses.
        texts: the user's texts, read only if a tokenizer may be trained on them.
        sizes: of a new model.
    """
    if model is not None:
        own = tokenizer_of(model) if tokenizer is None else choose_tokenizer(tokenizer)
        return model, own
    new = choose_tokenizer(tokenizer, texts=texts(), vocab_size=sizes.vocab_size)
    config = ModelConfig.scratch(
        vocab_size=new.vocab_size,
        n_layer=sizes.n_layer,
        n_head=sizes.n_head,
        n_kv_head=sizes.n_kv_head,
        n_embd=sizes.n_embd,
        block_size=sizes.block_size,
        bos_token_id=new.bos_token_id,
        eos_token_id=new.eos_token_id,
        pad_token_id=new.pad_token_id,
    )
    return config, new


def tokenizer_of(path: str | Path) -> Tokenizer:
    """The tokenizer that belongs to a model: in its folder, its `.pt` file or its adapter's base.

    Raises:
        ValueError: the model comes without one.
    """
    place = weights.resolve(path)
    if place.is_dir():
        return Tokenizer.from_pretrained(place)
    content = weights.tokenizer_in(place)
    if content is None:
        raise ValueError(f"{place} carries no tokenizer: say which one it was trained with")
    return Tokenizer.from_json(content)


def as_tokenizer(given: Any, model_path: str | Path | None) -> Tokenizer:
    """A trainer's `processing_class`: ours, a path, or a tokenizer of transformers.

    None takes the model's own.
    """
    if given is None and model_path is None:
        raise ValueError("processing_class: a model without a folder needs a tokenizer")
    if given is None:
        return tokenizer_of(model_path)  # type: ignore[arg-type]
    if isinstance(given, Tokenizer):
        return given
    if isinstance(given, str | Path):
        return choose_tokenizer(given)
    with tempfile.TemporaryDirectory() as folder:
        given.save_pretrained(folder)
        return Tokenizer.from_pretrained(folder)


def config_from(
    cls: type[TrainingConfig],
    out_dir: str | Path,
    *,
    steps: int | None,
    batch_size: int | None,
    lr: float | None,
    save_every: int | None,
    **fields_given: Any,
) -> Any:
    """The trainer's config from the short names of a `train_*` function and its own fields.

    Raises:
        TypeError: a field that the config does not have, with the nearest that it has.
    """
    short = {
        "max_steps": steps,
        "per_device_train_batch_size": batch_size,
        "learning_rate": lr,
        "save_steps": save_every,
    }
    given = {name: value for name, value in short.items() if value is not None} | fields_given
    check_fields(cls, given)
    return cls(output_dir=str(out_dir), **given)


def check_fields(cls: type[TrainingConfig], given: Iterable[str]) -> None:
    """Refuse names that `cls` does not have, naming the nearest one."""
    known = [f.name for f in fields(cls)]
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise TypeError(f"{cls.__name__} has no field {name!r}{hint}")


def finish(trainer: Any, model: str | Path | None) -> None:
    """Write `model_final.pt` and `model_last.pt` for models that were built from scratch,
    here or in the run that this one started from.

    One content under both names: scripts in the field ask for either. An adapter is merged into
    it: a `.pt` file holds one whole model.
    """
    if not distributed.is_main() or not (trainer.from_scratch or _has_pt(model)):
        return
    first, second = (Path(trainer.args.output_dir) / name for name in weights.PT_FILES)
    whole = trainer.model
    if hasattr(whole, "lora_config"):
        whole = copy.deepcopy(whole)
        merge_lora(whole)
    weights.save_pt(whole, first, trainer.processing_class.to_json())
    shutil.copyfile(first, second)


def _has_pt(model: str | Path | None) -> bool:
    if model is None:
        return False
    place = weights.resolve(model)
    return place.is_file() or any((place / name).is_file() for name in weights.PT_FILES)

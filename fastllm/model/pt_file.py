"""A whole model as one `.pt` file of plain tensors, text and numbers."""

from __future__ import annotations

import zipfile
from pathlib import Path
from pickle import UnpicklingError  # what torch raises for a file that holds more than tensors
from typing import Any

import torch
from torch import Tensor

from .files import replacing

FORMAT = 1
_KINDS = {"language model": "transformer", "reward model": "reward"}


def save(
    path: Path, kind: str, config: dict[str, Any], state: dict[str, Tensor], tokenizer: str | None
) -> None:
    """Write {format, kind, config, model, tokenizer}."""
    path.parent.mkdir(parents=True, exist_ok=True)
    plain = {name: tensor.detach().cpu().clone() for name, tensor in state.items()}
    content = {
        "format": FORMAT,
        "kind": _KINDS[kind],
        "config": config,
        "model": plain,
        "tokenizer": tokenizer,
    }
    with replacing(path) as beside:
        torch.save(content, beside)


def load(path: Path) -> tuple[dict[str, Any], dict[str, Tensor], str]:
    """Read config, tensors and the kind of model. Nothing in the file is run.

    Raises:
        ValueError: a file that `save` did not write, or a damaged one.
    """
    content = _read(path)
    kinds = {stored: kind for kind, stored in _KINDS.items()}
    return content["config"], content["model"], kinds[content["kind"]]


def tokenizer(path: Path) -> str | None:
    """The tokenizer in the file, as `save` was given it."""
    return _read(path)["tokenizer"]


def _read(path: Path) -> dict[str, Any]:
    expected = f"{path}: expected a model file of fastllm (a dict with format {FORMAT})"
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{expected}, found no or only half a zip archive")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{expected}, found something that torch does not read: {reason}"
        ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        keys = sorted(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{expected}, found {keys!s:.200}")
    wrong = [name for name, fits in _CONTENT.items() if not fits(content.get(name))]
    if wrong:
        raise ValueError(f"{expected}, found no valid {', '.join(wrong)} in it")
    return content


def _is_state(value: object) -> bool:
    return isinstance(value, dict) and all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in value.items()
    )


_CONTENT = {
    "kind": lambda value: value in _KINDS.values(),
    "config": lambda value: isinstance(value, dict),
    "model": _is_state,
    "tokenizer": lambda value: value is None or isinstance(value, str),
}

"""Files that are either the old ones or the new ones, whatever happens while they are written."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: Path, durable: bool = True) -> Iterator[Path]:
    """A path beside `path` to write to; it takes the place of `path` once it is on the disk.

    The file gets the permissions that the umask gives to any new file, which safetensors' own
    writer does not do. On an error the old file stays and the new one goes. Without `durable`
    nothing waits for the disk, which is then the caller's business.
    """
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        yield beside
        os.chmod(beside, 0o666 & ~_umask())
        if durable:
            sync(beside)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    if durable:
        sync(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON."""
    with replacing(path) as beside:
        beside.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ValueError: something else is in the file.
        OSError: it cannot be read.
    """
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def sync(path: Path) -> None:
    """Have a file's or a folder's content on the disk before going on."""
    if path.is_dir() and os.name == "nt":  # Windows opens no folders, and needs no such call
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask

"""The seal of a checkpoint: every file in it, with its size and checksum."""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

from ..model.files import read_json_object, sync, write_json

MANIFEST = "manifest.json"
SCHEMA = 1
_BLOCK = 1 << 20


class CheckpointError(ValueError):
    """A checkpoint that is not as it was written."""


def write_manifest(folder: Path, step: int, world_size: int) -> None:
    """Bring every file of `folder` to the disk and write its manifest.

    The checksum is BLAKE2b of 128 bits: from the standard library, and fast on any CPU.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        sums = list(pool.map(_seal, files))
    content: dict[str, Any] = {
        "schema": SCHEMA,
        "step": step,
        "world_size": world_size,
        "files": [
            {
                "name": path.relative_to(folder).as_posix(),
                "bytes": path.stat().st_size,
                "blake2b": s,
            }
            for path, s in zip(files, sums, strict=True)
        ],
    }
    write_json(folder / MANIFEST, content | {"blake2b": _sum_of_json(content)})


def verify(folder: Path) -> None:
    """Compare every file of a checkpoint with the manifest.

    Raises:
        CheckpointError: with the file and what is wrong with it.
    """
    entries = _entries(folder)
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        wrong = list(pool.map(lambda entry: _fault(folder, entry, read=True), entries))
    _raise_first(folder, wrong)


def looks_whole(folder: Path) -> bool:
    """Whether the manifest is there and every file has its size; reads no tensors."""
    try:
        _raise_first(folder, [_fault(folder, entry, read=False) for entry in _entries(folder)])
    except CheckpointError:
        return False
    return True


def total_bytes(folder: Path) -> int:
    """Size of a checkpoint's files together."""
    return sum(entry["bytes"] for entry in _entries(folder))


def _seal(path: Path) -> str:
    sync(path)
    return _checksum(path)


def _checksum(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb", buffering=0) as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _sum_of_json(content: dict[str, Any]) -> str:
    canonical = json.dumps(content, sort_keys=True).encode()
    return hashlib.blake2b(canonical, digest_size=16).hexdigest()


def _entries(folder: Path) -> list[dict[str, Any]]:
    path = folder / MANIFEST
    if not path.is_file():
        raise CheckpointError(f"{folder}: no {MANIFEST}, so it was never finished")
    try:
        content = read_json_object(path)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    if content.pop("blake2b", None) != _sum_of_json(content):
        raise CheckpointError(f"{path}: damaged, its checksum does not fit")
    if content["schema"] != SCHEMA:
        raise CheckpointError(f"{path}: schema {content['schema']}, expected {SCHEMA}")
    if folder.name != f"checkpoint-{content['step']}" and not folder.name.startswith(".tmp-"):
        raise CheckpointError(f"{path}: it is the manifest of step {content['step']}")
    for entry in content["files"]:
        name = PurePosixPath(entry["name"])
        if name.is_absolute() or ".." in name.parts:
            raise CheckpointError(f"{path}: a file outside of the checkpoint: {entry['name']!r}")
    return content["files"]


def _fault(folder: Path, entry: dict[str, Any], read: bool) -> str | None:
    path = folder / entry["name"]
    if not path.is_file():
        return f"{entry['name']} is missing"
    size = path.stat().st_size
    if size != entry["bytes"]:
        return f"{entry['name']} has {size:,} bytes, expected {entry['bytes']:,}"
    if read and _checksum(path) != entry["blake2b"]:
        return f"{entry['name']} is damaged, its checksum does not fit"
    return None


def _raise_first(folder: Path, faults: list[str | None]) -> None:
    for fault in faults:
        if fault is not None:
            raise CheckpointError(f"{folder}: {fault}")

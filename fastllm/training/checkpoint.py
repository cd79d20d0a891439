"""Checkpoints that survive a kill, a full disk and a flipped bit.

`checkpoint-N/` is a model folder as Hugging Face knows it, and what resuming needs beside it:

    config.json, model.safetensors, ...   whatever the trainer's `write_model` writes
    training/shared.{safetensors,json}    optimizer and trainer state, the same for all ranks
    training/rank-R.{safetensors,json}    what each rank has for itself, its random state
    manifest.json                         every file with its size and checksum

It is written to `.tmp-N-<id>/`, brought to the disk file by file, sealed with the manifest, and
only then renamed; older checkpoints go after that. So a folder called `checkpoint-N` is complete,
and a reader still checks it. There is no pickle in it: tensors are in safetensors, the rest JSON.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from ..model import tensors as tensor_files
from ..model.files import read_json_object, sync, write_json
from . import distributed
from .manifest import CheckpointError, looks_whole, total_bytes, verify, write_manifest

__all__ = [
    "CheckpointError",
    "check_world_size",
    "checkpoint_step",
    "checkpoints",
    "clean_stale",
    "latest_checkpoint",
    "load_checkpoint",
    "save_checkpoint",
    "verify",
]

_log = logging.getLogger("fastllm")
_NAME = re.compile(r"checkpoint-(\d+)")
_PARTS = "training"

Tensors = dict[str, Tensor]
State = dict[str, Any]


def save_checkpoint(
    run_dir: str | Path,
    step: int,
    write_model: Callable[[Path], None],
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
    *,
    rank_tensors: Mapping[str, Tensor] | None = None,
    rank_state: Mapping[str, Any] | None = None,
    save_total_limit: int | None = None,
    keep: Collection[int] = (),
) -> Path:
    """Write and commit `checkpoint-<step>`; every rank calls this together.

    A committed checkpoint is never overwritten: the same step again keeps the old folder, unless
    that one is damaged.

    Args:
        run_dir: the run folder.
        step: optimizer steps done.
        write_model: writes the model's files into the folder it is given; called on rank 0.
        tensors: optimizer state and the like, the same on all ranks; rank 0's is written.
        state: JSON values, the same on all ranks.
        rank_tensors: tensors that each rank has for itself.
        rank_state: JSON values that each rank has for itself.
        save_total_limit: whole checkpoints to keep, counted back from this one; None for all.
            Damaged ones do not count, and later steps than this one are left alone.
        keep: steps that stay whatever the limit.

    Raises:
        OSError: among others for a full disk, with the bytes needed and free. What had been
            written is removed and the checkpoints before it are as they were.
    """
    final = Path(run_dir) / f"checkpoint-{step}"
    if _agreed(int(distributed.is_main() and _is_whole(final))):
        _log.warning("%s is there already and is kept", final)
        return final
    with _staging(final, _bytes_needed(final.parent, tensors)) as staging:
        with _together():
            if distributed.is_main():
                write_model(staging)
                _write_part(staging, "shared", tensors, state)
            if rank_tensors or rank_state:
                name = f"rank-{distributed.rank()}"
                _write_part(staging, name, rank_tensors or {}, rank_state or {})
        with _together():
            if distributed.is_main():
                write_manifest(staging, step, distributed.world_size())
                _commit(staging, final)
    if distributed.is_main() and save_total_limit is not None:
        _prune(final.parent, step, max(1, save_total_limit), keep)
    distributed.barrier()
    return final


def checkpoints(run_dir: str | Path) -> list[Path]:
    """The run's `checkpoint-N` folders, by falling step, whole or not."""
    folders = [path for path in Path(run_dir).glob("checkpoint-*") if path.is_dir()]
    named = [path for path in folders if _NAME.fullmatch(path.name)]
    return sorted(named, key=checkpoint_step, reverse=True)


def checkpoint_step(path: Path) -> int:
    """The N of `checkpoint-N`."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise ValueError(f"{path}: expected a folder called checkpoint-N")
    return int(match[1])


def latest_checkpoint(run_dir: str | Path) -> Path | None:
    """The newest checkpoint whose every byte is as it was written; None where there is none.

    Raises:
        CheckpointError: there are checkpoints, and all of them are damaged.
    """
    found = checkpoints(run_dir)
    for path in found:
        try:
            verify(path)
        except CheckpointError as error:
            _log.warning("checkpoint rejected: %s", error)
        else:
            return path
    if found:
        names = ", ".join(path.name for path in found)
        raise CheckpointError(f"{run_dir}: no checkpoint is whole ({names}); nothing to resume")
    return None


def load_checkpoint(path: str | Path, check: bool = True) -> tuple[Tensors, State]:
    """Read the tensors and the state of a checkpoint: the shared ones and this rank's own.

    Args:
        path: a `checkpoint-N` folder.
        check: verify every checksum; False where `latest_checkpoint` has just done it.

    Raises:
        CheckpointError: a file is missing or not as it was written.
    """
    path = Path(path)
    if check:
        verify(path)
    tensors: Tensors = {}
    state: State = {}
    for name in ("shared", f"rank-{distributed.rank()}"):
        part = path / _PARTS / name
        if part.with_suffix(".json").is_file():
            tensors |= tensor_files.read_file(part.with_suffix(".safetensors"))
            state |= read_json_object(part.with_suffix(".json"))
    return tensors, state


def check_world_size(path: str | Path) -> None:
    """Refuse a checkpoint that another number of processes wrote.

    Raises:
        CheckpointError: each process has its own random state and rollouts in it.
    """
    writers = len(list((Path(path) / _PARTS).glob("rank-*.json")))
    if writers != distributed.world_size():
        raise CheckpointError(
            f"{path} was written by {writers} processes and this run has "
            f"{distributed.world_size()}: resume with as many"
        )


def clean_stale(run_dir: str | Path) -> None:
    """Remove what a killed process left half written or half removed; before a run starts."""
    if distributed.is_main():
        for pattern in (".tmp-*", ".old-*"):
            for path in Path(run_dir).glob(pattern):
                _log.info("removing %s, left by a run that was stopped", path)
                shutil.rmtree(path, ignore_errors=True)
    distributed.barrier()


def _write_part(
    folder: Path, name: str, tensors: Mapping[str, Tensor], state: Mapping[str, Any]
) -> None:
    # The manifest brings it to the disk, and sums it up in the meantime.
    tensor_files.write_file(folder / _PARTS / f"{name}.safetensors", tensors, durable=False)
    write_json(folder / _PARTS / f"{name}.json", dict(state))


@contextmanager
def _staging(final: Path, needed: int) -> Iterator[Path]:
    """A folder beside `final`, the same one on all ranks; on an error it is removed."""
    # An id that all ranks know and that no earlier attempt has used.
    number = _agreed(uuid.uuid4().int >> 66 if distributed.is_main() else 0)
    staging = final.parent / f".tmp-{final.name.removeprefix('checkpoint-')}-{number:016x}"
    try:
        with _together():
            if distributed.is_main():
                _check_room(final.parent, needed)
                (staging / _PARTS).mkdir(parents=True)
        yield staging
    except (OSError, SafetensorError) as error:
        _discard(staging)
        if not _is_disk_full(error):
            raise
        raise _disk_full(final.parent, needed) from error
    finally:
        _discard(staging)


@contextmanager
def _together() -> Iterator[None]:
    """Leave on all ranks together: an error on one of them is an error on all of them."""
    done = False
    try:
        yield
        done = True
    finally:
        failed = distributed.all_reduce_sum(int(not done))
    if failed:
        raise OSError(f"{failed} of {distributed.world_size()} ranks could not write; see theirs")


def _is_whole(path: Path) -> bool:
    try:
        verify(path)
    except CheckpointError:
        return False
    return True


def _agreed(value: int) -> int:
    """Rank 0's value, which is not negative, on all ranks."""
    return distributed.all_reduce_max(value if distributed.is_main() else 0)


def _commit(staging: Path, final: Path) -> None:
    """The moment from which on the checkpoint is there."""
    for folder in (staging / _PARTS, staging):
        sync(folder)
    if final.exists():
        damaged = _set_aside(final)
        os.rename(staging, final)
        shutil.rmtree(damaged, ignore_errors=True)
    else:
        os.rename(staging, final)
    sync(final.parent)


def _set_aside(path: Path) -> Path:
    """Rename a checkpoint before it is removed, so that half of one never has its name."""
    aside = path.with_name(f".old-{checkpoint_step(path)}-{uuid.uuid4().hex}")
    os.rename(path, aside)
    sync(path.parent)
    return aside


def _prune(run_dir: Path, step: int, limit: int, keep: Collection[int]) -> None:
    """Remove the checkpoints before the `limit` newest whole ones up to `step`."""
    whole = 0
    for path in checkpoints(run_dir):
        if checkpoint_step(path) > step:
            continue
        if whole >= limit and checkpoint_step(path) not in keep:
            shutil.rmtree(_set_aside(path))
        elif looks_whole(path):
            whole += 1


def _discard(staging: Path) -> None:
    if distributed.is_main():
        shutil.rmtree(staging, ignore_errors=True)


def _bytes_needed(run_dir: Path, tensors: Mapping[str, Tensor]) -> int:
    """At least this much: the last checkpoint's size, or the tensors' where there is none."""
    before = next((path for path in checkpoints(run_dir) if looks_whole(path)), None)
    size = sum(tensor.nbytes for tensor in tensors.values())
    return max(size, 0 if before is None else total_bytes(before))


def _check_room(run_dir: Path, needed: int) -> None:
    run_dir.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(run_dir).free < needed:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _is_disk_full(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return f"os error {errno.ENOSPC}" in str(error) or f"os error {errno.EDQUOT}" in str(error)


def _disk_full(run_dir: Path, needed: int) -> OSError:
    free = shutil.disk_usage(run_dir).free
    needed = max(needed, free + 1)  # it did not fit into what is free now that it is removed
    before = next((path.name for path in checkpoints(run_dir)), None)
    intact = f"; {before} is intact" if before else ""
    return OSError(
        errno.ENOSPC,
        f"disk full: a checkpoint needs at least {needed:,} bytes, {free:,} are free{intact}",
        str(run_dir),
    )

"""Where a command writes: what is there already is kept unless the user says otherwise."""

from __future__ import annotations

from pathlib import Path

from .options import UsageError

FINISHED = ("model*.safetensors", "adapter_model.safetensors", "model_final.pt", "model_last.pt")
UNFINISHED = ("checkpoint-*", "metrics.jsonl", "run.json")


def check_run_folder(folder: Path, *, overwrite: bool, resume: str = "never") -> None:
    """Refuse a folder that already holds a run.

    Raises:
        UsageError: it does, and neither resuming nor overwriting was asked for.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--out {folder}: expected a folder, found a file")
    if overwrite and resume != "never":
        raise UsageError("--overwrite replaces a run and --resume continues it: choose one")
    if overwrite or resume != "never":
        return
    if any(any(folder.glob(name)) for name in FINISHED + UNFINISHED):
        finished = any(any(folder.glob(name)) for name in FINISHED)
        raise UsageError(
            f"--out {folder} holds {'a finished' if finished else 'an unfinished'} run: choose "
            "another folder, continue it with --resume auto, or replace it with --overwrite"
        )


def check_file(path: Path | None, *, overwrite: bool) -> None:
    """Refuse an output file that exists.

    Raises:
        UsageError: it does and overwriting was not asked for, or it is a folder.
    """
    if path is None:
        return
    if path.is_dir():
        raise UsageError(f"--out {path}: expected a file, found a folder")
    if path.exists() and not overwrite:
        raise UsageError(
            f"--out {path} exists: choose another name, or replace it with --overwrite"
        )

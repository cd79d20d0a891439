"""Checkpoints survive kills, full disks, bit flips and cuts; resuming changes nothing."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import signal
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastllm.model import tensors as tensor_files
from fastllm.training import checkpoint, manifest
from fastllm.training.checkpoint import (
    CheckpointError,
    checkpoints,
    clean_stale,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
    verify,
)


def write_model(folder: Path) -> None:
    """Stands for a trainer that writes a model folder, files without fsync among them."""
    (folder / "config.json").write_text('{"model_type": "llama"}')
    tensor_files.write_file(folder / "model.safetensors", {"weight": torch.arange(64.0)})


def save(run: Path, step: int, **options: Any) -> Path:
    tensors = {"optimizer/weight/exp_avg": torch.full((64,), float(step))}
    return save_checkpoint(run, step, write_model, tensors, {"step": step}, **options)


def steps_in(run: Path) -> list[int]:
    return [checkpoint.checkpoint_step(path) for path in checkpoints(run)]


def hidden_in(run: Path) -> list[str]:
    return [path.name for path in run.iterdir() if path.name.startswith(".")]


# -- commit ----------------------------------------------------------------------------------------


def test_round_trip(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 4), "b": torch.tensor(2.5), "c": torch.arange(3)}
    state = {"epoch": 0.1, "list": [1, None, True], "text": "\u00e9"}
    path = save_checkpoint(
        tmp_path / "run",
        7,
        write_model,
        tensors,
        state,
        rank_tensors={"own": torch.zeros(0)},
        rank_state={"seed": 2**63},
    )
    assert path == tmp_path / "run/checkpoint-7"
    assert latest_checkpoint(tmp_path / "run") == path
    found, found_state = load_checkpoint(path)
    assert found_state == state | {"seed": 2**63}
    assert found.keys() == tensors.keys() | {"own"}
    for name, value in tensors.items():
        assert torch.equal(found[name], value)
        assert found[name].dtype == value.dtype
    assert hidden_in(tmp_path / "run") == []
    assert not list((tmp_path / "run").rglob("*.p*")), "a pickle"


def test_the_manifest_names_every_file(tmp_path: Path) -> None:
    path = save(tmp_path, 3)
    manifest = json.loads((path / "manifest.json").read_text())
    assert (manifest["schema"], manifest["step"], manifest["world_size"]) == (2, 3, 1)
    sizes = {entry["name"]: entry["bytes"] for entry in manifest["files"]}
    files = [file for file in path.rglob("*") if file.is_file() and file.name != "manifest.json"]
    assert sizes == {file.relative_to(path).as_posix(): file.stat().st_size for file in files}
    assert {"config.json", "model.safetensors", "training/shared.safetensors"} <= sizes.keys()


def test_the_disk_has_everything_before_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[tuple[str, str]] = []
    fsync, rename = os.fsync, os.rename

    def record_fsync(descriptor: int) -> None:
        events.append(("fsync", os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def record_rename(source: Path, target: Path) -> None:
        events.append(("rename", str(target)))
        rename(source, target)

    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc to name open files")
    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "rename", record_rename)
    path = save(tmp_path, 1)
    commit = events.index(("rename", str(path)))
    synced = {Path(name).name for kind, name in events[:commit] if kind == "fsync"}
    written = {file.name for file in path.rglob("*")}  # the folder `training` too
    assert synced >= written - {"manifest.json"}
    # Under these names are the manifest, which then took its own, and the checkpoint's folder.
    assert {name.split(".")[1][:4] for name in synced if name.startswith(".")} >= {"mani", "tmp-"}
    assert ("fsync", str(tmp_path)) in events[commit:]


def test_nothing_there(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "nowhere") is None
    assert latest_checkpoint(tmp_path) is None
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-3").touch()
    assert latest_checkpoint(tmp_path) is None


def test_newest_by_number_not_by_name_or_time(tmp_path: Path) -> None:
    for step in (100, 9, 20):
        save(tmp_path, step)
    assert steps_in(tmp_path) == [100, 20, 9]
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-100"


# -- what stays ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limit", "left"), [(None, [5, 4, 3, 2, 1]), (3, [5, 4, 3]), (2, [5, 4]), (1, [5]), (0, [5])]
)
def test_save_total_limit(limit: int | None, left: list[int], tmp_path: Path) -> None:
    for step in range(1, 6):
        save(tmp_path, step, save_total_limit=limit)
    assert steps_in(tmp_path) == left
    assert hidden_in(tmp_path) == []


def test_damaged_checkpoints_do_not_count(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    (tmp_path / "checkpoint-3/model.safetensors").write_bytes(b"short")
    save(tmp_path, 4, save_total_limit=2)
    assert steps_in(tmp_path) == [4, 3, 2]  # two whole ones, and the damaged one between them


def test_steps_that_stay_whatever_the_limit(tmp_path: Path) -> None:
    for step in range(1, 6):
        save(tmp_path, step, save_total_limit=2, keep=[2])
    assert steps_in(tmp_path) == [5, 4, 2]


def test_later_steps_are_left_alone(tmp_path: Path) -> None:
    """A run that goes back to an earlier checkpoint does not lose what it has just saved."""
    for step in (10, 20, 30):
        save(tmp_path, step)
    save(tmp_path, 11, save_total_limit=1)
    assert steps_in(tmp_path) == [30, 20, 11]


def test_nothing_goes_before_the_commit(tmp_path: Path) -> None:
    save(tmp_path, 1)

    def fail(folder: Path) -> None:
        raise RuntimeError("no model today")

    with pytest.raises(RuntimeError, match="no model today"):
        save_checkpoint(tmp_path, 2, fail, {}, {}, save_total_limit=1)
    assert steps_in(tmp_path) == [1]
    assert hidden_in(tmp_path) == []


def test_the_same_step_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = save(tmp_path, 5)
    before = (first / "manifest.json").read_bytes(), first.stat().st_ino
    with caplog.at_level(logging.WARNING, "fastllm"):
        path = save_checkpoint(tmp_path, 5, write_model, {"x": torch.ones(1)}, {"other": 1})
    assert "is there already and is kept" in caplog.text
    assert ((path / "manifest.json").read_bytes(), path.stat().st_ino) == before


@pytest.mark.parametrize("damage", ["no manifest", "bit"])
def test_a_damaged_same_step_is_replaced(damage: str, tmp_path: Path) -> None:
    first = save(tmp_path, 5)
    if damage == "bit":
        flip(first / "model.safetensors", 8 * 200)
    else:
        (first / "manifest.json").unlink()
    path = save_checkpoint(tmp_path, 5, write_model, {"x": torch.ones(1)}, {"other": 1})
    assert load_checkpoint(path)[1] == {"other": 1}
    assert hidden_in(tmp_path) == []


# -- damage ----------------------------------------------------------------------------------------


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def test_every_bit_flip_is_found(tmp_path: Path) -> None:
    path = save(tmp_path, 5)
    generator = random.Random(1)
    files = [file for file in path.rglob("*") if file.is_file()]
    for trial in range(300):
        file = files[trial % len(files)]
        bit = generator.randrange(8 * file.stat().st_size)
        flip(file, bit)
        with pytest.raises(CheckpointError, match="checkpoint-5"):
            verify(path)
        flip(file, bit)
    verify(path)


@pytest.mark.parametrize("size", [1, 99, 100, 101, 300, 1234])
def test_long_files_have_a_checksum_for_each_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr(manifest, "_BLOCK", 100)
    monkeypatch.setattr(manifest, "_READ", 32)
    folder, generator = tmp_path / "checkpoint-1", random.Random(size)
    folder.mkdir()
    content = generator.randbytes(size)
    (folder / "file").write_bytes(content)
    manifest.write_manifest(folder, step=1, world_size=1)
    (entry,) = json.loads((folder / "manifest.json").read_text())["files"]
    parts = [content[first : first + 100] for first in range(0, size, 100)]
    assert entry["crc32"] == [f"{zlib.crc32(part):08x}" for part in parts]
    for _ in range(20):
        bit = generator.randrange(8 * size)
        flip(folder / "file", bit)
        with pytest.raises(CheckpointError, match="file is damaged"):
            verify(folder)
        flip(folder / "file", bit)
    verify(folder)


def test_checkpoints_of_schema_1_are_still_read(tmp_path: Path) -> None:
    path = save(tmp_path, 5)
    content = json.loads((path / "manifest.json").read_text())
    del content["blake2b"]
    content["schema"] = 1
    for entry in content["files"]:
        del entry["crc32"]
        data = (path / entry["name"]).read_bytes()
        entry["blake2b"] = hashlib.blake2b(data, digest_size=16).hexdigest()
    content["blake2b"] = manifest._sum_of_json(content)
    (path / "manifest.json").write_text(json.dumps(content))
    assert latest_checkpoint(tmp_path) == path
    flip(path / "model.safetensors", 1000)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
        verify(path)


def test_every_cut_and_every_lost_file_is_found(tmp_path: Path) -> None:
    path = save(tmp_path, 5)
    generator = random.Random(1)
    for file in [file for file in path.rglob("*") if file.is_file()]:
        content = file.read_bytes()
        most = len(content.rstrip())  # the line break at the end of a manifest says nothing
        for keep in (0, most - 1, *generator.sample(range(most), 4)):
            file.write_bytes(content[:keep])
            with pytest.raises(CheckpointError):
                load_checkpoint(path)
        file.unlink()
        with pytest.raises(CheckpointError, match=r"is missing|no manifest\.json"):
            verify(path)
        file.write_bytes(content)
    verify(path)


def test_what_is_wrong_is_said(tmp_path: Path) -> None:
    path = save(tmp_path, 5)
    os.rename(path, tmp_path / "checkpoint-6")
    with pytest.raises(CheckpointError, match="it is the manifest of step 5"):
        verify(tmp_path / "checkpoint-6")
    os.rename(tmp_path / "checkpoint-6", path)
    (path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"config\.json has 2 bytes, expected 23"):
        verify(path)


def test_an_older_checkpoint_takes_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
    flip(tmp_path / "checkpoint-4/training/shared.safetensors", 8 * 150)
    (tmp_path / "checkpoint-3/manifest.json").unlink()
    with caplog.at_level(logging.WARNING, "fastllm"):
        assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    assert "checkpoint-4: training/shared.safetensors is damaged" in caplog.text
    assert "checkpoint-3: no manifest.json, so it was never finished" in caplog.text


def test_only_damaged_checkpoints(tmp_path: Path) -> None:
    for step in (1, 2):
        (save(tmp_path, step) / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"no checkpoint is whole \(checkpoint-2, checkpoi"):
        latest_checkpoint(tmp_path)


def test_a_manifest_that_points_elsewhere(tmp_path: Path) -> None:
    path = save(tmp_path, 5)
    content = json.loads((path / "manifest.json").read_text())
    del content["blake2b"]
    content["files"][0]["name"] = "../../etc/passwd"
    content["blake2b"] = manifest._sum_of_json(content)
    (path / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="a file outside of the checkpoint"):
        verify(path)


def test_stale_folders_go(tmp_path: Path) -> None:
    save(tmp_path, 1)
    for name in (".tmp-2-00ff", ".old-1-ab"):
        (tmp_path / name / "training").mkdir(parents=True)
        (tmp_path / name / "training/x").touch()
    (tmp_path / ".git").mkdir()
    clean_stale(tmp_path)
    assert hidden_in(tmp_path) == [".git"]
    assert steps_in(tmp_path) == [1]
    clean_stale(tmp_path / "nowhere")


# -- a full disk -----------------------------------------------------------------------------------


def _full(*_: object, **__: object) -> None:
    raise OSError(28, "No space left on device")


def _full_in_rust(*_: object, **__: object) -> None:
    raise tensor_files.SafetensorError("I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize("fail", [_full, _full_in_rust])
@pytest.mark.parametrize("place", ["save_file", "write_model", "sync"])
def test_disk_full(
    fail: Callable[..., None], place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = save(tmp_path, 1)
    target = {
        "save_file": "fastllm.model.tensors.save_file",
        "write_model": f"{__name__}.write_model",
        "sync": "fastllm.training.manifest.sync",
    }[place]
    with monkeypatch.context() as patch:
        if place == "write_model":
            patch.setitem(globals(), "write_model", fail)
        else:
            patch.setattr(target, fail)
        with pytest.raises(OSError, match=r"needs at least [\d,]+ bytes, [\d,]+ are free") as error:
            save(tmp_path, 2, save_total_limit=1)
    assert error.value.errno == 28
    assert "checkpoint-1 is intact" in str(error.value)
    assert str(tmp_path) in str(error.value)
    assert hidden_in(tmp_path) == []
    assert latest_checkpoint(tmp_path) == before
    save(tmp_path, 2)  # and when there is room again, it goes on
    assert steps_in(tmp_path) == [2, 1]


def test_too_little_room_is_seen_beforehand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = sum(file.stat().st_size for file in save(tmp_path, 1).rglob("*.safetensors"))
    usage = checkpoint.shutil.disk_usage(tmp_path)._replace(free=size - 1)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: usage)
    asked: list[Path] = []
    with pytest.raises(OSError, match=f"disk full.*{size - 1:,} are free"):
        save_checkpoint(tmp_path, 2, asked.append, {}, {})
    assert not asked


# -- kills -----------------------------------------------------------------------------------------


def _save_forever(run: Path) -> None:
    """Resume from whatever is there, then save every step: what a killed run does again."""
    clean_stale(run)
    newest = latest_checkpoint(run)
    step = 0 if newest is None else load_checkpoint(newest)[1]["step"]
    while True:
        step += 1
        tensors = {"weight": torch.full((20_000,), float(step))}
        save_checkpoint(run, step, write_model, tensors, {"step": step}, save_total_limit=2)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks a prepared process")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_kills(tmp_path: Path) -> None:
    """SIGKILL anywhere in the save loop: the run always goes on from where it was, or after."""
    generator = random.Random(5)
    reached = 0
    leftovers = 0
    for trial in range(16):
        child = os.fork()
        if child == 0:
            try:
                _save_forever(tmp_path)
            finally:
                os._exit(1)  # an error in the child: the parent sees that it was not killed
        _wait_for_step(tmp_path, reached + 1)
        time.sleep(generator.uniform(0, 0.03))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), f"trial {trial}: the child failed on its own"
        leftovers += bool(hidden_in(tmp_path))
        newest = latest_checkpoint(tmp_path)
        assert newest is not None
        tensors, state = load_checkpoint(newest)
        assert state["step"] == checkpoint.checkpoint_step(newest) > reached
        assert torch.equal(tensors["weight"], torch.full((20_000,), float(state["step"])))
        assert newest == checkpoints(tmp_path)[0], "a committed checkpoint was rejected"
        reached = state["step"]
    assert leftovers, "no kill hit a save: the test tests nothing"
    clean_stale(tmp_path)
    assert hidden_in(tmp_path) == []


def _wait_for_step(run: Path, step: int) -> None:
    deadline = time.monotonic() + 30
    while not (run / f"checkpoint-{step}").exists():
        if (found := checkpoints(run)) and checkpoint.checkpoint_step(found[0]) >= step:
            return
        assert time.monotonic() < deadline, "the child saves nothing"
        time.sleep(0.001)


def test_another_number_of_processes_is_refused(tmp_path):
    folder = save_checkpoint(
        tmp_path, 3, lambda path: None, {}, {}, rank_tensors={"x": torch.ones(1)}, rank_state={}
    )
    part = folder / "training" / "rank-0.json"
    (folder / "training" / "rank-1.json").write_bytes(part.read_bytes())
    with pytest.raises(CheckpointError, match=r"written by 2 processes and this run has 1"):
        checkpoint.check_world_size(folder)

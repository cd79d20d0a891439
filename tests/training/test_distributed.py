"""Two processes over gloo add up; one process needs no process group."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastllm.training import distributed
from fastllm.training.checkpoint import load_checkpoint, verify

ROOT = Path(distributed.__file__).parents[2]

WORKER = """
import json, os, sys
from pathlib import Path
import torch
from fastllm.training import distributed as d
from fastllm.training.checkpoint import clean_stale, load_checkpoint, save_checkpoint

d.start("cpu")
run, rank = Path(sys.argv[1]), d.rank()
given = torch.tensor([1.0, float(rank)])
gradients = [torch.ones(2, 2) * (rank + 1), torch.tensor(3)]
d.all_reduce_sum_(gradients)
found = {
    "size": d.world_size(), "main": d.is_main(), "local": d.local_rank(),
    "int": d.all_reduce_sum(2**40 + rank), "float": d.all_reduce_sum(0.5 + rank),
    "tensor": d.all_reduce_sum(given).tolist(), "given": given.tolist(),
    "max": d.all_reduce_max(rank), "gradients": [g.tolist() for g in gradients],
}

clean_stale(run)
path = save_checkpoint(
    run, 5, lambda folder: (folder / "config.json").write_text(str(rank)),
    {"shared": torch.full((2,), float(rank))}, {"step": 5},
    rank_tensors={"own": torch.full((2,), float(rank))}, rank_state={"seed": rank},
)
tensors, state = load_checkpoint(path)
found["loaded"] = [tensors["shared"].tolist(), tensors["own"].tolist(), state]

def fails(folder):  # on rank 0, which is the only one that writes the model
    raise OSError("the disk is on fire")
try:
    save_checkpoint(run, 6, fails, {}, {})
except OSError as error:
    found["error"] = str(error)
d.barrier()
found["left"] = sorted(path.name for path in run.iterdir())
d.stop()
Path(f"{run}-{rank}.json").write_text(json.dumps(found))
"""


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture
def two_ranks(tmp_path: Path) -> list[dict[str, object]]:
    """What each of two processes found."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": "2"}
    shared |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(tmp_path / "run")],
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for process in processes:
            _, messages = process.communicate(timeout=120)
            assert process.returncode == 0, messages
    finally:
        for process in processes:
            process.kill()
    return [json.loads((tmp_path / f"run-{rank}.json").read_text()) for rank in range(2)]


def test_two_processes(two_ranks: list[dict[str, object]], tmp_path: Path) -> None:
    for rank, found in enumerate(two_ranks):
        assert found["size"] == 2
        assert found["main"] is (rank == 0)
        assert found["local"] == rank
        assert found["int"] == 2**41 + 1
        assert found["float"] == 2.0
        assert found["tensor"] == [2.0, 1.0]
        assert found["given"] == [1.0, float(rank)]
        assert found["max"] == 1
        assert found["gradients"] == [[[3.0, 3.0], [3.0, 3.0]], 6]
        # Rank 0's shared part, and everyone's own.
        assert found["loaded"] == [[0.0, 0.0], [rank, rank], {"step": 5, "seed": rank}]
        assert found["left"] == ["checkpoint-5"]
    assert two_ranks[0]["error"] == "the disk is on fire"
    assert "1 of 2 ranks could not write" in str(two_ranks[1]["error"])
    verify(tmp_path / "run/checkpoint-5")
    tensors, state = load_checkpoint(tmp_path / "run/checkpoint-5")  # now in a world of one
    assert state["seed"] == 0
    assert tensors["own"].tolist() == [0.0, 0.0]


def test_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    distributed.start("cpu")
    assert not torch.distributed.is_initialized()
    assert (distributed.rank(), distributed.world_size(), distributed.local_rank()) == (0, 1, 0)
    assert distributed.is_main()
    distributed.barrier()
    assert distributed.all_reduce_sum(3) == 3
    assert distributed.all_reduce_sum(0.5) == 0.5
    value = torch.ones(2)
    total = distributed.all_reduce_sum(value)
    assert torch.equal(total, value)
    assert total is not value
    distributed.stop()


def test_half_an_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match=r"WORLD_SIZE is 2 but RANK, MASTER_ADDR, .*torchrun"):
        distributed.start("cpu")

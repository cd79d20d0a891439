"""The processes of a run: one, or as many as torchrun started.

Every function here works in a single process too, where there is nothing to wait for and a sum
over ranks is the value itself.
"""

from __future__ import annotations

import gc
import os
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Value = TypeVar("Value", int, float, Tensor)

_HOST = torch.device("cpu")


def start(device: torch.device | str = "cpu") -> None:
    """Join the other processes where torchrun's environment says that there are any.

    Tensors on CUDA devices talk over NCCL, all others and the host's own numbers over gloo, so
    that a count does not wait for a device. A process group that is already there is kept. With
    CUDA, this process takes the device of its local rank.

    Raises:
        ValueError: an incomplete environment.
    """
    if dist.is_initialized() or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ValueError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']} but {', '.join(missing)} not set; "
            "start the processes with torchrun"
        )
    on_cuda = torch.device(device).type == "cuda"
    if on_cuda:
        torch.cuda.set_device(local_rank())
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_cuda else "gloo")


def stop() -> None:
    """Leave the process group, if there is one; every process calls this together.

    No process leaves while another still talks to it, and no finished collective keeps the
    group's threads alive into the end of the interpreter, where touching Python aborts them.
    """
    if dist.is_initialized():
        dist.barrier()
        gc.collect()
        dist.destroy_process_group()


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This process's number among all of them."""
    return dist.get_rank() if dist.is_initialized() else 0


def local_rank() -> int:
    """This process's number on its machine: the index of its device."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_main() -> bool:
    """Whether this process writes files and messages."""
    return rank() == 0


def barrier() -> None:
    """Wait until every process is here."""
    if world_size() > 1:
        dist.barrier()


def all_reduce_sum(value: Value) -> Value:
    """Sum over all processes, as the type that came in: int, float (in fp64) or a new tensor."""
    return _reduce(value, dist.ReduceOp.SUM)


def sums(*values: float) -> list[float]:
    """Sum each value over all processes, in fp64 and in one message."""
    if world_size() == 1:
        return list(values)
    return all_reduce_sum(torch.tensor(values, dtype=torch.float64)).tolist()


def all_reduce_max(value: Value) -> Value:
    """Largest value over all processes, as the type that came in."""
    return _reduce(value, dist.ReduceOp.MAX)


def all_reduce_sum_(tensors: list[Tensor]) -> None:
    """Sum each tensor over all processes, in place."""
    if world_size() == 1:
        return
    for work in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
        work.wait()


def _reduce(value: Value, operation: dist.ReduceOp.RedOpType) -> Value:
    if world_size() == 1:
        return value.clone() if isinstance(value, Tensor) else value
    if isinstance(value, Tensor):
        on_device = value.to(_device(value.device), copy=True).contiguous()
        dist.all_reduce(on_device, operation)
        return on_device.to(value.device)
    dtype = torch.int64 if isinstance(value, int) else torch.float64
    total = torch.tensor(value, dtype=dtype, device=_device())
    dist.all_reduce(total, operation)
    return type(value)(total.item())


def _device(wanted: torch.device | str = "cpu") -> torch.device:
    """Where the process group expects its tensors: where they are, if it can."""
    backends = dist.get_backend()
    if torch.device(wanted).type == "cuda" and "nccl" in backends:
        return torch.device(wanted)
    # NCCL alone: a group that was there before this run.
    return torch.device("cuda", torch.cuda.current_device()) if backends == "nccl" else _HOST

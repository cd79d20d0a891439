"""What a call costs the host: eager calls on inputs so small that the device waits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from fastllm import ops
from fastllm.layout import PackedLayout
from fastllm.ops import use_backend

from ..harness import in_turns
from ..records import OURS, Record
from .case import Case, Context
from .exact import outputs_of
from .goals import Within, judged

NAME = "ops"

FORWARD, BOTH = 10e-6, 35e-6
CALLS = 200

Call = Callable[[], Any]


def cases(context: Context) -> list[Case]:
    """One case for each op that a model calls once or more in a layer."""
    found = []
    for name, make in OPS.items():
        if context.scale != "quick" or name == "rms_norm":
            found.append(
                Case(NAME, "host's time of a call", name, partial(_host, name, make), seconds=1.0)
            )
    return found


def _host(name: str, make: Callable[..., tuple[Call, list[Any]]], context: Context) -> Any:
    device = context.device
    blank = Record(NAME, "host's time of a call", name, "bfloat16", OURS)
    with device.working(), use_backend(device.backend):
        call, leaves = make(device.place)

        gradients = [torch.ones_like(t) for t in outputs_of(call()) if t.requires_grad]

        def forward_backward() -> Any:
            outputs = [t for t in outputs_of(call()) if t.requires_grad]
            return torch.autograd.grad(outputs, leaves, gradients)

        ways = {"forward": (call, FORWARD)}
        if leaves:
            ways["forward+backward"] = forward_backward, BOTH
        for way, (run, limit) in ways.items():
            yield from _timed(replace(blank, name=f"{blank.name} {way}"), run, limit, context)


def _timed(blank: Record, run: Call, limit: float, context: Context) -> Iterator[Record]:
    for _ in range(3):
        run()
    block = partial(context.device.wall, run, CALLS)
    turns = in_turns({OURS: block}, context.rounds, sample=lambda: None)
    for record in turns.records(NAME, blank.name, blank.case, blank.dtype):
        yield replace(record, **judged(record, Within(limit)))


def _tensor(*shape: int, device: torch.device, leaf: bool = True) -> torch.Tensor:
    return torch.randn(*shape, device=device).to(torch.bfloat16).requires_grad_(leaf)


def _rms_norm(device: torch.device) -> tuple[Call, list[Any]]:
    x, residual = (_tensor(16, 512, device=device) for _ in range(2))
    weight = _tensor(512, device=device)
    return lambda: ops.rms_norm(x, weight, 1e-6, residual), [x, weight, residual]


def _swiglu(device: torch.device) -> tuple[Call, list[Any]]:
    gate = _tensor(16, 1024, device=device)
    return lambda: ops.swiglu(gate), [gate]


def _rope(device: torch.device) -> tuple[Call, list[Any]]:
    q, k = _tensor(16, 4, 64, device=device), _tensor(16, 2, 64, device=device)
    norms = [_tensor(64, device=device) for _ in range(2)]
    tables = [torch.randn(16, 32, device=device) for _ in range(2)]
    positions = torch.arange(16, dtype=torch.int32, device=device)

    def call() -> Any:
        return ops.rope(q, k, *tables, positions, q_norm=norms[0], k_norm=norms[1])

    return call, [q, k, *norms]


def _attention(device: torch.device) -> tuple[Call, list[Any]]:
    layout = PackedLayout([10, 6], None, device)
    q, k, v = (_tensor(16, heads, 64, device=device) for heads in (4, 2, 2))
    return lambda: ops.attention(q, k, v, layout), [q, k, v]


def _lora(device: torch.device) -> tuple[Call, list[Any]]:
    x, weight = _tensor(16, 256, device=device), _tensor(256, 256, device=device, leaf=False)
    a, b = _tensor(8, 256, device=device), _tensor(256, 8, device=device)
    return lambda: ops.lora_linear(x, weight, None, a, b, 2.0), [x, a, b]


def _reward_loss(device: torch.device) -> tuple[Call, list[Any]]:
    hidden, weight = _tensor(16, 256, device=device), _tensor(1, 256, device=device)
    rows = torch.arange(16, device=device)
    chosen, rejected = rows[:8].clone(), rows[8:].clone()
    return lambda: ops.reward_loss(hidden, weight, chosen, rejected)[0], [hidden, weight]


def _decode(device: torch.device) -> tuple[Call, list[Any]]:
    ids = partial(torch.tensor, dtype=torch.int32, device=device)
    keys = _tensor(4, 2, 64, 64, device=device, leaf=False)
    values = _tensor(4, 2, 64, 64, device=device, leaf=False)
    q = _tensor(2, 4, 64, device=device, leaf=False)
    tables = ids([[0], [1]]), ids([40, 50]), ids([0, 1]), ids([[2], [3]]), ids([5, 9])
    return lambda: ops.decode_attention(q, keys, values, *tables), []


OPS = {
    "rms_norm": _rms_norm,
    "swiglu": _swiglu,
    "rope": _rope,
    "attention": _attention,
    "lora_linear": _lora,
    "reward_loss": _reward_loss,
    "decode_attention": _decode,
}

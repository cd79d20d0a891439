"""The rows of a running batch on the device, where they move on from token to token alone."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..ops import backend
from .batch import RunningBatch
from .cache import BLOCK
from .replay import Copies
from .sampling import SamplingRows, sample
from .token_step import StepRows
from .upload import Field, Parcel

MOST_STEPS = 64
"""Tokens that a row may draw before the host has looked."""

# Columns of the state, in the order that kernels/sampling.py has them.
_STATE = ("position", "length", "block", "place", "count", "live", "step")
_COLUMNS: dict[str, type[np.generic]] = {
    "token": np.int64,
    "key": np.int64,
    "group": np.int32,
    "min_count": np.int32,
    "max_count": np.int32,
    "top_k": np.int32,
    "temperature": np.float32,
    "top_p": np.float32,
    "min_p": np.float32,
    "repetition_penalty": np.float32,
}


class Size(NamedTuple):
    """What a graph is for."""

    rows: int
    prompts: int
    tail_blocks: int
    prefix_blocks: int
    stop_tokens: int
    vocabulary: int
    """Of the table of seen tokens: 0 while no row has a repetition penalty."""
    filtered: bool
    """Whether a row has a filter that takes a sorted vocabulary."""


class DeviceRows:
    """The rows of a batch, padded to a size, and what they draw.

    A row of padding does what the last row does: it writes the same keys to the same place. So does
    a row that has ended: it computes its last step again, and what it draws is nobody's.
    """

    def __init__(self, size: Size, device: torch.device) -> None:
        self.size = size
        tables = {
            "stop_tokens": (size.rows, size.stop_tokens),
            "tail_blocks": (size.rows, size.tail_blocks),
            "prefix_length": (size.prompts,),
            "prefix_blocks": (size.prompts, size.prefix_blocks),
            "state": (len(_STATE), size.rows),
            "used": (1,),
        }
        fields = {name: Field((size.rows,), np.dtype(kind)) for name, kind in _COLUMNS.items()}
        fields |= {name: Field(shape, np.dtype(np.int32)) for name, shape in tables.items()}
        self._parcel = Parcel(fields, device)
        there = self._parcel.tensors
        state = dict(zip(_STATE, there["state"], strict=True))
        self._seen = torch.zeros(size.rows, size.vocabulary, dtype=torch.uint8, device=device)
        self._seen_of: object = None
        self._out = torch.zeros(MOST_STEPS, 3, size.rows, dtype=torch.int32, device=device)
        self.drawn = Copies(self._out)
        self.newest = StepRows(
            token=there["token"],
            position=state["position"],
            block=state["block"],
            place=state["place"],
            group=there["group"],
            tail_length=state["length"],
            tail_blocks=there["tail_blocks"],
            prefix_length=there["prefix_length"],
            prefix_blocks=there["prefix_blocks"],
        )
        self._how = SamplingRows(
            temperature=there["temperature"],
            top_p=there["top_p"],
            min_p=there["min_p"],
            repetition_penalty=there["repetition_penalty"],
            top_k=there["top_k"],
            key=there["key"],
            count=state["count"],
            min_count=there["min_count"],
            stop_tokens=there["stop_tokens"],
            seen=self._seen,
        )

    def fill(self, batch: RunningBatch) -> None:
        """Put a batch in, by one copy, and rows of padding after it."""
        used, arrays = batch.size, self._parcel.arrays
        for name in _COLUMNS:
            arrays[name][:used] = getattr(batch, name)[:used]
        length = batch.tail_length[:used]
        state = dict(zip(_STATE, arrays["state"], strict=True))
        state["position"][:used] = batch.position[:used]
        state["length"][:used] = length + 1
        state["block"][:used] = batch.tail_blocks[np.arange(used), length // BLOCK]
        state["place"][:used] = length % BLOCK
        state["count"][:used] = batch.count[:used]
        state["live"][:], state["step"][:] = 1, 0
        _put(arrays["stop_tokens"], batch.stop_tokens[:used])
        _put(arrays["tail_blocks"], batch.tail_blocks[:used])
        for name in (*_COLUMNS, "stop_tokens", "tail_blocks"):
            arrays[name][used:] = arrays[name][used - 1]
        arrays["state"][:5, used:] = arrays["state"][:5, used - 1 : used]
        _put(arrays["prefix_length"], batch.prefix_length)
        _put(arrays["prefix_blocks"], batch.prefix_blocks)
        arrays["used"][0] = used
        self._parcel.send()
        if self.size.vocabulary and self._seen_of != (id(batch), batch.changes):
            # Between changes the device keeps the table itself.
            self._seen[:used] = torch.from_numpy(batch.seen[:used])
            self._seen_of = id(batch), batch.changes

    def draw(self, logits: Tensor) -> None:
        """Draw a token for each row, and move the rows on."""
        drawn = sample(logits, self._how, self.size.filtered)
        there = self._parcel.tensors
        kernels = backend.kernels("sampling", logits)
        advance_ = getattr(kernels, "advance_", advance_reference_)
        advance_(
            *drawn,
            there["used"],
            there["token"],
            there["state"],
            there["max_count"],
            there["stop_tokens"],
            there["tail_blocks"],
            self._seen,
            self._out,
        )


def advance_reference_(
    drawn: Tensor,
    logprobs: Tensor,
    sampling_logprobs: Tensor,
    used: Tensor,
    token: Tensor,
    state: Tensor,
    max_count: Tensor,
    stop_tokens: Tensor,
    tail_blocks: Tensor,
    seen: Tensor,
    out: Tensor,
) -> None:
    """The definition of `kernels.sampling.advance_`, in PyTorch."""
    rows = torch.arange(len(token), device=token.device)
    source = torch.minimum(rows, used - 1)
    drawn = drawn[source]
    bits = [column[source].view(torch.int32) for column in (logprobs, sampling_logprobs)]
    position, length, block, place, count, live, step = state
    out[step.long(), :, rows] = torch.stack((drawn.int(), *bits), dim=1)
    step += 1

    ended = (stop_tokens == drawn[:, None]).any(dim=1) | (count + 1 >= max_count)
    lives = live > 0
    if seen.shape[1]:
        seen[rows, drawn] = torch.where(lives, 1, seen[rows, drawn])
    live.masked_fill_(ended, 0)
    lives = lives & ~ended
    column = (length // BLOCK).clamp(max=tail_blocks.shape[1] - 1).long()
    for into, value in (
        (token, drawn),
        (position, position + 1),
        (block, tail_blocks[rows, column]),
        (place, length % BLOCK),
        (length, length + 1),
        (count, count + 1),
    ):
        into.copy_(torch.where(lives, value, into))


def _put(into: np.ndarray, source: np.ndarray) -> None:
    """As much of a table as there is room for: what lies beyond is nobody's."""
    part = tuple(slice(min(sizes)) for sizes in zip(into.shape, source.shape, strict=True))
    into[part] = source[part]

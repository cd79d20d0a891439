"""The token step replayed from CUDA graphs: what a GPU does for a token costs one launch.

A graph is for fixed shapes, so the batch is padded to one of a few sizes. It computes all layers,
draws, and moves the rows on, on the device: the host sends the rows once for many tokens, and looks
at what they drew while the next ones are computed.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ..model import Transformer
from .batch import Drawn, RunningBatch
from .cache import BlockCache, blocks_of
from .decoder import Decoder
from .device_rows import MOST_STEPS, DeviceRows, Size
from .replay import Replayed
from .token_step import has_filters

# Tokens between two looks. What a row that ends would cost for nothing, at most twice, and what
# hides the host's work.
_TOKENS_AT_ONCE = 8
# Sizes of a batch between a power of two and the next, and the least between two sizes.
_SIZES = 4
_LEAST = 8
# Blocks of a run that one program reads: tables grow by powers of two of so many.
_BLOCKS = 4


class GraphedStep:
    """A `TokenStep` that is captured once for each size of the batch.

    Rows go on when another one ends; see `TokenStep.goes_on`.

    Args:
        model: its weights are joined in copies; see decoder.py.
        cache: keeps the keys and values.
        reason: why this step serves.
        capture: False computes the padded batch op by op, on any device.

    Raises:
        ValueError: the model is on a device that has no CUDA graphs.
    """

    goes_on = True

    def __init__(
        self,
        model: Transformer,
        cache: BlockCache,
        reason: str = "asked for",
        capture: bool = True,
    ) -> None:
        if capture and cache.device.type != "cuda":
            raise ValueError(f"step: 'graphs' needs a CUDA device, the model is on {cache.device}")
        self.description = f"CUDA graphs on {cache.device}: {reason}"
        self._cache, self._decoder = cache, Decoder(model)
        self._vocabulary = model.config.vocab_size
        self._longest = model.config.max_position_embeddings
        self._pool = torch.cuda.graph_pool_handle() if capture else None
        self._sizes: dict[Size, tuple[DeviceRows, Replayed]] = {}
        self._version = cache.version

    def __call__(self, batch: RunningBatch, steps: int) -> Drawn:
        """See `TokenStep`."""
        steps = min(steps, MOST_STEPS)
        if self._version != self._cache.version:
            # What the graphs read has moved.
            self._forget()
        size = size_of(batch, steps, self._vocabulary)
        if size not in self._sizes:
            rows = DeviceRows(size, self._cache.device)
            self._sizes[size] = rows, Replayed(partial(self._draw, rows), self._pool)
        rows, replay = self._sizes[size]
        rows.fill(batch)
        return _note(batch, self._run(batch, rows, replay, steps))

    def prefilling(self) -> contextlib.AbstractContextManager[None]:
        """Nothing serves but the ops."""
        return contextlib.nullcontext()

    def logits(self, hidden: Tensor) -> Tensor:
        """See `TokenStep`."""
        return self._decoder.logits(hidden)

    def update_weights(self) -> None:
        """Read the model's weights again. The graphs stay, unless the weights have moved."""
        if not self._decoder.refresh():
            self._forget()

    def _forget(self) -> None:
        self._sizes.clear()
        self._version = self._cache.version

    def _draw(self, rows: DeviceRows) -> None:
        """What a graph does: all layers for the newest tokens, the next ones drawn."""
        rows.draw(self._decoder(rows.newest, self._cache, self._longest))

    def _run(
        self, batch: RunningBatch, rows: DeviceRows, replay: Callable[[], None], steps: int
    ) -> np.ndarray:
        """Compute until all steps are done, or some more than until a row has ended.

        Returns:
            Tokens, and the bits of their log-probabilities [steps, 3, B], int32.
        """
        found, waiting = rows.drawn.host.numpy(), deque[tuple[int, Callable[[], None]]]()
        sent = here = 0
        while here < steps:
            # The device is always a look ahead, so that it does not wait for this one.
            while sent < steps and len(waiting) < 2:
                first, sent = sent, min(sent + _TOKENS_AT_ONCE, steps)
                for _ in range(first, sent):
                    replay()
                waiting.append((sent, rows.drawn.fetch(first, sent)))
            here, wait = waiting.popleft()
            wait()
            if endings(batch, found[:here, 0, : batch.size]).any():
                steps = sent
        return found[:steps, :, : batch.size]


def size_of(batch: RunningBatch, steps: int, vocabulary: int) -> Size:
    """The least size that holds a batch for so many steps."""
    rows = slice(batch.size)
    tail = int(batch.tail_length[rows].max()) + steps
    group = batch.group[rows]
    return Size(
        rows=padded(batch.size),
        prompts=padded(int(group.max()) + 1),
        tail_blocks=_table_width(tail),
        prefix_blocks=_table_width(int(batch.prefix_length[group].max())),
        stop_tokens=batch.stop_tokens.shape[1],
        vocabulary=vocabulary if batch.seen.shape[1] else 0,
        filtered=has_filters(batch, rows),
    )


def padded(number: int) -> int:
    """The size that serves so many: 1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, ..."""
    power = 1 << (number - 1).bit_length()
    if power <= _LEAST:
        return power
    step = max(_LEAST, power // (2 * _SIZES))
    return -(-number // step) * step


def endings(batch: RunningBatch, tokens: np.ndarray) -> np.ndarray:
    """Whether a row's end comes with each of the tokens that it drew [s, B], bool."""
    rows = slice(batch.size)
    stops = (tokens[:, :, None] == batch.stop_tokens[rows]).any(axis=2)
    drawn = np.arange(1, len(tokens) + 1)[:, None]
    return stops | (batch.count[rows] + drawn >= batch.max_count[rows])


def _note(batch: RunningBatch, found: np.ndarray) -> Drawn:
    """Move the batch on by what its rows drew until they ended."""
    rows, number = np.arange(batch.size), len(found)
    tokens = found[:, 0].astype(np.int64)
    logprobs, sampling_logprobs = (found[:, i].view(np.float32).copy() for i in (1, 2))
    ends = endings(batch, tokens)
    lengths = np.where(ends.any(axis=0), ends.argmax(axis=0) + 1, number).astype(np.int32)
    valid = np.arange(number)[:, None] < lengths
    bad = np.flatnonzero((valid & ~np.isfinite(logprobs)).any(axis=0))
    if bad.size:
        raise RuntimeError(f"the model's logits are not finite (row {bad[0]} of {batch.size})")
    batch.token[rows] = tokens[lengths - 1, rows]
    for column in (batch.position, batch.tail_length, batch.count):
        column[rows] += lengths
    if batch.seen.shape[1]:
        batch.seen[np.broadcast_to(rows, valid.shape)[valid], tokens[valid]] = 1
    most = int(lengths.max())
    return Drawn(tokens[:most], logprobs[:most], sampling_logprobs[:most])


def _table_width(tokens: int) -> int:
    programs = -(-blocks_of(tokens) // _BLOCKS)
    return _BLOCKS << (max(1, programs) - 1).bit_length()

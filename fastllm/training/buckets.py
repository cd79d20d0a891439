"""Batches padded to sizes that come again: what a CUDA graph is captured for.

What is added changes nothing: filling tokens are a segment of their own that no row is read of, or
only rows whose targets count 0. Loss, metrics and gradients are those of the batch as it was.
"""

from __future__ import annotations

from dataclasses import replace
from functools import singledispatch
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.packing import PairBatch, TokenBatch

_PER_OCTAVE = 8
"""Sizes between a power of two and the next: at most an eighth is added."""
_LEAST = {"tokens": 64, "rows": 16, "segments": 4}


def rounded(number: int, least: int) -> int:
    """The next size that is a multiple of `least` and of an eighth of its power of two."""
    step = max(least, (1 << max(number, 1).bit_length() - 1) // _PER_OCTAVE)
    return -(-max(number, 1) // step) * step


@singledispatch
def padded(batch: Any) -> Any:
    """The same batch with rounded sizes.

    Raises:
        ValueError: a kind of batch whose sizes are not to be rounded.
    """
    raise ValueError(f"cuda_graphs: no graphs for passes of {type(batch).__name__}")


@padded.register
def _(batch: TokenBatch) -> TokenBatch:
    if not batch.direct:
        raise ValueError("cuda_graphs: expected one target for each row that is read")
    tokens = rounded(batch.input_ids.numel(), _LEAST["tokens"])
    segments = rounded(batch.layout.num_segments + 1, _LEAST["segments"])
    count = batch.rows.numel()
    wanted = min(rounded(count, _LEAST["rows"]), tokens)
    rows, real = _with_unread(batch.rows.numpy(), wanted, tokens)
    weights = np.zeros(wanted, np.float32)
    weights[real] = 1.0 if batch.token_weights is None else batch.token_weights.numpy()
    targets, sequence = np.zeros(wanted, np.int64), np.zeros(wanted, np.int64)
    targets[real], sequence[real] = batch.targets.numpy(), batch.sequence.numpy()
    return replace(
        batch,
        input_ids=_filled(batch.input_ids, tokens),
        layout=batch.layout.bucketed(tokens, segments),
        rows=torch.from_numpy(rows),
        source=torch.from_numpy(np.arange(wanted)),
        targets=torch.from_numpy(targets),
        sequence=torch.from_numpy(sequence),
        token_weights=torch.from_numpy(weights),
    )


@padded.register
def _(batch: PairBatch) -> PairBatch:
    # The number of pairs stays: a mean is over all of them.
    tokens = rounded(batch.input_ids.numel(), _LEAST["tokens"])
    segments = 3 * batch.num_pairs + 1
    return replace(
        batch,
        input_ids=_filled(batch.input_ids, tokens),
        layout=batch.layout.bucketed(tokens, segments),
    )


def _filled(ids: Tensor, size: int) -> Tensor:
    filled = np.zeros(size, np.int64)
    filled[: ids.numel()] = ids.numpy()
    return torch.from_numpy(filled)


def _with_unread(rows: np.ndarray, wanted: int, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows with others among 0..tokens-1 to make `wanted`, ascending, and which are the given."""
    read = np.zeros(tokens, bool)
    read[rows] = True
    unread = np.flatnonzero(~read)
    # The last ones are filling tokens, as far as there are any.
    every = np.sort(np.concatenate([rows, unread[len(unread) - (wanted - len(rows)) :]]))
    return every, read[every]

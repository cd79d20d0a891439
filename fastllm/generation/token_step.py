"""The token step made of single ops: for every device, and what other steps are tested by."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, fields
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from .. import ops
from ..model import Transformer
from ..ops.linear_logprob import wide_matmul
from .batch import Drawn, RunningBatch
from .cache import BLOCK, BlockCache, blocks_of
from .prefill import evaluating
from .sampling import Draw, SamplingRows, sample
from .upload import upload

Array = TypeVar("Array", np.ndarray, Tensor)


class OpByOpStep:
    """A `TokenStep` in PyTorch.

    Args:
        model: computes in evaluation mode.
        cache: keeps the keys and values.
        reason: why this step serves.
    """

    goes_on = False

    def __init__(self, model: Transformer, cache: BlockCache, reason: str) -> None:
        self.description = f"op by op on {cache.device.type}: {reason}"
        self._model, self._cache = model, cache
        self._head = head_weight(model)

    def __call__(self, batch: RunningBatch, steps: int) -> Drawn:
        with evaluating(self._model):
            drawn = [self._step(batch)]
            while len(drawn) < steps and not ended(batch).any():
                drawn.append(self._step(batch))
        return Drawn(*(np.stack(column) for column in zip(*drawn, strict=True)))

    def prefilling(self) -> contextlib.AbstractContextManager[None]:
        """Nothing serves but the ops."""
        return contextlib.nullcontext()

    def logits(self, hidden: Tensor) -> Tensor:
        """See `TokenStep`."""
        return wide_matmul(hidden, self._head.t())

    def _step(self, batch: RunningBatch) -> Drawn:
        rows = StepRows.next_of(batch)
        return draw(batch, self._logits(rows))

    def _logits(self, rows: StepRows) -> Tensor:
        """After the newest token of each row [B, V], fp32."""
        furthest = int(rows.position.max()) + 1
        return self._compute(rows.on(self._cache.device), furthest)

    def _compute(self, rows: StepRows[Tensor], furthest: int) -> Tensor:
        attend = DecodeAttend(self._cache, rows, furthest)
        return self.logits(self._model.model(rows.token, attend))


def draw(batch: RunningBatch, logits: Tensor, rows: np.ndarray | slice | None = None) -> Drawn:
    """Draw the next token of each row, and note it in the batch.

    Args:
        logits: [n, V], fp32.
        rows: which rows they are of [n]; None for all.

    Returns:
        Of one step, without its axis: [n].

    Raises:
        RuntimeError: logits that are not finite.
    """
    rows = slice(batch.size) if rows is None else rows
    numbers = SamplingRows.of(batch, rows, logits.device)
    drawn = _on_host(sample(logits, numbers, has_filters(batch, rows)))
    if not np.isfinite(drawn.logprobs).all():
        bad = int(np.flatnonzero(~np.isfinite(drawn.logprobs))[0])
        raise RuntimeError(f"the model's logits are not finite (row {bad} of {len(logits)})")
    batch.token[rows] = drawn.token_ids
    batch.count[rows] += 1
    batch.position[rows] += 1
    if batch.seen.shape[1]:
        batch.seen[np.arange(batch.capacity)[rows], drawn.token_ids] = 1
    return drawn


def has_filters(batch: RunningBatch, rows: np.ndarray | slice) -> bool:
    """Whether any of these rows draws from less than the whole vocabulary."""
    filters = (batch.top_k[rows] > 0) | (batch.top_p[rows] < 1) | (batch.min_p[rows] > 0)
    return bool((filters & (batch.temperature[rows] != 0)).any())


def _on_host(drawn: Draw) -> Drawn:
    """By one copy, for which a GPU is waited."""
    if drawn.token_ids.device.type == "cpu":
        return Drawn(*(column.numpy() for column in drawn))
    bits = [column.view(torch.int32) for column in drawn[1:]]
    columns = torch.stack((drawn.token_ids.int(), *bits)).cpu().numpy()
    return Drawn(columns[0].astype(np.int64), *columns[1:].view(np.float32))


def ended(batch: RunningBatch) -> np.ndarray:
    """Which rows have drawn their last token [B], bool."""
    return stopped(batch) | (batch.count[: batch.size] >= batch.max_count[: batch.size])


def stopped(batch: RunningBatch) -> np.ndarray:
    """Which rows have drawn a stop token [B], bool."""
    rows = slice(batch.size)
    return (batch.stop_tokens[rows] == batch.token[rows, None]).any(axis=1)


def head_weight(model: Transformer) -> Tensor:
    """The head in the dtype that its product is formed in, cast once and not at every token."""
    weight = model.lm_head.weight
    return weight.to(model.model.compute_dtype or weight.dtype)


@dataclass
class StepRows(Generic[Array]):
    """The newest tokens of the running batch, and where each of them goes and looks."""

    token: Array
    """[B], int64."""
    position: Array
    """[B]; this and all that follow are int32."""
    block: Array
    """Where the token's keys and values go: block [B]."""
    place: Array
    """Place in the block [B]."""
    group: Array
    """Prompt of each row [B]."""
    tail_length: Array
    """Tokens of its tail, the newest included [B]."""
    tail_blocks: Array
    """[B, J]."""
    prefix_length: Array
    """Tokens of each prompt [G]."""
    prefix_blocks: Array
    """[G, Jp]."""

    @classmethod
    def next_of(cls, batch: RunningBatch) -> StepRows[np.ndarray]:
        """Count the newest tokens of a batch in, and say where they go."""
        rows = slice(batch.size)
        tail_length = batch.tail_length[rows]
        block = batch.tail_blocks[np.arange(batch.size), tail_length // BLOCK]
        place = tail_length % BLOCK
        tail_length += 1
        # What lies beyond is of nobody: kernels choose by these sizes how to divide their work.
        prompts, blocks = int(batch.group[rows].max()) + 1, blocks_of(int(tail_length.max()))
        return StepRows(
            token=batch.token[rows],
            position=batch.position[rows],
            block=block,
            place=place,
            group=batch.group[rows],
            tail_length=tail_length,
            tail_blocks=batch.tail_blocks[rows, :blocks],
            prefix_length=batch.prefix_length[:prompts],
            prefix_blocks=batch.prefix_blocks[:prompts],
        )

    def on(self: StepRows[np.ndarray], device: torch.device) -> StepRows[Tensor]:
        """The same as tensors."""
        return StepRows(*upload([getattr(self, field.name) for field in fields(self)], device))


class DecodeAttend:
    """One new token for each row, over its prompt and its tail.

    Args:
        cache: where the keys and values of the new tokens go.
        rows: the new tokens.
        max_position: a bound on their positions, plus one.
    """

    def __init__(self, cache: BlockCache, rows: StepRows[Tensor], max_position: int) -> None:
        self._cache, self._rows = cache, rows
        self._block, self._place = rows.block.long(), rows.place.long()
        self.positions, self.max_position = rows.position, max_position

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None, window: int | None
    ) -> Tensor:
        self._cache.write_tokens(layer, k, v, self._block, self._place)
        return ops.decode_attention(
            q,
            self._cache.keys[layer],
            self._cache.values[layer],
            self._rows.prefix_blocks,
            self._rows.prefix_length,
            self._rows.group,
            self._rows.tail_blocks,
            self._rows.tail_length,
            window=window,
        )

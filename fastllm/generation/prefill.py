"""Prefill: prompts computed in one packed row, each once, their keys and values put into blocks.

A sequence that was preempted comes back here: the tokens that it had drawn are a segment with the
prompt as its prefix, so that they are computed once more, all at a time, and not drawn again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor, nn

from .. import ops
from ..layout import NO_PREFIX, PackedLayout
from ..model import Transformer
from .cache import BLOCK, BlockCache
from .requests import Request, Sequence
from .upload import upload


@dataclass
class Prefill:
    """What is computed in one packed row.

    Args:
        prompts: each once, however many sequences continue it.
        returning: preempted sequences whose prompts are among them, with the blocks of their tails.
    """

    prompts: list[Request] = field(default_factory=list)
    stored: list[bool] = field(default_factory=list)
    """Which prompts the cache has already."""
    returning: list[tuple[Sequence, np.ndarray]] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        tails = sum(sequence.count - 1 for sequence, _ in self.returning)
        return tails + sum(len(request.prompt) for request in self.prompts)

    def run(self, model: Transformer, cache: BlockCache) -> Tensor:
        """Fill the cache.

        Returns:
            The hidden state after each prompt that sequences are to begin from [P, C], in order.
        """
        device = cache.device
        tokens = [request.prompt for request in self.prompts]
        number = {request: place for place, request in enumerate(self.prompts)}
        prefix = [NO_PREFIX] * len(tokens)
        for sequence, _ in self.returning:
            assert sequence.tokens is not None
            tokens.append(sequence.tokens.token_ids[:-1])
            prefix.append(number[sequence.request])
        layout = PackedLayout([len(some) for some in tokens], prefix, device)
        last = [layout.offsets[i + 1] - 1 for i, r in enumerate(self.prompts) if r.not_begun]
        packed, rows, blocks, sources = upload(
            [np.concatenate(tokens), np.array(last, np.int64), *self._destinations(layout)], device
        )
        attend = PrefillAttend(layout, layout.select(last), cache, blocks, sources)
        with evaluating(model):
            return model.model(packed, attend, rows)

    def _destinations(self, layout: PackedLayout) -> tuple[np.ndarray, np.ndarray]:
        """The blocks to fill [n], and the packed rows that each of them gets [n, 64]."""
        owners = [
            (segment, request.blocks)
            for segment, request in enumerate(self.prompts)
            if not self.stored[segment]
        ]
        tails = enumerate(self.returning, len(self.prompts))
        owners += [(segment, blocks) for segment, (_, blocks) in tails]
        blocks, rows = [np.empty(0, np.int32)], [np.empty((0, BLOCK), np.int64)]
        for segment, owned in owners:
            assert owned is not None
            end = layout.offsets[segment + 1]
            first = layout.offsets[segment] + BLOCK * np.arange(len(owned))[:, None]
            rows.append(np.minimum(first + np.arange(BLOCK), end - 1))
            blocks.append(owned)
        return np.concatenate(blocks).astype(np.int64), np.concatenate(rows)


class PrefillAttend:
    """Reading packed prompts: plain packed attention that keeps what it computes.

    Args:
        layout: a segment for each prompt, and for each tail that continues one.
        selected: the same with queries for the rows whose hidden state is wanted.
        cache: gets the keys and values.
        blocks: its blocks that are filled [n], int64.
        sources: the packed rows that each block gets [n, 64], int64.
    """

    def __init__(
        self,
        layout: PackedLayout,
        selected: PackedLayout,
        cache: BlockCache,
        blocks: Tensor,
        sources: Tensor,
    ) -> None:
        self._layout, self._selected = layout, selected
        self._cache, self._blocks, self._sources = cache, blocks, sources
        self.positions, self.max_position = layout.positions, layout.max_position

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None, window: int | None
    ) -> Tensor:
        self._cache.write_rows(layer, k, v, self._blocks, self._sources)
        return ops.attention(
            q, k, v, self._layout if rows is None else self._selected, window=window
        )


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode; afterwards every module is in the mode that it was in."""
    training = [module for module in model.modules() if module.training]
    if training:
        model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True

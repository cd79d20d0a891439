"""The KV cache: one pool of blocks of 64 tokens, for prompts and for what is generated.

A prompt owns a list of blocks, stored once however many sequences continue it; each sequence
owns the blocks of its tail, the tokens that it generated. A block goes back to the pool the
moment its owner ends, and memory that was never needed is never touched.
"""

from __future__ import annotations

import os
import sys

import numpy as np
import torch
from torch import Tensor

from ..ops import cpp
from ..ops.decode_attention import BLOCK


class BlockCache:
    """Keys and values of every layer, in N blocks.

    Args:
        layers: how many layers keep keys and values.
        key_heads: heads of a token's keys (K).
        head_dim: numbers of a head (D).
        dtype: of what is kept.
        device: where it is kept.
        most_bytes: the pool never takes more; None for half of the memory that is free.
    """

    def __init__(
        self,
        layers: int,
        key_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        most_bytes: int | None = None,
    ) -> None:
        self.keys = [
            torch.empty(0, key_heads, head_dim, BLOCK, dtype=dtype, device=device)
            for _ in range(layers)
        ]
        """For each layer [N, K, D, 64]: the tokens of a block lie along memory."""
        self.values = [
            torch.empty(0, key_heads, BLOCK, head_dim, dtype=dtype, device=device)
            for _ in range(layers)
        ]
        """For each layer [N, K, 64, D]."""
        self.device = torch.device(device)
        self.block_bytes = 2 * layers * key_heads * head_dim * BLOCK * dtype.itemsize
        if most_bytes is None:
            most_bytes = _free_memory(self.device) // 2
        self.most_bytes = most_bytes
        self.most_blocks = min(most_bytes // self.block_bytes, np.iinfo(np.int32).max)
        self.version = 0
        """Counts the reallocations: who keeps an address must look at it again."""
        self.most_used = 0
        """Blocks in use at a time, at most, so far."""
        # A stack with the lowest block on top, so that an owner's blocks are neighbours where they
        # can be: a processor fetches ahead along memory. Blocks that nobody has had lie at the
        # bottom.
        self._free = np.empty(0, np.int32)
        self._num_free = self._untouched = 0
        self._in_order = True

    @property
    def capacity(self) -> int:
        """Blocks of the pool (N)."""
        return len(self._free)

    @property
    def free_blocks(self) -> int:
        return self._num_free

    @property
    def used_blocks(self) -> int:
        return self.capacity - self._num_free

    # -- whose blocks are whose ----------------------------------------------------------------

    def take(self, count: int) -> np.ndarray:
        """Blocks for a new owner [count], int32; there must be that many."""
        assert count <= self._num_free, f"{count} blocks wanted, {self._num_free} free"
        if not self._in_order:
            used_before = self._free[self._untouched : self._num_free]
            used_before[:] = np.sort(used_before)[::-1]
            self._in_order = True
        self._num_free -= count
        self._untouched = min(self._untouched, self._num_free)
        self.most_used = max(self.most_used, self.used_blocks)
        return self._free[self._num_free : self._num_free + count][::-1].copy()

    def give_back(self, blocks: np.ndarray) -> None:
        """Blocks whose owner has ended."""
        self._free[self._num_free : self._num_free + len(blocks)] = blocks[::-1]
        self._num_free += len(blocks)
        self._in_order = False

    def grow(self, capacity: int) -> None:
        """Make the pool at least `capacity` blocks, and never more than the budget."""
        before, capacity = self.capacity, min(capacity, self.most_blocks)
        if capacity <= before:
            return
        touched = before - self._untouched
        # One tensor after another, so that there is never a second pool beside the first.
        for tensors in (self.keys, self.values):
            for layer, old in enumerate(tensors):
                tensors[layer] = old.new_empty(capacity, *old.shape[1:])
                cpp.prefer_large_pages(tensors[layer])
                tensors[layer][:touched] = old[:touched]
        fresh = np.arange(capacity - 1, before - 1, -1, dtype=np.int32)
        taken = np.empty(before - self._num_free, np.int32)
        self._free = np.concatenate((fresh, self._free[: self._num_free], taken))
        self._num_free += len(fresh)
        self._untouched += len(fresh)
        self.version += 1

    # -- what is in them -----------------------------------------------------------------------

    def write_rows(self, layer: int, k: Tensor, v: Tensor, blocks: Tensor, rows: Tensor) -> None:
        """Fill whole blocks from packed keys and values.

        Args:
            k, v: [T, K, D].
            blocks: which blocks [n], int64.
            rows: the packed rows that each of them gets [n, 64], int64. What lies beyond the end
                of its owner is never read: any row will do.
        """
        shape, rows = (*rows.shape, *k.shape[1:]), rows.flatten()
        keys, values = k.index_select(0, rows).view(shape), v.index_select(0, rows).view(shape)
        self.keys[layer].index_copy_(0, blocks, keys.permute(0, 2, 3, 1))
        self.values[layer].index_copy_(0, blocks, values.permute(0, 2, 1, 3))

    def write_tokens(self, layer: int, k: Tensor, v: Tensor, blocks: Tensor, place: Tensor) -> None:
        """Put one token for each sequence.

        Args:
            k, v: [B, K, D].
            blocks: block of each token [B], int64.
            place: its place in the block [B], int64.
        """
        self.keys[layer][blocks, :, :, place] = k
        self.values[layer][blocks, :, place] = v


def blocks_of(tokens: int) -> int:
    """Blocks that so many tokens of one owner need."""
    return -(-tokens // BLOCK)


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    names = getattr(os, "sysconf_names", {})
    for pages in ("SC_AVPHYS_PAGES", "SC_PHYS_PAGES"):
        if pages in names:
            return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")
    return sys.maxsize

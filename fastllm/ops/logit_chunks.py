"""Logits of a chunk of rows at a time, and what the gradients get from each chunk.

One buffer holds the logits of a chunk, then their gradient, then the logits of the next chunk. The
products read and write it in place. On a GPU its rows begin at multiples of 64 bytes whatever the
vocabulary, so that they are read 16 bytes at a time; the columns in between are padding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .inputs import needs_grad
from .matmul import matmul

# Logits held at a time. A chunk must be tall enough to keep the matrix products at full speed
# (2,048 rows on a GPU, where fewer rows also mean more passes over the gradient of the weight) and
# small enough to be nothing beside the activations: on a GPU 1 GiB, on a CPU a ninth of the rows,
# which is less than 1/16 of what a head takes that keeps all logits and makes their gradient beside
# them.
_CHUNK_ELEMENTS = {"cpu": 1 << 23, "cuda": 1 << 29}
_FEWEST_ROWS = {"cpu": 64, "cuda": 2048}
_CPU_SHARE, _FEWEST_ELEMENTS = 9, 1 << 18
# Rows of a product's tile on a GPU, and elements between the beginnings of its rows.
_TILE_ROWS, _ALIGNMENT = 128, 32

Statistics = tuple[Tensor, Tensor, Tensor]
"""Log-probabilities, entropies and log-sum-exps of some rows, fp32."""


class Chunks:
    """Rows of hidden states in chunks, with the logits of one of them at a time.

    Args:
        hidden: [N, C]. weight: [V, C], of the same dtype.
        temperature, softcap: of the logits; 0 for no softcap.
        dtype: of the logits.
        raw: the kernels of linear_logprob.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        temperature: float,
        softcap: float,
        dtype: torch.dtype,
        raw: Any,
    ) -> None:
        rows, self._vocabulary = hidden.shape[0], weight.shape[0]
        self._hidden, self._columns = hidden, weight.t()
        self._raw = raw
        self._options: tuple[float | int, ...] = temperature, softcap
        self._in_place = getattr(raw, "IN_PLACE", False)
        self.size = chunk_rows(hidden, weight, dtype)
        width = self._vocabulary
        if self._in_place:
            width = -(-width // _ALIGNMENT) * _ALIGNMENT
            self._options = (*self._options, self._vocabulary)
        self._buffer = hidden.new_empty(min(rows, self.size), width, dtype=dtype)

    def __len__(self) -> int:
        return max(1, -(-self._hidden.shape[0] // self.size))

    def __iter__(self) -> Iterator[slice]:
        rows = self._hidden.shape[0]
        for first in range(0, max(rows, 1), self.size):
            yield slice(first, min(first + self.size, rows))

    def statistics(self, rows: slice, targets: Tensor) -> Statistics:
        """Of the targets of some rows; `targets` and all other vectors here are those of all."""
        return self._raw.forward(self._logits(rows), targets[rows], *self._options)

    def gradient(self, rows: slice, *per_row: Tensor) -> Tensor:
        """The gradient of some rows' logits, [n, V], in the dtype of the hidden states.

        `per_row`: targets, lse, entropy, dlogp, dentropy.
        """
        return self._overwritten(self._logits(rows), [t[rows] for t in per_row])

    def statistics_and_gradient(
        self, rows: slice, targets: Tensor, dlogp: Tensor
    ) -> tuple[Statistics, Tensor]:
        """Both, for a loss of which `dlogp` is the gradient."""
        logits, ids, dlogp = self._logits(rows), targets[rows], dlogp[rows]
        if self._in_place:
            dtype = self._hidden.dtype
            found = self._raw.forward_backward_(logits, ids, dlogp, *self._options, dtype)
            return found, self._gradient_in(logits)
        logp, entropy, lse = self._raw.forward(logits, ids, *self._options)
        given = [ids, lse, entropy, dlogp, torch.zeros_like(dlogp)]
        return (logp, entropy, lse), self._overwritten(logits, given)

    def _logits(self, rows: slice) -> Tensor:
        """The logits of some rows, with the padding."""
        logits = self._buffer[: rows.stop - rows.start]
        product = matmul if logits.dtype == self._hidden.dtype else wide_matmul
        product(self._hidden[rows], self._columns, self._in_columns(logits))
        return logits

    def _overwritten(self, logits: Tensor, per_row: Sequence[Tensor]) -> Tensor:
        dtype = self._hidden.dtype
        if self._in_place:
            self._raw.backward_(logits, *per_row, *self._options, dtype)
            return self._gradient_in(logits)
        self._raw.backward_(logits, *per_row, *self._options)
        # They were formed in fp32; the products read them in the dtype of the hidden states.
        return logits.to(dtype)

    def _gradient_in(self, logits: Tensor) -> Tensor:
        """Where the kernels leave a gradient in the dtype of the hidden states."""
        if logits.dtype != self._hidden.dtype:
            logits = logits.view(self._hidden.dtype)[:, -logits.shape[1] :]
        return self._in_columns(logits)

    def _in_columns(self, padded: Tensor) -> Tensor:
        return padded if padded.shape[1] == self._vocabulary else padded[:, : self._vocabulary]


class Gradients:
    """The gradients of the hidden states and of the weight, chunk by chunk of rows.

    That of the weight is one product for each chunk. Over several chunks it is summed in fp32 by
    the products themselves; if there is one chunk, it may be made in a narrower weight's dtype.

    Args:
        hidden: [N, C].
        weight: the parameter [V, C].
        narrow: the same in the dtype of hidden.
        chunks: how many there will be.
        raw: the kernels of linear_logprob.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        narrow: Tensor,
        chunks: int,
        raw: Any,
        needs_hidden: bool,
        needs_weight: bool,
    ) -> None:
        self._rows, self._narrow = hidden, narrow
        self.hidden = hidden.new_empty(hidden.shape) if needs_hidden else None
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        if chunks == 1 and weight.dtype == hidden.dtype and getattr(raw, "IN_PLACE", False):
            dtype = weight.dtype
        self.weight = weight.new_empty(weight.shape, dtype=dtype) if needs_weight else None
        self._begun = False

    def add(self, rows: slice, dlogits: Tensor) -> None:
        """Add what the rows' dlogits [n, V] give."""
        if self.hidden is not None:
            matmul(dlogits, self._narrow, out=self.hidden[rows])
        if self.weight is not None:
            product = matmul if self.weight.dtype == dlogits.dtype else wide_matmul
            product(dlogits.t(), self._rows[rows], self.weight, add=self._begun)
            self._begun = True


def chunk_rows(hidden: Tensor, weight: Tensor, dtype: torch.dtype = torch.float32) -> int:
    """Rows of a chunk of logits of this dtype."""
    return rows_at_once(hidden.shape[0], weight.shape[0], dtype.itemsize, hidden.is_cuda)


def rows_at_once(rows: int, vocabulary: int, itemsize: int, on_gpu: bool) -> int:
    """How many of `rows` have their logits, of `itemsize` bytes each, at one time."""
    if not on_gpu:
        fewest = max(_FEWEST_ROWS["cpu"], _FEWEST_ELEMENTS // vocabulary)
        return max(fewest, min(-(-rows // _CPU_SHARE), _CHUNK_ELEMENTS["cpu"] // vocabulary))
    most = max(_FEWEST_ROWS["cuda"], _CHUNK_ELEMENTS["cuda"] * 2 // itemsize // vocabulary)
    # As even as whole tiles allow: a last chunk of a few rows would be as slow as a full one.
    size = -(-rows // -(-max(rows, 1) // most))
    tile = min(_TILE_ROWS, most)
    return max(tile, -(-size // tile) * tile)


def wide_matmul(a: Tensor, b: Tensor, out: Tensor | None = None, add: bool = False) -> Tensor:
    """a b with an fp32 result (fp64 for fp64), in the tensor cores' precision on a GPU.

    Args:
        out: where to put the result; a new tensor when None.
        add: add to `out` instead.
    """
    wide = torch.promote_types(a.dtype, torch.float32)
    if needs_grad(a, b):
        # PyTorch has no gradient for products that widen.
        return a.to(wide) @ b.to(wide)
    narrow = {a.dtype, b.dtype} & {torch.bfloat16, torch.float16}
    if a.is_cuda and narrow:
        dtype = narrow.pop()
        a, b = a.to(dtype), b.to(dtype)
    return matmul(a, b, out, add, dtype=wide)


def joined(parts: Sequence[Statistics]) -> Statistics:
    """The statistics of all rows from those of the chunks."""
    if len(parts) == 1:
        return parts[0]
    logp, entropy, lse = (torch.cat(column) for column in zip(*parts, strict=True))
    return logp, entropy, lse

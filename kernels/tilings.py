"""Tile sizes and schedules of the attention kernels, by head size, element size and vendor.

Each entry is a large tile whose registers do not spill, as the compilers of `tests/kernels/
test_aot.py` report it. The exception is fp32 with heads wider than 128, which no tile fits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from .launch import is_cuda
from .tiles import head_block


class Tiling(NamedTuple):
    """Rows of a query tile and of a key tile, warps of a program, stages of the pipeline."""

    queries: int
    keys: int
    warps: int
    stages: int


# (bytes of an element, columns of a head's tile) -> tiling
_FORWARD = {
    (2, 64): Tiling(128, 64, 8, 3),
    (2, 128): Tiling(128, 64, 8, 2),
    (2, 256): Tiling(64, 32, 8, 2),
    (4, 64): Tiling(32, 32, 4, 1),
    (4, 128): Tiling(16, 32, 4, 1),
    (4, 256): Tiling(16, 16, 8, 1),
}
_DQ = {
    (2, 64): Tiling(64, 64, 4, 2),
    (2, 128): Tiling(64, 64, 8, 2),
    (2, 256): Tiling(32, 32, 8, 1),
    (4, 64): Tiling(16, 32, 4, 1),
    (4, 128): Tiling(16, 32, 4, 1),
    (4, 256): Tiling(16, 16, 8, 1),
}
_DKDV = {
    (2, 64): Tiling(32, 64, 4, 2),
    (2, 128): Tiling(32, 64, 8, 2),
    (2, 256): Tiling(32, 32, 8, 1),
    (4, 64): Tiling(16, 32, 4, 1),
    (4, 128): Tiling(16, 16, 4, 1),
    (4, 256): Tiling(16, 16, 8, 1),
}
# Blackwell keeps products in tensor memory, and reads them from there into registers.
_DKDV_BLACKWELL = _DKDV | {
    (2, 64): Tiling(32, 64, 8, 2),
    (2, 128): Tiling(32, 64, 8, 1),
}
# AMD: no asynchronous copies to overlap, 64 threads in a warp, 64 KiB of shared memory.
_FORWARD_AMD = _FORWARD | {
    (2, 64): Tiling(128, 64, 4, 1),
    (2, 128): Tiling(128, 64, 4, 1),
    (2, 256): Tiling(64, 32, 4, 1),
}
_DQ_AMD = _DQ | {
    (2, 64): Tiling(64, 64, 4, 1),
    (2, 128): Tiling(64, 64, 4, 1),
    (2, 256): Tiling(32, 32, 4, 1),
}
_DKDV_AMD = _DKDV | {
    (2, 64): Tiling(64, 64, 4, 1),
    (2, 128): Tiling(32, 64, 4, 1),
    (2, 256): Tiling(16, 32, 4, 1),
}


def forward_tiling(q: Tensor, layout: Any) -> Tiling:
    """For the forward pass, one program per query tile."""
    return _fit((_FORWARD if is_cuda() else _FORWARD_AMD)[_key(q)], layout)


def dq_tiling(q: Tensor, layout: Any) -> Tiling:
    """For the gradient of queries, one program per query tile."""
    return _fit((_DQ if is_cuda() else _DQ_AMD)[_key(q)], layout)


def dkdv_tiling(q: Tensor) -> Tiling:
    """For the gradients of keys and values, one program per key tile."""
    if is_cuda(minimum_arch=100):
        return _DKDV_BLACKWELL[_key(q)]
    return (_DKDV if is_cuda() else _DKDV_AMD)[_key(q)]


def _key(q: Tensor) -> tuple[int, int]:
    return q.element_size(), max(64, head_block(q.shape[2]))


def _fit(tiling: Tiling, layout: Any) -> Tiling:
    """Shorter query tiles when segments are short: a tile never reaches into the next segment."""
    queries = layout.num_queries / max(1, layout.num_segments)
    if queries <= 16:
        return Tiling(16, 32, 4, tiling.stages)
    if queries <= 64 and tiling.queries > 64:
        return tiling._replace(queries=64)
    return tiling

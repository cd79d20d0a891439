"""Section `roofline`: what this machine can do, measured, and the share of it that work reaches.

Three rates: bytes moved by a copy (each byte read once and written once; the best of PyTorch's and
the C library's, which bypasses the caches) of a footprint like the work's, so that what fits a
cache is held against the cache; bytes that are only read, likewise; and operations of a large
matrix product, the best that anyone here reaches in that dtype.
"""

from __future__ import annotations

import ctypes
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch
from torch import Tensor

from .harness import Block, in_turns, repeated
from .options import Options
from .records import OURS, Record

NAME = "roofline"

_LIBC = ctypes.CDLL(None)
_LIBC.memchr.restype = ctypes.c_void_p

# Bytes read and written by one copy.
FOOTPRINTS = tuple(1 << power for power in range(16, 30))
MATRIX = 2048


def run(options: Options) -> Iterator[Record]:
    """The copies and the reads by footprint, and the matrix products by dtype."""
    for measured in (_copies, _reads):
        for footprint in FOOTPRINTS[2::5] if options.quick else FOOTPRINTS:
            yield from measured(footprint, options)
    for dtype in options.dtypes:
        yield from _products(dtype, options)


def fractions(
    rounds: Mapping[str, tuple[float, ...]],
    amount: float,
    unit: str,
    dtype: str,
    options: Options,
) -> dict[str, float]:
    """Share of the roofline that each contender's median reaches; `amount` in B or FLOP."""
    most = _copy_rate(amount, options) if unit == "B" else product_rate(dtype, options)
    return {name: amount / statistics.median(taken) / most for name, taken in rounds.items()}


def read_rate(amount: float, options: Options) -> float:
    """Bytes per second that can be read of as many bytes, again and again."""
    return _best(_reads(_footprint(amount), options))


def product_rate(dtype: str, options: Options) -> float:
    """Operations per second of a large matrix product."""
    return _best(_products(dtype, options))


def _copy_rate(amount: float, options: Options) -> float:
    """Of a copy that moves about as much."""
    return _best(_copies(_footprint(amount), options))


def _footprint(amount: float) -> int:
    """The nearest power of two that is measured."""
    nearest = 2 ** round(math.log2(max(amount, 1)))
    return min(max(nearest, FOOTPRINTS[0]), FOOTPRINTS[-1])


def _best(records: Iterable[Record]) -> float:
    """What the machine can do is what it did in the best round of anybody."""
    return max(record.work / min(record.rounds) for record in records)


@cache
def _copies(footprint: int, options: Options) -> tuple[Record, ...]:
    source = torch.ones(footprint // 2, dtype=torch.uint8, device=options.device)
    target = torch.empty_like(source)
    as_floats = (target.view(torch.float32), source.view(torch.float32))
    blocks = {"torch.copy_": repeated(lambda: as_floats[0].copy_(as_floats[1]), options.device)}
    if options.device == "cpu":
        with ThreadPoolExecutor(options.threads) as pool:
            blocks["memmove"] = repeated(_memmove(target, source, options.threads, pool))
            turns = in_turns(blocks, _rounds(options))
    else:
        turns = in_turns(blocks, _rounds(options))
    what = NAME, "copy", _size(footprint)
    return tuple(turns.records(*what, work=footprint, unit="B", axis="footprint", x=footprint))


def _memmove(target: Tensor, source: Tensor, threads: int, pool: ThreadPoolExecutor) -> Callable:
    """The C library's copy, a slice on each thread (it does not hold the interpreter's lock)."""
    parts = list(zip(target.chunk(threads), source.chunk(threads), strict=True))
    calls = [(to.data_ptr(), of.data_ptr(), of.numel()) for to, of in parts]
    if threads == 1:
        return lambda: ctypes.memmove(*calls[0])
    return lambda: list(pool.map(lambda call: ctypes.memmove(*call), calls))


def reading(amount: int, threads: int, pool: ThreadPoolExecutor) -> Callable[[], object]:
    """Something that reads that many bytes on the CPU, two streams on each thread."""
    values = torch.ones(amount // 4)
    parts = [(part.data_ptr(), part.nbytes) for part in values.chunk(threads)]
    read = _on_each_thread(_compare, parts, pool)

    def keeping_alive() -> object:
        return values is not None and read()

    return keeping_alive


@cache
def _reads(footprint: int, options: Options) -> tuple[Record, ...]:
    """A sum, and the C library's search and comparison: one and two streams on each thread."""
    values = torch.ones(footprint // 4, device=options.device)
    blocks = {"torch.sum": repeated(values.sum, options.device)}
    if options.device == "cpu":
        parts = [(part.data_ptr(), part.nbytes) for part in values.chunk(options.threads)]
        with ThreadPoolExecutor(options.threads) as pool:
            for name, read in (("memchr", _search), ("memcmp", _compare)):
                blocks[name] = repeated(_on_each_thread(read, parts, pool))
            turns = in_turns(blocks, _rounds(options))
    else:
        turns = in_turns(blocks, _rounds(options))
    what = NAME, "read", _size(footprint)
    return tuple(turns.records(*what, work=footprint, unit="B", axis="footprint", x=footprint))


def _search(start: int, size: int) -> None:
    """Look for a byte that a float of 1 does not have."""
    found = _LIBC.memchr(ctypes.c_void_p(start), 1, ctypes.c_size_t(size))
    if found:
        raise AssertionError("memchr has found what is not there: it has not read everything")


def _compare(start: int, size: int) -> None:
    """Compare one half with the other."""
    half = size // 8 * 4
    first, second = ctypes.c_void_p(start), ctypes.c_void_p(start + half)
    if _LIBC.memcmp(first, second, ctypes.c_size_t(half)):
        raise AssertionError("memcmp has found a difference: it has not read everything")


def _on_each_thread(
    read: Callable[[int, int], None], parts: list[tuple[int, int]], pool: ThreadPoolExecutor
) -> Callable[[], object]:
    if len(parts) == 1:
        return lambda: read(*parts[0])
    return lambda: list(pool.map(lambda part: read(*part), parts))


@cache
def _products(dtype: str, options: Options) -> tuple[Record, ...]:
    size = 1024 if options.quick else MATRIX
    a = torch.randn(size, size, device=options.device).to(getattr(torch, dtype))
    b = torch.randn(size, size, device=options.device).to(getattr(torch, dtype))
    blocks: dict[str, Block] = {"torch.mm": repeated(lambda: torch.mm(a, b), options.device)}
    ours = our_product()
    if ours is not None and options.device == "cpu":
        blocks[OURS] = repeated(lambda: ours(a, b))
    turns = in_turns(blocks, _rounds(options))
    what = NAME, "matrix product", f"{size}x{size}x{size}", dtype
    return tuple(turns.records(*what, work=2.0 * size**3, unit="FLOP"))


def our_product() -> Callable[[Tensor, Tensor], Tensor] | None:
    """This project's matrix product, where it is built."""
    from fastllm.ops import cpp

    if not cpp.available():
        return None
    try:
        from fastllm.ops.matmul import matmul
    except ModuleNotFoundError:
        return None
    return matmul


def _rounds(options: Options) -> int:
    return 3 if options.quick else 5


def _size(count: int) -> str:
    return f"{count >> 20} MiB" if count >= 1 << 20 else f"{count >> 10} KiB"

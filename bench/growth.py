"""Section `growth`: time per token of a whole SFT step against length, batch, width, vocabulary.

Beside each figure stands what arithmetic predicts: the first point's time, scaled by the
operations of matrix products and attention. A curve that stays on it grows no faster than the
work does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from .harness import in_turns
from .options import Options
from .records import OURS, Record
from .training_steps import PEER, Mismatch, Work, blocks, has_peer

NAME = "growth"

BASE = Work()

# At 16,384 and more a plain step takes a minute on two cores: ours goes on alone.
PEER_LENGTH = 8192
# The tokens of a step are the same until a single sequence has more.
TOKENS, QUICK_TOKENS = 8192, 2048
LONG_ROUNDS = 3


def run(options: Options) -> Iterator[Record]:
    """One curve per axis and dtype."""
    if not has_peer():
        note = "transformers is not installed: the losses are not checked"
        yield Record(NAME, "SFT step", "", "", PEER, note=note)
    for axis, points in curves(options.quick).items():
        # Length is where dtypes part ways: attention takes over from the matrix products.
        every = axis == "length" and not options.quick
        if options.wants(axis):
            for dtype in options.dtypes if every else options.dtypes[:1]:
                yield from curve(axis, points, dtype, options)


def curves(quick: bool) -> dict[str, dict[int, Work]]:
    """The points of each axis."""
    tokens = QUICK_TOKENS if quick else TOKENS
    lengths = (1024,) if quick else tuple(256 << power for power in range(8))
    batches = (2,) if quick else (1, 2, 4, 8, 16, 32)
    widths = (64,) if quick else (64, 128, 256, 512, 768)
    vocabularies = (1024,) if quick else (1024, 4096, 16384, 32768, 131072)
    wide = replace(BASE, batch=4)
    return {
        "length": {n: replace(BASE, length=n, batch=max(1, tokens // n)) for n in lengths},
        "batch": {n: replace(BASE, batch=n) for n in batches},
        "width": {n: replace(wide, width=n, heads=n // 32, key_heads=n // 64) for n in widths},
        "vocabulary": {n: replace(wide, vocabulary=n) for n in vocabularies},
    }


def curve(axis: str, points: dict[int, Work], dtype: str, options: Options) -> Iterator[Record]:
    """The points of one axis, from the smallest on."""
    first: dict[str, float] = {}
    start = next(iter(points.values()))
    for x, work in points.items():
        case = f"{work.batch} x {work.length}, width {work.width}, vocabulary {work.vocabulary}"
        try:
            found = blocks(work, dtype, _steps(work, options), options.device, not _long(work))
        except Mismatch as error:
            yield Record(NAME, f"SFT step by {axis}", case, dtype, OURS, note=str(error))
            continue
        rounds = min(options.rounds, LONG_ROUNDS) if _long(work) else options.rounds
        turns = in_turns(found, rounds)
        growth = work.flops / start.flops
        expected = {name: first[name] * growth for name in found if name in first}
        for record in turns.records(
            NAME,
            f"SFT step by {axis}",
            case,
            dtype,
            work=work.tokens,
            unit="tokens",
            axis=axis,
            x=x,
            expected=expected,
            note="alone: not compared at this length" * _long(work),
        ):
            if record.seconds is not None:
                first.setdefault(record.contender, record.seconds)
            yield record


def _long(work: Work) -> bool:
    return work.length > PEER_LENGTH


def _steps(work: Work, options: Options) -> int:
    """So many that a block is long enough to time, and no longer."""
    return 1 if options.quick else max(1, min(10, round(3e11 / work.flops)))

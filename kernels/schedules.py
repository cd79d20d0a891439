"""The work lists of the attention kernels, made on the host for each batch.

Two schedules: tiles of queries, and tiles of keys. An entry says all that a program has to know,
so that nothing is searched for on the GPU, and the entries are in the order of falling work:
processors take them from the front, the longest first, and finish at about the same time.

A tile of queries is a few queries in a row: of one segment, of a segment and those that continue
it, or of several short segments. It sees two spans of rows at most. A tile of keys is seen by runs
of queries: mostly by a single one, since those that continue a segment tend to follow it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

# Processors to balance over. A constant, since the division of sums decides their last bits.
PROCESSORS = 132
# A piece of work is at most this part of what a processor has to do, where work is divided.
SHARE = 3
# Work, in blocks, below which a piece is never divided.
LEAST = 16
# Segments up to this many blocks share tiles with their neighbours.
SHORT = 4
# Where runs of queries begin: at 16 bytes of fp32, as bulk copies want it.
ALIGNED = 4


def query_schedule(layout: Any, block_m: int, block_n: int, window: int) -> tuple[np.ndarray, ...]:
    """Tiles of at most `block_m` queries, and the blocks of `block_n` keys that they see.

    Args:
        layout: a `PackedLayout.host`.
        window: how many positions a query sees, itself included; 0 for all.

    Returns:
        tiles [n, 12]: first query, count; the first row, end, blocks before the whole ones and
            whole blocks of two spans; whole blocks and other blocks of both.
    """
    bounds, has_prefix = query_bounds(layout, window)
    first, count = _tiles(layout, layout.query_starts, block_m, families=True)
    if not len(first):
        return (_padded(np.zeros((0, 12)), _most_tiles(layout, block_m)),)
    low, high, root_low, root_high = bounds
    last = first + count - 1
    # Rows ascend, so a tile's first query has the lowest bounds and its last one the highest.
    spans = np.zeros((2, 4, len(first)), dtype=np.int64)
    spans[1] = low[first], high[last] + 1, low[last], high[first] + 1
    if has_prefix is not None:
        _add_prefixes(spans, first, root_low, root_high, has_prefix)
    cuts = [cut(span[0], span[1], span[2], span[3], block_n) for span in spans]
    whole = cuts[0][2] + cuts[1][2]
    blocks = cuts[0][0] + cuts[1][0]
    columns = [first, count]
    for span, (_, leading, inside) in zip(spans, cuts, strict=True):
        columns += [span[0], span[1], leading, inside]
    tiles = np.stack([*columns, whole, blocks - whole], axis=1)
    order = np.argsort(-blocks, kind="stable")
    return (_padded(tiles[order], _most_tiles(layout, block_m)),)


def query_bounds(layout: Any, window: int) -> tuple[np.ndarray, np.ndarray | None]:
    """The rows that each query sees, and which queries see a prefix; None where none does.

    Returns:
        bounds [4, N]: the first and the last row that a query sees in its own segment; the same in
            the segment that this one continues, or again its own where there is none.
    """
    starts, prefix, rows = layout.starts, layout.prefix, layout.query_rows
    counts = np.diff(layout.query_starts)
    bounds = np.empty((4, len(rows)), dtype=np.int32)
    low, high, root_low, root_high = bounds
    high[:] = rows
    low[:] = np.repeat(starts[:-1], counts)
    if window:
        np.maximum(low, high - (window - 1), out=low)
    bounds[2:] = bounds[:2]
    lengths = np.diff(starts)
    before = np.where(prefix >= 0, lengths[prefix], 0) if len(prefix) else lengths
    if not before.any():
        return bounds, None
    sees = np.repeat(before > 0, counts)
    first = np.repeat(starts[prefix], counts)[sees]
    root_high[sees] = first + np.repeat(before, counts)[sees] - 1
    if window:
        position = (rows + np.repeat(before - starts[:-1], counts))[sees]
        first += np.maximum(position - (window - 1), 0)
    root_low[sees] = first
    empty = sees & (root_high < root_low)
    root_low[empty], root_high[empty] = 0, -1
    return bounds, sees & ~empty


def _add_prefixes(
    spans: np.ndarray,
    first: np.ndarray,
    root_low: np.ndarray,
    root_high: np.ndarray,
    has_prefix: np.ndarray,
) -> None:
    """Fills in the spans that are prefixes, or joins them with the tile's own rows."""
    far = np.iinfo(np.int32).max
    low = np.where(has_prefix, root_low, far)
    high = np.where(has_prefix, root_high, -1)
    start, end = np.minimum.reduceat(low, first), np.maximum.reduceat(high, first) + 1
    sees = end > 0
    apart = sees & ((end <= spans[1, 0]) | (start >= spans[1, 1]))
    all_from, all_to = np.maximum.reduceat(low, first), np.minimum.reduceat(high, first) + 1
    spans[0] = np.where(apart, np.stack((start, end, all_from, all_to)), 0)
    # Where a prefix and rows of its own lie together, every query sees this part of them whole.
    all_from, all_to = np.maximum.reduceat(root_low, first), np.minimum.reduceat(root_high, first)
    joined = np.stack(
        (np.minimum(start, spans[1, 0]), np.maximum(end, spans[1, 1]), all_from, all_to + 1)
    )
    spans[1] = np.where(sees & ~apart, joined, spans[1])


class Runs(NamedTuple):
    """Runs of queries that see a tile: tile, first query, end, and those that see all of it."""

    tile: np.ndarray
    first: np.ndarray
    end: np.ndarray
    whole_first: np.ndarray
    whole_end: np.ndarray

    def where(self, chosen: np.ndarray | slice) -> Runs:
        return Runs(*(column[chosen] for column in self))


def key_schedule(
    layout: Any, block_m: int, block_n: int, window: int, group: int, key_heads: int
) -> tuple[np.ndarray, ...]:
    """Tiles of at most `block_n` keys in pieces of bounded work.

    Args:
        group: query heads of a key head.
        key_heads: how many there are: each does all pieces.

    Returns:
        pieces [n, 8]: first row, count, first run, end, first head of the group, heads, part (-1:
            the piece is a whole tile), and which bounds of the queries tell who sees the tile.
        runs [m, 5]: first query, end, blocks before the whole ones, whole blocks, blocks.
        divided [d, 4]: tiles that are sums of parts: first row, count, first part, end.
        parts [p]: the piece of each part.
    """
    first, count = _tiles(layout, layout.starts, block_n, families=False)
    root = layout.prefix[np.searchsorted(layout.starts, first, side="right") - 1] < 0
    runs = _joined(_runs(layout, first, count, root, window))
    tiles, most = _most_tiles(layout, block_n, keys=True), 2 * SHARE * PROCESSORS // key_heads
    division = _divide(runs, len(first), block_m, group, key_heads)
    if tiles is not None and len(division.runs.tile) > tiles + most:
        division = _divide(_hulls(runs), len(first), block_m, group, key_heads)
    pieces, table, part = _pieces(division, block_m, group)
    tile = pieces[:, 0]
    which = np.where(root, 2, 0)
    columns = (first[tile], count[tile], *pieces.T[1:], which[tile])
    parts = np.flatnonzero(part >= 0)
    in_parts = np.bincount(tile[parts], minlength=len(first))
    divided = np.flatnonzero(in_parts)
    # Parts are numbered tile after tile, and in this order they are added.
    end = np.cumsum(in_parts[divided])
    sums = np.stack((first[divided], count[divided], end - in_parts[divided], end), axis=1)
    tables = (np.stack(columns, axis=1), table, sums, parts)
    if tiles is None:
        return tables
    bounds = (tiles + most, tiles + most, most // 2, most)
    return tuple(_padded(table, rows) for table, rows in zip(tables, bounds, strict=True))


class Division(NamedTuple):
    """Runs in slices (their `tile`), the tile of each slice, and in how many by head it is cut."""

    runs: Runs
    slice_tile: np.ndarray
    by_head: np.ndarray


def _divide(runs: Runs, tiles: int, block_m: int, group: int, key_heads: int) -> Division:
    """Divides the work of tiles, first among the heads of the group, then among queries."""
    blocks = -(-(runs.end - runs.first) // block_m)
    work = np.bincount(runs.tile, blocks, minlength=tiles).astype(np.int64) * group
    limit = max(LEAST, -(-int(work.sum()) * key_heads // (PROCESSORS * SHARE)))
    wanted = np.maximum(-(-work // limit), 1)
    by_head = np.minimum(wanted, group)
    by_query = -(-wanted // by_head)
    slices, slice_tile = _sliced(runs, blocks, by_query, block_m)
    return Division(slices, slice_tile, by_head[slice_tile])


def _pieces(
    division: Division, block_m: int, group: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The pieces in order of falling work.

    Returns:
        pieces [n, 6]: tile, first run, end, first head, heads, part; runs; the part of each piece.
    """
    runs, slice_tile, by_head = division
    blocks, leading, inside = cut(*runs[1:], block_m)
    of_slice = np.bincount(runs.tile, minlength=len(slice_tile))
    run_end = np.cumsum(of_slice)
    piece_slice = np.repeat(np.arange(len(slice_tile)), by_head)
    tile, ways, member = slice_tile[piece_slice], by_head[piece_slice], _places(by_head)
    first_head = member * group // ways
    heads = (member + 1) * group // ways - first_head
    in_parts = np.bincount(tile)[tile] > 1
    part = np.where(in_parts, np.cumsum(in_parts) - 1, -1)
    run_first = (run_end - of_slice)[piece_slice]
    pieces = np.stack((tile, run_first, run_end[piece_slice], first_head, heads, part), axis=1)
    work = np.bincount(runs.tile, blocks, minlength=len(slice_tile))[piece_slice] * heads
    order = np.argsort(-work, kind="stable")
    table = np.stack((runs.first, runs.end, leading, inside, blocks), axis=1)
    return pieces[order], table, part[order]


def _runs(layout: Any, first: np.ndarray, count: np.ndarray, root: np.ndarray, window: int) -> Runs:
    """The queries of each segment that see a tile: of its own, and of those that continue it."""
    starts, prefix = layout.starts, layout.prefix
    last = first + count - 1
    own = np.searchsorted(starts, first, side="right") - 1
    own_last = np.searchsorted(starts, last, side="right") - 1
    far = window or starts[-1] + 1
    until = np.minimum(starts[own_last + 1], last + far)
    whole_until = np.where(own == own_last, np.minimum(starts[own + 1], first + far), last)
    tiles = [np.arange(len(first))]
    columns = [np.stack((first, until, last, np.maximum(whole_until, last)))]

    children = np.flatnonzero(prefix >= 0)
    if len(children):
        # A pair for each tile of a prefix and each segment that continues it.
        of_tile = np.bincount(prefix[children], minlength=len(prefix))[own] * root
        by_parent = children[np.argsort(prefix[children], kind="stable")]
        begin = np.searchsorted(prefix[by_parent], own)
        tile = np.repeat(np.arange(len(first)), of_tile)
        child = by_parent[begin[tile] + _places(of_tile)]
        # What a key's row is, counted as if the child followed its prefix at once.
        shift = starts[child] - starts[own[tile] + 1]
        child_end = starts[child + 1]
        columns.append(
            np.stack(
                (
                    starts[child],
                    np.minimum(child_end, last[tile] + shift + far),
                    starts[child],
                    np.minimum(child_end, first[tile] + shift + far),
                )
            )
        )
        tiles.append(tile)
    rows = np.concatenate(columns, axis=1)
    queries = rows if layout.every_row else np.searchsorted(layout.query_rows, rows)
    runs = Runs(np.concatenate(tiles), *queries)
    runs = runs.where(runs.end > runs.first)
    none = runs.whole_end <= runs.whole_first
    whole_first = np.where(none, runs.end, runs.whole_first)
    whole_end = np.where(none, runs.end, np.minimum(runs.whole_end, runs.end))
    runs = runs._replace(whole_first=whole_first, whole_end=whole_end)
    return runs.where(np.lexsort((runs.first, runs.tile)))


def _joined(runs: Runs) -> Runs:
    """Runs of one tile that follow each other as one, each beginning at a multiple of ALIGNED."""
    runs = runs._replace(first=runs.first // ALIGNED * ALIGNED)
    if len(runs.tile) < 2:
        return runs
    before, after = runs.where(slice(None, -1)), runs.where(slice(1, None))
    goes_on = (before.tile == after.tile) & (before.end >= after.first)
    none = (before.whole_first == before.whole_end) & (after.whole_first == after.whole_end)
    # The whole parts of both are one, or the joined run has none.
    broken = goes_on & ~none & (after.whole_first != before.whole_end)
    return _merged(runs, np.flatnonzero(np.append(True, ~goes_on)), np.append(False, broken))


def _hulls(runs: Runs) -> Runs:
    """One run for each tile, which may have queries in between that see nothing of it."""
    new = np.diff(runs.tile, prepend=-1) != 0
    return _merged(runs, np.flatnonzero(new), ~new)


def _merged(runs: Runs, starts: np.ndarray, broken: np.ndarray) -> Runs:
    """The runs from each of `starts` on as one; without a whole part where one is `broken`."""
    if not len(starts):
        return runs
    ends = np.append(starts[1:], len(runs.tile)) - 1
    none = runs.whole_first == runs.whole_end
    whole_first = np.minimum.reduceat(np.where(none, runs.end.max(), runs.whole_first), starts)
    whole_end = runs.whole_end[ends]
    none = none[ends] | np.logical_or.reduceat(broken, starts)
    whole_first = np.where(none, whole_end, whole_first)
    return Runs(runs.tile[starts], runs.first[starts], runs.end[ends], whole_first, whole_end)


def _sliced(
    runs: Runs, blocks: np.ndarray, by_query: np.ndarray, block_m: int
) -> tuple[Runs, np.ndarray]:
    """Runs cut into as many slices as their tile wants, whose number takes the tile's place.

    Returns:
        The runs in order of their slices, and the tile of each slice.
    """
    slice_tile = np.repeat(np.arange(len(by_query)), by_query)
    if len(slice_tile) == len(by_query):
        return runs, slice_tile
    repeats = by_query[runs.tile]
    run, place = np.repeat(np.arange(len(runs.tile)), repeats), _places(repeats)
    low = place * blocks[run] // repeats[run] * block_m
    high = (place + 1) * blocks[run] // repeats[run] * block_m
    whole = runs.where(run)
    number = (np.cumsum(by_query) - by_query)[whole.tile] + place
    cuts = whole._replace(
        tile=number,
        first=whole.first + low,
        end=np.minimum(whole.first + high, whole.end),
    )
    cuts = cuts.where(cuts.end > cuts.first)
    return cuts.where(np.argsort(cuts.tile, kind="stable")), slice_tile


def cut(
    first: np.ndarray, end: np.ndarray, whole_first: np.ndarray, whole_end: np.ndarray, block: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cuts first..end into blocks, of which those inside whole_first..whole_end need no mask.

    Returns:
        The number of blocks, how many come before the first whole one, and how many are whole.
    """
    blocks = -(-np.maximum(end - first, 0) // block)
    leading = np.minimum(-(-np.maximum(whole_first - first, 0) // block), blocks)
    inside = np.maximum(np.minimum(whole_end, end) - first, 0) // block
    return blocks, leading, np.maximum(inside - leading, 0)


def _tiles(
    layout: Any, offsets: np.ndarray, block: int, families: bool
) -> tuple[np.ndarray, np.ndarray]:
    """First member and count of the tiles of `block` that rows or queries are cut into.

    A tile does not reach over the end of a long segment, nor from one family, a segment and those
    that continue it, into another; `families` says whether a family's segments share tiles.
    """
    prefix = layout.prefix
    present = np.flatnonzero(np.diff(offsets))
    if not len(present):
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    family = np.where(prefix >= 0, prefix, np.arange(len(prefix)))
    alone = np.bincount(family, minlength=len(prefix))[family] == 1
    short = (alone & (np.diff(layout.starts) <= SHORT * block))[present]
    goes_on = short[1:] & short[:-1]
    if families:
        goes_on |= family[present[1:]] == family[present[:-1]]
    starts = present[np.append(True, ~goes_on)]
    begin = offsets[starts]
    size = np.append(begin[1:], offsets[-1]) - begin
    tiles = -(-size // block)
    places = _places(tiles) * block
    first = np.repeat(begin, tiles) + places
    return first, np.minimum(np.repeat(size, tiles) - places, block)


def _places(counts: np.ndarray) -> np.ndarray:
    """0, 1, .. up to each count, one after another."""
    ends = np.cumsum(counts)
    return np.arange(int(ends[-1]) if len(ends) else 0) - np.repeat(ends - counts, counts)


def _most_tiles(layout: Any, block: int, keys: bool = False) -> int | None:
    """How many tiles any layout of these sizes has at most; None where shapes are free."""
    if not layout.fixed_shapes:
        return None
    members = layout.starts[-1] if keys else len(layout.query_rows)
    return int(members) // block + len(layout.prefix)


def _padded(table: np.ndarray, rows: int | None) -> np.ndarray:
    """The table with empty entries up to `rows`."""
    if rows is None:
        return table
    padded = np.zeros((rows, *table.shape[1:]), dtype=np.int64)
    padded[: len(table)] = table
    return padded

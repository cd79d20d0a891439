"""The work lists of the attention kernels: complete, balanced, and of fixed shapes in buckets."""

from __future__ import annotations

import heapq
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastllm.kernels import schedules
from fastllm.kernels.schedules import key_schedule, query_bounds, query_schedule
from fastllm.layout import PackedLayout
from tests.ops.test_attention import visible


def seen_by_queries(layout, block_m, block_n, window):
    """What a kernel over tiles of queries would do: how often each query meets each key [N, T]."""
    host = layout.host
    (bounds, _), (tiles,) = (
        query_bounds(host, window),
        query_schedule(host, block_m, block_n, window),
    )
    met = np.zeros((layout.num_queries, layout.total_tokens), dtype=int)
    for first, count, *spans, whole, others in tiles.tolist():
        queries = np.arange(first, first + count)
        blocks = np.zeros(2, dtype=int)
        for start, end, leading, inside in (spans[:4], spans[4:]):
            for place in range(-(-(end - start) // block_n)):
                row = start + place * block_n
                keys = np.arange(row, min(row + block_n, end))
                masked = not leading <= place < leading + inside
                blocks[int(masked)] += 1
                seen = sees(bounds, queries, keys, (0, 2))
                if not masked:
                    assert len(keys) == block_n and seen.all(), "a whole block needs no mask"
                met[np.ix_(queries, keys)] += seen
        assert blocks.tolist() == [whole, others]
    return met


def sees(bounds, queries, keys, which):
    found = np.zeros((len(queries), len(keys)), dtype=bool)
    for row in which:
        low, high = bounds[row, queries][:, None], bounds[row + 1, queries][:, None]
        found |= (keys >= low) & (keys <= high)
    return found


def seen_by_keys(layout, block_m, block_n, window, group=1, key_heads=1):
    """The same for a kernel over tiles of keys, summed over the heads of the group."""
    host = layout.host
    bounds, _ = query_bounds(host, window)
    pieces, runs, divided, parts = key_schedule(host, block_m, block_n, window, group, key_heads)
    met = np.zeros((layout.num_queries, layout.total_tokens), dtype=int)
    written = np.zeros(layout.total_tokens, dtype=int)
    used = []
    for row, count, run_first, run_end, head, heads, part, which in pieces.tolist():
        assert 0 <= head < head + heads <= group or not count
        keys = np.arange(row, row + count)
        if part < 0:
            written[keys] += 1
        elif count:
            used.append((row, part))
        for first, end, leading, whole, blocks in runs[run_first:run_end].tolist():
            assert first % schedules.ALIGNED == 0
            for place in range(blocks):
                query = first + place * block_m
                queries = np.arange(query, min(query + block_m, end))
                seen = sees(bounds, queries, keys, (which,))
                if leading <= place < leading + whole:
                    assert len(queries) == block_m and seen.all(), "a whole block needs no mask"
                met[np.ix_(queries, keys)] += seen * heads
    for row, count, first, end in divided.tolist():
        written[row : row + count] += 1
        mine = {part for start, part in used if start == row and count}
        assert mine == set(range(first, end))
    assert (written == 1).all() and len(used) <= len(parts)
    return met


@st.composite
def batches(draw):
    lengths = draw(st.lists(st.integers(0, 30), min_size=1, max_size=8))
    roots = draw(st.lists(st.booleans(), min_size=len(lengths), max_size=len(lengths)))
    choices = [segment for segment, root in enumerate(roots) if root]
    prefix = [
        -1 if root or not choices else draw(st.sampled_from([-1, *choices])) for root in roots
    ]
    total = sum(lengths)
    rows = draw(st.none() | st.sets(st.integers(0, max(total - 1, 0)), max_size=total))
    return lengths, prefix, None if rows is None or not total else sorted(rows)


@settings(derandomize=True, deadline=None, max_examples=150)
@given(
    batch=batches(),
    blocks=st.sampled_from([(4, 4), (8, 4), (4, 8), (16, 8)]),
    window=st.sampled_from([0, 1, 5, 20]),
    bucket=st.booleans(),
)
def test_every_query_meets_what_it_sees_once(batch, blocks, window, bucket):
    lengths, prefix, rows = batch
    layout = PackedLayout(lengths, prefix)
    if rows is not None:
        layout = layout.select(rows)
    if bucket:
        layout = layout.bucketed(sum(lengths) + 13, len(lengths) + 3)
    expected = visible(layout.lengths, layout.prefix_of, window or None).numpy()
    expected = expected[layout.query_rows.numpy()]
    assert (seen_by_queries(layout, *blocks, window) == expected).all()
    assert (seen_by_keys(layout, *blocks, window) == expected).all()


@settings(derandomize=True, deadline=None, max_examples=60)
@given(batch=batches(), window=st.sampled_from([0, 5]), group=st.integers(1, 4))
def test_divided_work_is_complete(batch, window, group):
    lengths, prefix, rows = batch
    layout = PackedLayout(lengths, prefix)
    layout = layout if rows is None else layout.select(rows)
    layout = layout.bucketed(sum(lengths) + 13, len(lengths) + 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schedules, "LEAST", 2)
        patch.setattr(schedules, "PROCESSORS", 3)
        met = seen_by_keys(layout, 4, 4, window, group, 2)
    expected = visible(layout.lengths, layout.prefix_of, window or None).numpy()
    assert (met == group * expected[layout.query_rows.numpy()]).all()


def test_tiles_are_shared_by_neighbours():
    """Short segments and the segments of a family do not cost a tile each."""
    plain = PackedLayout([20] * 16)
    assert len(query_schedule(plain.host, 64, 64, 0)[0]) == 5
    assert len(key_schedule(plain.host, 64, 64, 0, 1, 1)[0]) == 5
    group = PackedLayout([100, *[12] * 8], [-1, *[0] * 8])
    assert len(query_schedule(group.host, 64, 64, 0)[0]) == 4
    # All answers of a group are one run of queries to the keys of its prompt.
    assert len(key_schedule(group.host, 64, 64, 0, 1, 1)[1]) == 10


# -- balance ---------------------------------------------------------------------------------------


def hh_pairs(tokens):
    """Pairs as in hh-rlhf: a long beginning in common, two short ends."""
    generator = np.random.default_rng(1)
    lengths, prefix = [], []
    while sum(lengths) < tokens:
        root = len(lengths)
        lengths += [int(n) for n in (generator.gamma(2, 60) + 10, *(generator.gamma(2, 25, 2) + 3))]
        prefix += [-1, root, root]
    return lengths, prefix


BATCHES = {
    "one document of 16k": ([16384], None),
    "SFT": (np.random.default_rng(0).integers(200, 2500, 12).tolist(), None),
    "hh": hh_pairs(16384),
    "8 answers": ([4096, *[1024] * 8], [-1, *[0] * 8]),
    "16 answers": ([4096, *[512] * 16], [-1, *[0] * 16]),
    "groups": ([512, *[512] * 8] * 4, [place for g in range(4) for place in (-1, *[9 * g] * 8)]),
}


def makespan(work, processors=132):
    """When the last of the processors is done, if each takes the next entry when it is free."""
    free = [0] * processors
    for amount in work:
        heapq.heappush(free, heapq.heappop(free) + amount)
    return max(free)


def ideal(work, processors=132):
    return max(sum(work) / processors, 1)


@pytest.mark.parametrize("key_heads", [2, 8])
@pytest.mark.parametrize("name", BATCHES)
def test_processors_finish_together(name, key_heads):
    heads, group = 16, 16 // key_heads
    layout = PackedLayout(*BATCHES[name])
    (tiles,) = query_schedule(layout.host, 128, 128, 0)
    # A block, and as much for the beginning and the end of a program.
    work = np.repeat(tiles[:, 10] + tiles[:, 11] + 1, heads).tolist()
    assert makespan(work) <= 1.15 * ideal(work) + 2

    pieces, runs, _, _ = key_schedule(layout.host, 64, 128, 0, group, key_heads)
    blocks = np.append(0, np.cumsum(runs[:, 4]))
    of_piece = (blocks[pieces[:, 3]] - blocks[pieces[:, 2]]) * pieces[:, 5] + 2
    work = np.repeat(of_piece, key_heads).tolist()
    assert makespan(work) <= 1.15 * ideal(work) + 2 * schedules.LEAST


def test_shared_prompts_are_worked_on_once():
    """Work in proportion to what is left: far less than that of eight sequences on their own."""
    shared, alone = PackedLayout(*BATCHES["8 answers"]), PackedLayout([5120] * 8)
    blocks = [
        query_schedule(layout.host, 128, 128, 0)[0][:, 10:].sum() for layout in (shared, alone)
    ]
    pairs = 4096**2 / 2 + 8 * (4096 * 1024 + 1024**2 / 2), 8 * 5120**2 / 2
    assert blocks[0] / blocks[1] == pytest.approx(pairs[0] / pairs[1], rel=0.05)


# -- shapes and cost -------------------------------------------------------------------------------


def test_shapes_in_a_bucket_follow_from_its_numbers():
    shapes = set()
    for name in BATCHES:
        layout = PackedLayout(*BATCHES[name])
        if layout.num_segments >= 400 or layout.total_tokens > 20480:
            continue
        layout = layout.bucketed(20480, 400)
        tables = (
            *query_schedule(layout.host, 128, 128, 0),
            *key_schedule(layout.host, 64, 128, 0, 8, 2),
        )
        shapes.add(tuple(table.shape for table in tables))
    assert len(shapes) == 1


@pytest.mark.parametrize("name", BATCHES)
def test_schedules_cost_little(name):
    layout = PackedLayout(*BATCHES[name])
    best = min(seconds(layout.host) for _ in range(5))
    assert best < 0.02, "a schedule of 16k tokens takes a millisecond or so"


def seconds(host):
    begin = time.perf_counter()
    query_bounds(host, 0)
    query_schedule(host, 128, 128, 0)
    key_schedule(host, 64, 128, 0, 8, 2)
    return time.perf_counter() - begin

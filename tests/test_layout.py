from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastllm.layout import PackedLayout

LENGTHS, PREFIX = [3, 2, 0, 4, 1, 2], [-1, 0, 0, -1, 3, 3]


@pytest.fixture
def layout():
    return PackedLayout(LENGTHS, PREFIX)


def test_sizes(layout):
    assert (layout.total_tokens, layout.num_segments, layout.num_queries) == (12, 6, 12)
    assert layout.lengths == LENGTHS
    assert layout.starts.tolist() == [0, 3, 5, 5, 9, 10, 12]
    assert layout.prefix.tolist() == PREFIX


def test_positions_go_on_from_the_prefix(layout):
    assert layout.positions.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 4, 5]
    assert layout.max_position == 6


def test_positions_when_the_prefix_is_stored_later():
    layout = PackedLayout([2, 3, 1], [1, -1, 1])
    assert layout.positions.tolist() == [3, 4, 0, 1, 2, 3]


def test_a_layout_may_be_empty():
    for layout in (PackedLayout([]), PackedLayout([0, 0])):
        assert layout.positions.shape == layout.segments.shape == (0,)
        assert layout.positions.dtype == layout.segments.dtype == torch.int32


def test_segment_of_each_row(layout):
    assert layout.segments.tolist() == [0, 0, 0, 1, 1, 3, 3, 3, 3, 4, 5, 5]


def test_children(layout):
    assert layout.children.tolist() == [1, 2, 4, 5]
    assert layout.children_starts.tolist() == [0, 2, 2, 2, 4, 4, 4]


def test_plain_packing_has_no_children():
    layout = PackedLayout([2, 1])
    assert layout.prefix.tolist() == [-1, -1]
    assert layout.children.tolist() == [] and layout.children_starts.tolist() == [0, 0, 0]


def test_every_row_asks_by_default(layout):
    assert layout.query_rows.tolist() == list(range(12))
    assert layout.query_starts.tolist() == layout.starts.tolist()


@pytest.mark.parametrize(
    "rows", [[1, 3, 9, 11], torch.tensor([1, 3, 9, 11])], ids=["list", "tensor"]
)
def test_select(layout, rows):
    some = layout.select(rows)
    assert some.num_queries == 4
    assert some.query_rows.tolist() == [1, 3, 9, 11]
    assert some.query_starts.tolist() == [0, 1, 2, 2, 2, 3, 4]
    assert some.positions.tolist() == layout.positions.tolist()
    assert some.starts.tolist() == layout.starts.tolist()


def test_select_leaves_the_layout_alone(layout):
    tiles = layout.query_tiles(2)
    some = layout.select([4])
    assert some.query_tiles(2).tolist() == [[1, 0]]
    assert layout.num_queries == 12 and torch.equal(layout.query_tiles(2), tiles)
    assert some.select([0, 4]).query_rows.tolist() == [0, 4]


def test_select_nothing(layout):
    none = layout.select([])
    assert none.num_queries == 0 and none.query_rows.tolist() == []
    assert none.query_starts.tolist() == [0] * 7
    assert none.query_tiles(4).shape == (0, 2)


@pytest.mark.parametrize("rows", [[-1, 2], [3, 12], [4, 4], [5, 2]])
def test_select_refuses(layout, rows):
    with pytest.raises(ValueError, match=r"strictly ascending within 0\.\.11"):
        layout.select(rows)


def test_key_tiles_stay_within_a_segment(layout):
    assert layout.key_tiles(2).tolist() == [
        [0, 0], [0, 2], [1, 3], [3, 5], [3, 7], [4, 9], [5, 10],
    ]  # fmt: skip
    assert layout.key_tiles(64).tolist() == [[0, 0], [1, 3], [3, 5], [4, 9], [5, 10]]


def test_query_tiles_count_among_the_queries(layout):
    some = layout.select([0, 1, 2, 6, 8, 10])
    assert some.query_tiles(2).tolist() == [[0, 0], [0, 2], [3, 3], [5, 5]]
    assert some.key_tiles(64).tolist() == layout.key_tiles(64).tolist()


@pytest.mark.parametrize("lengths", [[], [0], [0, 0]])
def test_no_tokens(lengths):
    layout = PackedLayout(lengths)
    assert layout.total_tokens == layout.num_queries == layout.max_position == 0
    assert layout.starts.tolist() == [0] * (len(lengths) + 1)
    assert layout.positions.tolist() == []
    assert layout.query_tiles(8).shape == layout.key_tiles(8).shape == (0, 2)


def test_index_tensors_are_int32(layout):
    names = (
        "starts", "prefix", "positions", "segments", "children_starts", "children",
        "query_rows", "query_starts",
    )  # fmt: skip
    for some in (layout, layout.select([1, 5]), PackedLayout([])):
        assert {getattr(some, name).dtype for name in names} == {torch.int32}
        assert some.query_tiles(4).dtype == some.key_tiles(4).dtype == torch.int32


def test_tensors_as_arguments():
    layout = PackedLayout(torch.tensor(LENGTHS), torch.tensor(PREFIX, dtype=torch.int32))
    assert layout.lengths == LENGTHS and layout.prefix.tolist() == PREFIX


def test_changing_the_arguments_later_changes_nothing():
    lengths, prefix = list(LENGTHS), list(PREFIX)
    layout = PackedLayout(lengths, prefix)
    lengths[0], prefix[1] = 100, -1
    assert layout.starts.tolist()[-1] == 12 and layout.prefix.tolist() == PREFIX


def test_to_the_same_device(layout):
    assert layout.to("cpu") is layout


def test_to_another_device_keeps_the_queries(layout):
    moved = layout.select([1, 5]).to("meta")
    assert moved.query_rows.device.type == moved.positions.device.type == "meta"
    assert moved.num_queries == moved.query_rows.numel() == 2
    assert layout.positions.device.type == "cpu"


@pytest.mark.parametrize(
    ("lengths", "prefix", "message"),
    [
        ([3, -1], None, "segment 1: length must be >= 0, found -1"),
        ([3, 2], [-1], "prefix has 1 entries, expected 2"),
        ([3, 2], [-1, 2], r"segment 1: prefix must be .*0\.\.1, found 2"),
        ([3, 2], [-1, -2], "segment 1: prefix must be .*found -2"),
        ([3, 2], [-1, 1], "segment 1: prefix must be .*another segment.*found 1"),
        ([3, 2, 1], [-1, 0, 1], "segment 2: its prefix 1 has a prefix itself.*one level"),
        ([3, 2], [1, 0], "segment 0: its prefix 1 has a prefix itself"),
    ],
)
def test_refuses(lengths, prefix, message):
    with pytest.raises(ValueError, match=message):
        PackedLayout(lengths, prefix)


def test_repr_says_what_it_is(layout):
    assert repr(layout.select([1])) == (
        "PackedLayout(12 tokens, 6 segments, 4 with a prefix, 1 queries, cpu)"
    )


@settings(derandomize=True, deadline=None, max_examples=50)
@given(
    lengths=st.lists(st.integers(0, 9), max_size=8),
    block=st.integers(1, 5),
    every=st.integers(1, 4),
)
def test_tiles_cover_every_row_once(lengths, block, every):
    layout = PackedLayout(lengths).select(range(0, sum(lengths), every))
    keys, queries = [], []
    for segment, first in layout.key_tiles(block).tolist():
        keys += range(first, min(first + block, int(layout.starts[segment + 1])))
    for segment, first in layout.query_tiles(block).tolist():
        tile = range(first, min(first + block, int(layout.query_starts[segment + 1])))
        assert {int(layout.segments[layout.query_rows[j]]) for j in tile} == {segment}
        queries += tile
    assert keys == list(range(layout.total_tokens))
    assert queries == list(range(layout.num_queries))

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


def rows_of(host):
    return (host.query_rows,)


def test_select_leaves_the_layout_alone(layout):
    (before,) = layout.schedule("rows", rows_of)
    some = layout.select([4])
    assert some.schedule("rows", rows_of)[0].tolist() == [4]
    assert layout.num_queries == 12 and layout.schedule("rows", rows_of)[0] is before
    assert some.select([0, 4]).query_rows.tolist() == [0, 4]


def test_select_nothing(layout):
    none = layout.select([])
    assert none.num_queries == 0 and none.query_rows.tolist() == []
    assert none.query_starts.tolist() == [0] * 7
    assert none.host.query_starts.tolist() == [0] * 7


@pytest.mark.parametrize("rows", [[-1, 2], [3, 12], [4, 4], [5, 2]])
def test_select_refuses(layout, rows):
    with pytest.raises(ValueError, match=r"strictly ascending within 0\.\.11"):
        layout.select(rows)


@pytest.mark.parametrize("lengths", [[], [0], [0, 0]])
def test_no_tokens(lengths):
    layout = PackedLayout(lengths)
    assert layout.total_tokens == layout.num_queries == layout.max_position == 0
    assert layout.starts.tolist() == [0] * (len(lengths) + 1)
    assert layout.positions.tolist() == []


def test_index_tensors_are_int32(layout):
    names = (
        "starts", "prefix", "positions", "segments", "children_starts", "children",
        "query_rows", "query_starts",
    )  # fmt: skip
    for some in (layout, layout.select([1, 5]), PackedLayout([])):
        assert {getattr(some, name).dtype for name in names} == {torch.int32}
        assert some.schedule("rows", rows_of)[0].dtype == torch.int32


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


def test_a_schedule_is_made_once(layout):
    made = []

    def build(host):
        made.append(host)
        return host.starts, host.prefix

    starts, prefix = layout.schedule("both", build)
    assert layout.schedule("both", build)[0] is starts and len(made) == 1
    assert starts.tolist() == layout.starts.tolist() and prefix.tolist() == PREFIX
    host = layout.host
    assert host.every_row and not host.fixed_shapes and not layout.select([1]).host.every_row


def test_tables_placed_elsewhere(layout):
    some = layout.select([1, 5])
    some.schedule("rows", rows_of)
    assert some.query_rows.tolist() == [1, 5] and some.positions is not None
    tables = some.tables()
    assert set(tables) == {"query_rows", "positions", "rows 0"}
    moved = {name: table.to("meta") for name, table in tables.items()}
    placed = some.placed("meta", moved)
    assert placed.device.type == "meta" and some.device.type == "cpu"
    assert placed.positions is moved["positions"] and placed.query_rows is moved["query_rows"]
    assert placed.schedule("rows", rows_of)[0] is moved["rows 0"]
    assert placed.starts.device.type == "meta", "what was not there yet is made on the new device"
    assert some.tables().keys() == tables.keys() and placed.num_queries == 2


def test_a_selection_made_before(layout):
    rows = torch.tensor([1, 5])
    selected = layout.select([1, 5])
    layout.remember(rows, selected)
    assert layout.select(rows) is selected
    assert layout.select(rows.clone()) is not selected


def test_a_ticket_stands_for_its_layout(layout):
    some = layout.select([1])
    assert PackedLayout.of_ticket(layout.ticket) is layout
    assert PackedLayout.of_ticket(some.ticket) is some
    assert PackedLayout.of_ticket(some.placed("meta", {}).ticket) is not some


# -- buckets ---------------------------------------------------------------------------------------


def test_a_bucket_is_filled_up(layout):
    filled = layout.bucketed(20, 9)
    assert filled.lengths == [*LENGTHS, 8, 0, 0] and filled.prefix_of == [*PREFIX, -1, -1, -1]
    assert filled.host.fixed_shapes and filled.num_queries == 20
    assert filled.positions[:12].tolist() == layout.positions.tolist()
    assert filled.children.tolist() == [1, 2, 4, 5]
    assert filled.starts.shape == filled.children_starts.shape == (10,)


def test_a_bucket_of_selected_rows(layout):
    filled = layout.select([1, 5]).bucketed(20, 9, 5)
    assert filled.query_rows.tolist() == [1, 5, 17, 18, 19]
    assert layout.select([1, 5]).bucketed(20, 9).query_rows.tolist() == [1, 5]


def test_a_full_bucket_is_possible(layout):
    assert layout.bucketed(12, 7).lengths == [*LENGTHS, 0]


@pytest.mark.parametrize(
    ("rows", "sizes", "message"),
    [
        (None, (11, 9), "12 tokens in 6 segments .* do not fit into 11 tokens in 9"),
        (None, (20, 6), "do not fit into 20 tokens in 6"),
        (None, (20, 9, 15), "every row has a query, 15 queries in 20 rows"),
        ([1, 5], (20, 9, 11), "9 queries do not fit into 8 filling tokens"),
        ([1, 5], (20, 9, 1), "-1 queries do not fit"),
    ],
)
def test_buckets_that_are_too_small(layout, rows, sizes, message):
    with pytest.raises(ValueError, match=message):
        (layout if rows is None else layout.select(rows)).bucketed(*sizes)


@settings(derandomize=True, deadline=None, max_examples=50)
@given(lengths=st.lists(st.integers(0, 9), max_size=8), seed=st.integers(0, 99))
def test_children_are_listed_by_their_prefix(lengths, seed):
    generator = torch.Generator().manual_seed(seed)
    root = torch.rand(len(lengths), generator=generator) < 0.4
    roots = root.nonzero().flatten().tolist()
    prefix = [
        -1
        if root[i] or not roots
        else roots[int(torch.randint(len(roots), (), generator=generator))]
        for i in range(len(lengths))
    ]
    layout = PackedLayout(lengths, prefix)
    starts, children = layout.children_starts.tolist(), layout.children.tolist()
    for segment in range(len(lengths)):
        expected = [i for i, parent in enumerate(prefix) if parent == segment]
        assert children[starts[segment] : starts[segment + 1]] == expected
    expected = [
        place + layout.prefix_length(segment)
        for segment, length in enumerate(lengths)
        for place in range(length)
    ]
    assert layout.positions.tolist() == expected
    assert layout.max_position == max(expected, default=-1) + 1 or 0 in lengths

"""Token ids into packed rows: which segment, which row, which target."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastllm.data.packing import (
    common_prefix,
    pack_completions,
    pack_groups,
    pack_pairs,
    pack_sequences,
    scored_end,
)
from fastllm.layout import PackedLayout

A, B, C = [1, 2, 3], [4], [5, 6]


def targets(batch):
    """(the tokens that a target's row has seen, target, sequence), in the order of targets."""
    found = []
    for source, target, sequence in zip(batch.source, batch.targets, batch.sequence, strict=True):
        found.append((seen(batch, int(batch.rows[source])), int(target), int(sequence)))
    return found


def seen(batch, row):
    """Tokens that a packed row attends to, its own included."""
    layout = batch.layout
    segment = int(layout.segments[row])
    prefix = layout.prefix_of[segment]
    parts = [] if prefix < 0 else range(layout.offsets[prefix], layout.offsets[prefix + 1])
    rows = [*parts, *range(layout.offsets[segment], row + 1)]
    return batch.input_ids[rows].tolist()


def scored(batch, index):
    return [seen(batch, int(batch.rows[i])) for i in index]


def ascending_and_unique(rows):
    return bool((rows[1:] > rows[:-1]).all())


def test_sequences_lie_one_after_another():
    batch = pack_sequences([A, B, C], [[True] * 3, [True], [False, True]])
    assert batch.input_ids.tolist() == [1, 2, 3, 4, 5, 6]
    assert batch.layout.lengths == [3, 1, 2] and batch.layout.prefix_of == [-1] * 3
    assert targets(batch) == [([1], 2, 0), ([1, 2], 3, 0), ([5], 6, 2)]
    assert batch.num_sequences == 3


def test_only_marked_tokens_are_targets():
    batch = pack_sequences([A, C], [[False, False, True], [True, False]])
    assert targets(batch) == [([1, 2], 3, 0)]
    assert batch.rows.tolist() == [1]


def test_padding_is_never_a_target():
    batch = pack_sequences([A, C], [[True] * 3, [True] * 2], pad_to=4, pad_token_id=9)
    assert batch.input_ids.tolist() == [1, 2, 3, 9, 5, 6, 9, 9]
    assert targets(batch) == [([1], 2, 0), ([1, 2], 3, 0), ([5], 6, 1)]


def test_a_group_has_its_prompt_once():
    batch = pack_groups([A, B], [[7, 8], [9], [7]], [0, 0, 1])
    assert batch.input_ids.tolist() == [1, 2, 3, 7, 8, 9, 4, 7]
    assert batch.layout.prefix_of == [-1, 0, 0, -1, 3]
    assert targets(batch) == [(A, 7, 0), ([*A, 7], 8, 0), (A, 9, 1), (B, 7, 2)]
    assert ascending_and_unique(batch.rows) and batch.rows.numel() == 3


def test_a_group_may_come_in_any_order():
    batch = pack_groups([A, B], [[7], [8], [9]], [1, 0, 1])
    assert targets(batch) == [(B, 7, 0), (A, 8, 1), (B, 9, 2)]


@pytest.mark.parametrize("options", [{"share_prefix": False}, {"pad_to": 6, "pad_token_id": 9}])
def test_an_unshared_group_has_the_same_targets(options):
    given = ([A, B], [[7, 8], [9], [7]], [0, 0, 1])
    assert targets(pack_groups(*given, **options)) == targets(pack_groups(*given))


def test_a_pair_shares_its_beginning():
    batch = pack_pairs([([1, 2, 3, 7], [1, 2, 8])])
    assert batch.input_ids.tolist() == [1, 2, 3, 7, 8]
    assert batch.layout.lengths == [2, 2, 1] and batch.layout.prefix_of == [-1, 0, 0]
    assert scored(batch, batch.chosen) == [[1, 2, 3, 7]]
    assert scored(batch, batch.rejected) == [[1, 2, 8]]
    assert batch.margin is None and batch.num_pairs == 1


PAIRS = {
    "nothing in common": ([1, 2], [3, 4, 5]),
    "one continues the other": ([1, 2], [1, 2, 3]),
    "equal": ([1, 2], [1, 2]),
    "one token": ([1], [2]),
    "padded": ([1, 2, 0, 0], [1, 3, 0]),
    "padding inside": ([1, 0, 2, 0], [1, 0, 3]),
}


@pytest.mark.parametrize("options", [{}, {"share_prefix": False}, {"pad_to": 6}])
@pytest.mark.parametrize("name", PAIRS)
def test_a_pair_is_read_at_its_last_tokens(name, options):
    chosen, rejected = PAIRS[name]
    batch = pack_pairs([PAIRS[name], (C, B)], **options)
    ends = [scored_end(ids, 0) for ids in (chosen, rejected)]
    assert scored(batch, batch.chosen) == [chosen[: ends[0]], C]
    assert scored(batch, batch.rejected) == [rejected[: ends[1]], B]
    assert ascending_and_unique(batch.rows) and batch.rows.numel() == 4


def test_padding_may_be_the_end_token_or_nothing():
    end = 2
    pairs = [([1, 3, end], [1, end, end])]
    batch = pack_pairs(pairs, pad_token_id=end)
    assert scored(batch, batch.chosen) == [[1, 3]] and scored(batch, batch.rejected) == [[1]]
    batch = pack_pairs(pairs, pad_token_id=None)
    assert scored(batch, batch.rejected) == [[1, end, end]]
    with pytest.raises(ValueError, match="no token to score: 2 tokens, all padding"):
        pack_pairs([([0, 0], [1])])


def test_margins_are_0_where_a_pair_has_none():
    given = [(A, B), (B, C)]
    assert pack_pairs(given, [None, None]).margin is None
    margin = pack_pairs(given, [0.5, None]).margin
    assert margin.tolist() == [0.5, 0.0] and margin.dtype == torch.float32


def test_completions_share_a_prompt_with_their_neighbours():
    prompts = [A, A, B, A, []]
    completions = [[7, 0], [8, 9], [7], [0, 0], [6]]
    batch, index = pack_completions(prompts, completions, pad_token_id=0)
    assert scored(batch, index) == [[*A, 7], [*A, 8, 9], [*B, 7], A, [6]]
    assert batch.layout.prefix_of == [-1, 0, 0, -1, 3, -1, -1]
    assert ascending_and_unique(batch.rows)


def test_the_longest_common_beginning():
    assert [common_prefix(a, b) for a, b in ((A, A), (A, B), (A, [1, 2, 9]), ([], A))] == [
        3,
        0,
        2,
        0,
    ]


def test_empty_batches_are_allowed():
    batch = pack_sequences([], [])
    assert batch.input_ids.dtype == torch.int64 and batch.targets.numel() == 0
    assert pack_groups([], [], []).layout.total_tokens == 0
    assert pack_pairs([]).num_pairs == 0


def test_arrays_and_lists_pack_alike():
    sequences, masks = [A, B, C], [[True] * 3, [False], [True, True]]
    arrays = [np.array(ids, dtype=np.int32) for ids in sequences]
    flags = [np.array(mask) for mask in masks]
    for of_lists, of_arrays in (
        (pack_sequences(sequences, masks), pack_sequences(arrays, flags)),
        (
            pack_groups(sequences, [C, A], [0, 2]),
            pack_groups(arrays, [arrays[2], arrays[0]], [0, 2]),
        ),
        (pack_pairs([(A, C)]), pack_pairs([(arrays[0], arrays[2])])),
        (pack_completions([A], [C], 0)[0], pack_completions(arrays[:1], arrays[2:], 0)[0]),
    ):
        for name, value in vars(of_lists).items():
            if isinstance(value, torch.Tensor):
                other = getattr(of_arrays, name)
                assert value.dtype == other.dtype == torch.int64 and torch.equal(value, other)
            elif isinstance(value, PackedLayout):
                other = getattr(of_arrays, name)
                assert (value.lengths, value.prefix_of) == (other.lengths, other.prefix_of)
    assert arrays[0].tolist() == A and flags[0].tolist() == masks[0]  # as they were

"""Which examples a step takes: a function of seed and step alone."""

from __future__ import annotations

from collections import Counter

import pytest

from fastllm.training.sampler import EpochSampler


def epoch(sampler, number):
    first = number * sampler.steps_per_epoch
    steps = range(first, first + sampler.steps_per_epoch)
    return [i for step in steps for i in sampler.indices(step)]


def test_every_epoch_has_every_example_once_in_another_order():
    sampler = EpochSampler(10, 4, seed=1)
    assert sampler.steps_per_epoch == 3
    assert [len(sampler.indices(step)) for step in range(3)] == [4, 4, 2]
    assert sorted(epoch(sampler, 0)) == sorted(epoch(sampler, 1)) == list(range(10))
    assert epoch(sampler, 0) != epoch(sampler, 1)


def test_steps_can_be_asked_for_in_any_order():
    forward = EpochSampler(10, 3, seed=1)
    expected = {step: forward.indices(step) for step in range(12)}
    for step in (11, 0, 5, 5, 3):
        assert EpochSampler(10, 3, seed=1).indices(step) == expected[step]
        assert forward.indices(step) == expected[step]


def test_the_seed_decides():
    orders = {tuple(epoch(EpochSampler(20, 5, seed), 0)) for seed in range(5)}
    assert len(orders) == 5


def test_without_shuffling_the_order_is_that_of_the_data():
    sampler = EpochSampler(5, 2, seed=1, shuffle=False)
    assert epoch(sampler, 0) == epoch(sampler, 3) == list(range(5))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_share_a_step_among_them(world_size):
    whole = EpochSampler(11, 6, seed=2)
    for step in range(4):
        parts = [whole.indices(step, rank, world_size) for rank in range(world_size)]
        assert sorted(i for part in parts for i in part) == sorted(whole.indices(step))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_a_last_step_may_be_filled_up():
    sampler = EpochSampler(10, 4, seed=1, fill=True)
    counts = Counter(epoch(sampler, 0))
    assert all(len(sampler.indices(step)) == 4 for step in range(3))
    assert sorted(counts) == list(range(10)) and max(counts.values()) == 2
    tiny = EpochSampler(2, 5, seed=1, fill=True)
    assert tiny.steps_per_epoch == 1 and len(tiny.indices(0)) == 5

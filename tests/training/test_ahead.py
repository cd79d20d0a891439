"""Work that is done ahead of time comes in order, and leaves nothing behind."""

from __future__ import annotations

import threading
import time
import traceback
from functools import partial

import pytest

from fastllm.training.ahead import Ahead


def threads():
    return [t for t in threading.enumerate() if t.name.startswith("fastllm-ahead")]


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_items_come_in_their_order(workers):
    def slow_at_first(number):
        time.sleep(0.01 * (number % 3 == 0))
        return number

    asked = []

    def task(number):
        asked.append(number)
        return partial(slow_at_first, number)

    ahead = Ahead(task, workers, depth=2 * workers)
    assert [ahead.get(number) for number in range(7)] == list(range(7))
    assert asked == list(range(7 + 2 * workers))  # in order, each once, and no further ahead
    ahead.close()
    assert not threads()


def test_the_next_item_is_ready_while_the_caller_works():
    done = threading.Event()

    def work(number):
        if number == 1:
            done.set()
        return number

    ahead = Ahead(lambda number: partial(work, number), workers=1, depth=1)
    ahead.get(0)
    assert done.wait(10)
    ahead.close()


def test_another_beginning():
    ahead = Ahead(lambda number: lambda: number * 10, workers=2, depth=3)
    assert [ahead.get(number) for number in (5, 6, 2, 3, 3, 9)] == [50, 60, 20, 30, 30, 90]
    ahead.close()
    assert ahead.get(1) == 10  # it may go on after a close
    ahead.close()
    assert not threads()


def broken_collate(number):
    if number == 2:
        raise ValueError("example 17 is broken")
    return number


@pytest.mark.parametrize("workers", [0, 2])
def test_an_exception_is_raised_where_its_item_is_asked_for(workers):
    ahead = Ahead(lambda number: partial(broken_collate, number), workers, depth=2)
    assert [ahead.get(0), ahead.get(1)] == [0, 1]
    with pytest.raises(ValueError, match="example 17 is broken") as caught:
        ahead.get(2)
    assert "broken_collate" in "".join(traceback.format_tb(caught.value.__traceback__))
    assert ahead.get(3) == 3
    ahead.close()
    assert not threads()


@pytest.mark.parametrize("kind", ["sft", "rm"])
def test_training_is_the_same_with_any_number_of_workers(
    make, kind, metrics, fingerprint, tmp_path
):
    """Ten examples, four to a step: what is ahead crosses the ends of epochs."""
    runs = {"0": (0, 2), "1": (1, 2), "many": (3, 5)}
    for name, (workers, factor) in runs.items():
        options = {"dataloader_num_workers": workers, "dataloader_prefetch_factor": factor}
        trainer = make(kind, run=name, max_steps=8, **options)
        trainer.train()
        runs[name] = (fingerprint(trainer.model), metrics(tmp_path / name))
        assert not threads()
    assert runs["0"] == runs["1"] == runs["many"]


def test_a_broken_example_ends_the_run_where_it_would_have_been_used(make):
    trainer = make("sft", max_steps=8)
    collate, calls = trainer._collate, []

    def broken(examples):
        calls.append(len(examples))
        if len(calls) == 4:
            raise ValueError("example 17 is broken")
        return collate(examples)

    trainer._collate = broken
    with pytest.raises(ValueError, match="example 17 is broken"):
        trainer.train()
    assert trainer.state.global_step == 3 and not threads()


@pytest.mark.parametrize("field", ["dataloader_num_workers", "dataloader_prefetch_factor"])
def test_negative_numbers_are_refused(make, field):
    with pytest.raises(ValueError, match=f"{field} must be at least ., found -1"):
        make("sft", **{field: -1})

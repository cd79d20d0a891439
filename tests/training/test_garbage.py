"""The collector during training."""

from __future__ import annotations

import gc

import pytest

from fastllm.training.garbage import collector_spared


def test_objects_of_before_are_spared_and_come_back():
    assert gc.get_freeze_count() == 0
    with collector_spared():
        assert gc.get_freeze_count() > 1000
        with collector_spared():
            pass
        assert gc.get_freeze_count() > 1000
    assert gc.get_freeze_count() == 0


def test_comes_back_after_an_error():
    with pytest.raises(KeyError), collector_spared():
        raise KeyError
    assert gc.get_freeze_count() == 0

"""Many arrays in one copy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastllm.generation.upload import Field, Parcel, upload

ARRAYS = [
    np.arange(3, dtype=np.int64) - (1 << 62),
    np.empty((0, 64), np.int64),
    np.arange(10, dtype=np.int32).reshape(2, 5)[:, 1:4],
    np.zeros((3, 0), np.uint8),
    np.linspace(0, 1, 7, dtype=np.float32),
    np.arange(5, dtype=np.uint8),
]


def test_a_parcel_arrives_where_it_always_does():
    fields = {str(i): Field(array.shape, array.dtype) for i, array in enumerate(ARRAYS)}
    parcel = Parcel(fields, torch.device("cpu"))
    addresses = [tensor.data_ptr() for tensor in parcel.tensors.values()]
    for _ in range(2):
        for into, array in zip(parcel.arrays.values(), ARRAYS, strict=True):
            into[...] = array
        parcel.send()
        for tensor, array in zip(parcel.tensors.values(), ARRAYS, strict=True):
            assert tensor.shape == array.shape
            assert torch.equal(tensor, torch.from_numpy(array.copy()))
    found = [tensor.data_ptr() for tensor in parcel.tensors.values()]
    assert found == addresses
    assert all((one - addresses[0]) % 16 == 0 for one in addresses if one)


def test_nothing_is_copied_on_the_cpu():
    for tensor, array in zip(upload(ARRAYS, torch.device("cpu")), ARRAYS, strict=True):
        assert tensor.data_ptr() == array.__array_interface__["data"][0] or not array.size


@pytest.mark.cuda
def test_one_copy_that_nobody_waits_for():
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = upload(ARRAYS, torch.device("cuda"))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for tensor, array in zip(found, ARRAYS, strict=True):
        assert torch.equal(tensor.cpu(), torch.from_numpy(array.copy()))

"""What is copied before a kernel sees it, and what is not."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from fastllm.ops.inputs import as_heads, as_rows, needs_grad

pytestmark = pytest.mark.reference

STRIDED, DENSE = SimpleNamespace(READS_STRIDES=True), SimpleNamespace()


def same_memory(a, b):
    return a.data_ptr() == b.data_ptr()


def test_rows_with_gaps_are_copied_only_for_kernels_that_cannot_read_them():
    wide = torch.randn(4, 12)
    for x in (wide[:, 3:9], wide[::2], wide[:1].expand(4, 12), wide.view(2, 2, 12)[..., 3:9]):
        assert same_memory(as_rows(x, STRIDED), x)
        found = as_rows(x, DENSE)
        assert found.is_contiguous() and torch.equal(found, x.reshape(-1, x.shape[-1]))
    for x in (wide, wide.view(2, 2, 12), wide.view(-1)):
        assert same_memory(as_rows(x, DENSE), x)


@pytest.mark.parametrize("kernels", [STRIDED, DENSE])
def test_elements_of_a_row_must_lie_side_by_side(kernels):
    for x in (torch.randn(5, 4).t(), torch.randn(4, 10)[:, ::2], torch.tensor(1.0).expand(4, 5)):
        assert as_rows(x, kernels).stride(1) == 1


@pytest.mark.parametrize("shape", [(), (0,), (7,), (0, 3), (3, 0), (2, 0, 3), (2, 3, 0)])
def test_rows_of_any_shape(shape):
    x = torch.randn(shape)
    found = as_rows(x, STRIDED)
    assert found.dim() == 2 and found.view(shape).shape == shape
    assert found.shape[1] == (shape[-1] if len(shape) > 1 else x.numel())


def test_heads_of_a_fused_projection():
    fused = torch.randn(3, 8, 4)
    keys = fused[:, 4:6]
    assert same_memory(as_heads(keys, STRIDED), keys)
    assert as_heads(keys, DENSE).is_contiguous()
    assert as_heads(fused.transpose(1, 2), STRIDED).stride(2) == 1


def test_needs_grad():
    x, frozen = torch.ones(2, requires_grad=True), torch.ones(2)
    assert needs_grad(frozen, None, x) and not needs_grad(frozen, None)
    with torch.no_grad():
        assert not needs_grad(x)

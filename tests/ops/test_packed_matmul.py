"""Products with packed matrices: every storage against fp64, and the order of their sums."""

from __future__ import annotations

import pytest
import torch

from fastllm.ops import cpp, matmul, same_order, use_backend

pytestmark = pytest.mark.skipif(not cpp.available(), reason=cpp.reason())

packed = cpp.packed_matmul
# Rows around the tiles of every processor; panels of 32 columns, 4 or 2 or 1 at a time; blocks of
# 256 words (512 numbers in bf16), 128 for int8.
ROWS = [1, 2, 3, 4, 7, 8, 13, 14, 15, 29, 70]
SIZES = [(1, 2), (31, 6), (32, 128), (33, 258), (64, 514), (97, 1030), (300, 344), (128, 768)]


def operands(rows, columns, depth, dtype=torch.float32):
    """x inside wider rows, and a weight with a bias."""
    torch.manual_seed(rows * columns + depth)
    x = torch.randn(rows, depth + 6).to(dtype)[:, 2 : depth + 2]
    return x, torch.randn(columns, depth), torch.randn(columns)


def assert_near(found, expected, tolerance):
    assert found.shape == expected.shape
    assert (found.double() - expected).norm() < tolerance * expected.norm()


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("rows", ROWS)
def test_fp32(rows, size):
    x, weight, bias = operands(rows, *size)
    expected = x.double() @ weight.double().t()
    panels, scales = packed.pack(weight, packed.FLOAT32)
    args = x, panels, scales, packed.FLOAT32, size[0]
    assert_near(packed.product(*args), expected, 1e-6)
    assert_near(packed.product(*args, bias=bias), expected + bias.double(), 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("rows", ROWS)
def test_bf16_weights(rows, size, dtype):
    """Numbers that bf16 holds exactly: pairs of products are summed in fp32."""
    x, weight, bias = operands(rows, *size, dtype)
    weight = weight.bfloat16()
    expected = x.double() @ weight.double().t()
    panels, scales = packed.pack(weight.float(), packed.BFLOAT16)
    assert torch.equal(panels, packed.pack(weight, packed.BFLOAT16)[0])
    args = x, panels, scales, packed.BFLOAT16, size[0]
    assert_near(packed.product(*args, wide=True), expected, 2e-6)
    rounded = packed.product(*args, bias=bias)
    assert rounded.dtype == dtype
    assert_near(rounded, expected + bias.double(), 4e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("rows", [1, 5, 29])
def test_int8_weights(rows, size, dtype):
    """A number of a block is off by half a step of the block's largest, at most."""
    columns, depth = size
    x, weight, _ = operands(rows, columns, depth, dtype)
    panels, scales = packed.pack(weight, packed.INT8)
    identity = torch.eye(depth)
    stored = packed.product(identity, panels, scales, packed.INT8, columns).t()
    for block in range(0, depth, 128):
        step = weight[:, block : block + 128].abs().amax(1, keepdim=True) / 127
        off = (stored - weight)[:, block : block + 128].abs()
        assert (off <= step * 0.5001).all()
    found = packed.product(x, panels, scales, packed.INT8, columns, wide=True)
    assert_near(found, x.double() @ stored.double().t(), 2e-6)


def test_other_storage_formats_are_read():
    _, weight, _ = operands(3, 40, 64)
    for dtype in (torch.bfloat16, torch.float16):
        narrow = weight.to(dtype)
        for packing in (packed.FLOAT32, packed.INT8):
            expected = packed.pack(narrow.float(), packing)
            for found, same in zip(packed.pack(narrow, packing), expected, strict=True):
                assert torch.equal(found, same)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("packing", [packed.FLOAT32, packed.BFLOAT16, packed.INT8])
def test_a_row_does_not_depend_on_the_others(dtype, packing):
    x, weight, _ = operands(70, 300, 514, dtype)
    panels, scales = packed.pack(weight, packing)
    whole = packed.product(x, panels, scales, packing, 300)
    for first, last in [(0, 1), (5, 7), (8, 16), (20, 49)]:
        part = packed.product(x[first:last], panels, scales, packing, 300)
        assert torch.equal(part, whole[first:last])


@pytest.mark.parametrize("size", [*SIZES, (96, 4100)], ids=str)
@pytest.mark.parametrize("rows", [1, 3, 14, 31, 70])
def test_same_order_is_that_of_matmul(rows, size):
    """What samples and what trains agree to the last bit."""
    x, weight, _ = operands(rows, *size)
    panels, scales = packed.pack(weight, packed.FLOAT32)
    with same_order():
        trained = matmul(x, weight.t())
        alone = matmul(x[:1], weight.t())
    assert torch.equal(packed.product(x, panels, scales, packed.FLOAT32, size[0]), trained)
    assert torch.equal(alone, trained[:1])


def test_same_order_refuses_what_it_cannot_promise():
    refused = pytest.raises(ValueError, match="expected the C\\+\\+ backend, found torch")
    with refused, use_backend("torch"), same_order():
        pass
    with same_order(), pytest.raises(ValueError, match="expected float32 on the CPU"):
        matmul(torch.ones(2, 2).bfloat16(), torch.ones(2, 2).bfloat16())
    assert matmul(torch.ones(2, 2).bfloat16(), torch.ones(2, 2).bfloat16()).dtype == torch.bfloat16


def test_errors_say_what_was_expected():
    weight = torch.randn(8, 6)
    panels, scales = packed.pack(weight, packed.FLOAT32)
    with pytest.raises(RuntimeError, match="packing must be 0"):
        packed.pack(weight, 3)
    with pytest.raises(RuntimeError, match="panels must be"):
        packed.product(torch.randn(2, 5), panels, scales, packed.FLOAT32, 8)
    with pytest.raises(RuntimeError, match="found float16"):
        packed.product(torch.randn(2, 6).half(), panels, scales, packed.FLOAT32, 8)
    odd = packed.pack(torch.randn(8, 5), packed.BFLOAT16)
    with pytest.raises(RuntimeError, match="even number of columns"):
        packed.product(torch.randn(2, 5), *odd, packed.BFLOAT16, 8)


def test_no_rows():
    panels, scales = packed.pack(torch.randn(8, 6), packed.FLOAT32)
    assert packed.product(torch.randn(0, 6), panels, scales, packed.FLOAT32, 8).shape == (0, 8)

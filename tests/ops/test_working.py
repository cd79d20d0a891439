"""Working copies are what `.to(dtype)` would be, whatever happened to the weight in between."""

from __future__ import annotations

import copy
import io
import timeit

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastllm.ops.working import (
    copy_of,
    keep_copies,
    mark_written,
    narrow_frozen,
    refresh_copies,
    working,
)

BF16 = torch.bfloat16


@pytest.fixture
def weight():
    made = nn.Parameter(torch.randn(6, 5))
    keep_copies([made], BF16)
    return made


def check(weight, dtype=BF16):
    with torch.no_grad():
        assert torch.equal(working(weight, dtype), weight.to(dtype))


def test_without_copies_it_is_the_weight_or_a_conversion():
    weight = nn.Parameter(torch.randn(3))
    assert working(weight, torch.float32) is weight
    check(weight)
    assert copy_of(weight) is None


def test_the_copy_is_made_once(weight):
    with torch.no_grad():
        assert working(weight, BF16) is working(weight, BF16) is copy_of(weight)
    check(weight, torch.float16)
    assert working(weight, torch.float32) is weight


def add(weight):
    with torch.no_grad():
        weight.add_(1)


def load(weight):
    nn.ParameterList([weight]).load_state_dict({"0": torch.randn_like(weight)})


def fused_step(weight):
    weight.grad = torch.ones_like(weight)
    torch.optim.AdamW([weight], fused=True).step()
    torch.autograd.graph.increment_version(weight)


def replace(weight):
    weight.data = torch.randn(6, 5)


def reshape(weight):
    weight.data = torch.randn(2, 3)


@pytest.mark.parametrize("change", [add, load, fused_step, replace, reshape])
def test_changes_of_the_weight_are_noticed(weight, change):
    before = weight.detach().clone()
    change(weight)
    assert weight.shape != before.shape or not torch.equal(weight, before)
    check(weight)


def test_changes_in_place_keep_the_memory(weight):
    address = copy_of(weight).data_ptr()
    add(weight)
    assert working(weight, BF16).data_ptr() == address
    add(weight)
    refresh_copies([weight])
    assert torch.equal(copy_of(weight), weight.to(BF16)) and copy_of(weight).data_ptr() == address
    weight.data.mul_(3)
    refresh_copies([weight], changed=True)
    check(weight)


def test_a_weight_in_the_dtype_itself_has_no_copy(weight):
    weight.data = weight.data.to(BF16)
    assert working(weight, BF16) is weight
    keep_copies([weight, torch.arange(3)], BF16)
    assert copy_of(weight) is None


def test_another_dtype_and_none(weight):
    keep_copies([weight], torch.float16)
    assert copy_of(weight).dtype == torch.float16
    check(weight)
    for _ in range(2):
        keep_copies([weight], weight.dtype)
        assert copy_of(weight) is None


def test_other_devices(weight):
    module = nn.ParameterList([weight]).to("meta")
    assert working(module[0], BF16).device.type == "meta"


@pytest.mark.cuda
def test_on_the_way_to_a_gpu(weight):
    module = nn.ParameterList([weight]).to("cuda")
    assert working(module[0], BF16).is_cuda
    check(module[0])
    check(module.to("cpu")[0])


def test_deep_copies_and_pickles_have_no_copy_of_the_first(weight):
    other = copy.deepcopy(weight)
    add(other)
    check(other)
    plain = torch.randn(3)
    keep_copies([plain], BF16)
    deep = copy.deepcopy(plain)
    assert copy_of(deep) is None
    file = io.BytesIO()
    torch.save(weight, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert copy_of(loaded) is None
    check(loaded)


def test_frozen_weights_that_lose_nothing_are_narrowed():
    exact = nn.Parameter(torch.randn(8).to(BF16).float(), requires_grad=False)
    trained = nn.Parameter(exact.detach().clone())
    fine = nn.Parameter(torch.randn(8), requires_grad=False)
    before = exact.clone()
    narrow_frozen([exact, trained, fine, torch.arange(3)], BF16)
    assert exact.dtype == BF16 and torch.equal(exact.float(), before)
    assert trained.dtype == fine.dtype == torch.float32


def test_tied_weights_share_one(weight):
    first, second = nn.Linear(5, 6), nn.Linear(5, 6)
    first.weight = second.weight = weight
    assert copy_of(first.weight) is copy_of(second.weight)


def test_the_gradient_reaches_the_weight_in_its_dtype(weight):
    x = torch.randn(4, 5, dtype=BF16)
    (x @ working(weight, BF16).t()).float().square().sum().backward()
    twin = nn.Parameter(weight.detach().clone())
    (x @ twin.to(BF16).t()).float().square().sum().backward()
    assert weight.grad.dtype == torch.float32
    assert torch.equal(weight.grad, twin.grad)


def test_in_a_recomputed_pass(weight):
    def layer(x):
        return (x @ working(weight, BF16).t()).float().square().sum()

    x = torch.randn(4, 5, dtype=BF16, requires_grad=True)
    layer(x).backward()
    expected = weight.grad.clone(), x.grad.clone()
    for reentrant in (False, True):
        weight.grad = x.grad = None
        checkpoint(layer, x, use_reentrant=reentrant).backward()
        assert torch.equal(weight.grad, expected[0]) and torch.equal(x.grad, expected[1])


def test_a_step_between_forward_and_backward_is_an_error(weight):
    """Autograd saw the copy: it must not compute with another one."""
    x = torch.randn(4, 5, dtype=BF16, requires_grad=True)
    loss = (x @ working(weight, BF16).t()).sum()
    copy_of(weight).add_(1)
    mark_written([weight])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_in_inference_mode(weight):
    with torch.inference_mode():
        assert working(weight, BF16) is copy_of(weight)
        inside = torch.randn(3)
        with pytest.raises(ValueError, match="inference_mode"):
            keep_copies([inside], BF16)
    add(weight)
    with torch.inference_mode():
        assert torch.equal(working(weight, BF16), weight.to(BF16))
    check(weight)


def test_asking_costs_little(weight):
    same = weight.detach().to(BF16)
    rounds = 2000
    for one in (same, weight):
        with torch.no_grad():
            seconds = min(
                timeit.repeat(lambda one=one: working(one, BF16), number=rounds, repeat=5)
            )
        assert seconds / rounds < 3e-6

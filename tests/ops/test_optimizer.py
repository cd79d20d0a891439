"""AdamW over many tensors: torch.optim's numbers, and decisions that are made on the device."""

from __future__ import annotations

import importlib.util
import math

import pytest
import torch

from fastllm.ops import adamw_reference as reference
from fastllm.ops import use_backend, working
from fastllm.ops.optimizer import AdamW, Settings, Slot

FP32, BF16 = torch.float32, torch.bfloat16
# More than one chunk with a rest, an odd matrix, one element, none.
SHAPES = ((8192 + 777,), (3, 5), (1,), (0, 4), (16,))
DECAYS = (0.1, 0.1, 0.0, 0.1, 0.0)
FINE = torch.tensor(1.0)


@pytest.fixture(autouse=True)
def has_this_op(backend):
    if backend == "cpp":
        pytest.skip("the C++ step is another one: tests/training/test_optimizer.py")


@pytest.fixture
def make(device):
    def slots(parameter=FP32, moment=FP32, copy=None, shapes=SHAPES, seed=1):
        generator = torch.Generator().manual_seed(seed)
        made = []
        for shape, decay in zip(shapes, DECAYS, strict=False):
            weight = torch.randn(shape, generator=generator).to(device, parameter)
            if copy is not None:
                working.keep_copies([weight], copy)
            moments = (torch.zeros(shape, dtype=moment, device=device) for _ in range(2))
            made.append(Slot(weight, *moments, decay))
        return made

    return slots


def drawn(slots, dtype=FP32, size=1.0, seed=2):
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(s.parameter.shape, generator=generator) * size).to(s.parameter.device, dtype)
        for s in slots
    ]


def loss_on(slots, value=1.0):
    return torch.tensor(value, device=slots[0].parameter.device)


def by_torch(slots, steps, max_norm, dtype, rate):
    """The parameters after torch.optim.AdamW's steps, clipped as in its recipe."""
    parameters = [torch.nn.Parameter(s.parameter.to("cpu", dtype, copy=True)) for s in slots]
    groups = [
        {"params": [p], "weight_decay": s.decay} for p, s in zip(parameters, slots, strict=True)
    ]
    adamw = torch.optim.AdamW(groups, lr=rate)
    for gradients in steps:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = None if gradient is None else gradient.to("cpu", dtype, copy=True)
        torch.nn.utils.clip_grad_norm_(parameters, max_norm)
        adamw.step()
    return torch.cat([p.detach().flatten() for p in parameters])


def flat(slots):
    return torch.cat([s.parameter.detach().flatten() for s in slots]).cpu()


@pytest.mark.parametrize("max_norm", [1.0, math.inf])
def test_steps_are_those_of_torch(make, max_norm):
    slots = make()
    steps = [drawn(slots, seed=seed) for seed in (2, 3, 4)]
    steps[1][0] = None
    exact = by_torch(slots, steps, max_norm, torch.float64, 0.01)
    low = by_torch(slots, steps, max_norm, FP32, 0.01)
    adamw = AdamW(slots, Settings(max_norm=max_norm))
    for gradients in steps:
        norm = adamw.step_(gradients, loss_on(slots), 0.01)
    given = torch.cat([g.flatten() for g in steps[-1]])
    torch.testing.assert_close(norm, torch.linalg.vector_norm(given))
    error, allowed = (flat(slots) - exact).abs().max(), (low - exact).abs().max()
    assert error <= 2 * allowed + 1e-7, (error, allowed)
    assert [int(steps) for steps in adamw.steps] == [2, 3, 3, 3, 3]


@pytest.mark.parametrize("count", [1, 3, 700, 10_000, 3_000_000])
def test_bias_correction_keeps_its_digits(make, count):
    slots = make(shapes=((32,),))
    adamw = AdamW(slots, Settings(beta2=0.9999))
    adamw.steps[0].fill_(count - 1)
    before, gradient = slots[0].parameter.double().clone(), drawn(slots)[0]
    adamw.step_([gradient], loss_on(slots), 0.5)
    mean, square = 0.1 * gradient.double(), 0.0001 * gradient.double() ** 2
    size = (square / (1 - 0.9999**count)).sqrt() + 1e-8
    change = before * 0.5 * 0.1 + 0.5 * mean / (1 - 0.9**count) / size
    torch.testing.assert_close(
        before - slots[0].parameter.double(), change, rtol=2e-6, atol=2e-7 * (before.abs().max())
    )


@pytest.mark.parametrize("moment", [FP32, BF16])
def test_working_copies_are_written_in_the_same_pass(make, moment):
    slots = make(copy=BF16, moment=moment)
    working.keep_copies([slots[1].parameter], slots[1].parameter.dtype)
    kept = [working.copy_of(s.parameter) for s in slots]
    adamw = AdamW(slots, Settings())
    for seed in (2, 3):
        adamw.step_(drawn(slots, seed=seed), loss_on(slots), 0.1)
    for slot, copy in zip(slots, kept, strict=True):
        if copy is not None:
            assert torch.equal(copy, slot.parameter.to(BF16))
            assert working.working(slot.parameter, BF16).data_ptr() == copy.data_ptr()
    assert kept[1] is None


def test_a_step_counts_as_a_write(make):
    slots = make(copy=BF16)
    weight = slots[0].parameter
    copy, versions = working.copy_of(weight), weight._version
    versions = weight._version, copy._version
    AdamW(slots, Settings()).step_(drawn(slots), loss_on(slots), 0.1)
    assert weight._version > versions[0] and copy._version > versions[1]
    weight.mul_(2)
    assert torch.equal(working.working(weight, BF16), weight.to(BF16))


def test_gradients_in_any_layout(make, restrided):
    shapes = (5, 6), (4, 8)
    expected = make(shapes=shapes)
    plain = drawn(expected, BF16)
    AdamW(expected, Settings()).step_([g.float() for g in plain], loss_on(expected), 0.1)
    for strides in ("every_other_column", "inside", "transposed"):
        slots = make(shapes=shapes)
        given = [restrided(plain[0].float(), strides), plain[1]]
        AdamW(slots, Settings()).step_(given, loss_on(slots), 0.1)
        assert torch.equal(flat(slots), flat(expected))


@pytest.mark.parametrize("bad", ["nan", "inf", "-inf"])
def test_after_a_bad_gradient_nothing_changes_until_it_is_cleared(make, bad):
    slots = make(copy=BF16)
    adamw, good, fine = AdamW(slots, Settings()), drawn(slots), loss_on(slots)
    adamw.step_(good, fine, 0.1)
    before = [t.clone() for s in slots for t in (*s[:3], working.copy_of(s.parameter))]
    wrong = drawn(slots)
    wrong[0][-1] = float(bad)
    assert not adamw.step_(wrong, fine, 0.1).isfinite()
    assert adamw.step_(good, fine, 0.1).isfinite()
    after = [t for s in slots for t in (*s[:3], working.copy_of(s.parameter))]
    assert all(map(torch.equal, before, after))
    assert adamw.failed() and [int(n) for n in adamw.steps] == [1] * 5
    adamw.clear_failure()
    adamw.step_(good, fine, 0.1)
    assert not adamw.failed() and not torch.equal(before[0], slots[0].parameter)


@pytest.mark.parametrize("scaled", [False, True])
def test_a_bad_loss_is_a_failure(make, scaled):
    slots = make()
    adamw, before = AdamW(slots, Settings(scaled=scaled)), flat(slots)
    adamw.step_(drawn(slots), loss_on(slots, math.nan), 0.1)
    assert adamw.failed() and torch.equal(flat(slots), before)
    assert float(adamw.scale) == (reference.FIRST_SCALE if scaled else 1)


def test_the_loss_scale_falls_and_grows_as_in_torch(make):
    slots, twins = make(), make()
    scaled = AdamW(slots, Settings(max_norm=1.0, scaled=True, growth_interval=2))
    plain = AdamW(twins, Settings(max_norm=1.0))
    scaler = torch.amp.GradScaler("cpu", growth_interval=2)
    scaler.scale(torch.zeros(()))
    for step, overflows in enumerate((False, True, False, False, False)):
        size = float(scaled.scale)
        assert size == scaler.get_scale()
        gradients = drawn(slots, size=size, seed=step)
        if overflows:
            gradients[1][0, 0] = math.inf
        norm = scaled.step_(gradients, loss_on(slots), 0.01)
        assert bool(norm.isfinite()) is not overflows
        if not overflows:
            expected = plain.step_(drawn(twins, seed=step), loss_on(twins), 0.01)
            torch.testing.assert_close(norm, expected)
        seen = torch.nn.Parameter(torch.zeros(1))
        seen.grad = torch.tensor([math.inf if overflows else 1.0])
        scaler.unscale_(torch.optim.SGD([seen], lr=0.0))
        scaler.update()
    torch.testing.assert_close(flat(slots), flat(twins))
    assert scaled.skipped() == 1 and not scaled.failed() and scaled.clean_steps() == 1


def test_zeros_are_left_even_where_the_step_is_not_taken(make):
    slots = make()
    adamw = AdamW(slots, Settings())
    for bad in (False, True):
        gradients = drawn(slots)
        gradients[2] = None
        if bad:
            gradients[0][5] = math.nan
        adamw.step_(gradients, loss_on(slots), 0.1, zero=True)
        assert not any(g.any() for g in gradients if g is not None)


def test_the_rate_can_stay(make):
    slots, twins = make(), make()
    one, other = AdamW(slots, Settings()), AdamW(twins, Settings())
    for seed in (2, 3):
        one.step_(drawn(slots, seed=seed), loss_on(slots), 0.03)
        other.step_(drawn(slots, seed=seed), loss_on(slots), 0.03 if seed == 2 else None)
    assert torch.equal(flat(slots), flat(twins))


# -- bf16 ------------------------------------------------------------------------------------------


def test_bf16_is_rounded_right_on_average(make, device):
    """Many equal weights take the same small step; a step is a tenth of the last bit."""
    count, rate = 8192 + 100, 2.0**-8 / 10
    weight = torch.ones(count, dtype=BF16, device=device)
    moments = [torch.zeros(count, device=device) for _ in range(2)]
    adamw = AdamW([Slot(weight, *moments, 0.0)], Settings(seed=3))
    gradient = torch.full((count,), -1.0, dtype=BF16, device=device)
    for _ in range(10):
        adamw.step_([gradient], torch.ones((), device=device), rate)
    # The expected weight is 1 + 10 rates; a weight is off by less than one bit each step.
    error = (weight.double().mean() - (1 + 10 * rate)).abs()
    assert error < 4 * (2.0**-7) * math.sqrt(10 * 0.25 / count)
    assert 1 < len(weight.unique()) <= 11


def test_a_square_in_bf16_does_not_stand_still(make, device):
    """Each step changes it by a thousandth, a quarter of its last bit."""
    count = 4096
    slot = Slot(*(torch.ones(count, dtype=BF16, device=device) for _ in range(3)), 0.0)
    adamw = AdamW([slot], Settings(seed=1))
    for _ in range(20):
        adamw.step_(
            [torch.zeros(count, dtype=BF16, device=device)], torch.ones((), device=device), 0.0
        )
    expected = 0.999**20
    assert abs(float(slot.square.double().mean()) - expected) < 4 * 2.0**-8 * math.sqrt(5 / count)
    assert abs(float(slot.mean.double().mean()) - 0.9**20) < 0.01
    assert torch.equal(slot.parameter, torch.ones_like(slot.parameter))


def test_random_bits_depend_on_seed_tensor_step_and_element_only(make):
    def stepped(seed=0, begin=0, shapes=SHAPES, first=0):
        slots = make(BF16, BF16, shapes=shapes)
        adamw = AdamW(slots, Settings(seed=seed))
        for steps in adamw.steps:
            steps.fill_(begin)
        adamw.step_(drawn(slots, BF16), loss_on(slots), 1e-3)
        return slots[first].parameter

    same = stepped()
    assert torch.equal(same, stepped())
    # Norms differ with the other tensors, so clipping is off; the first tensor is the same.
    assert torch.equal(same, stepped(shapes=SHAPES[:1]))
    for other in (stepped(seed=1), stepped(begin=1)):
        assert 0.2 < (other != same).float().mean() < 0.8


@pytest.mark.parametrize(("parameter", "moment"), [(BF16, FP32), (BF16, BF16), (FP32, BF16)])
def test_the_bits_are_those_of_the_reference(make, parameter, moment):
    found = []
    for name in (None, "torch"):
        slots = make(parameter, moment)
        if name is None:
            adamw = AdamW(slots, Settings(seed=9))
        else:
            with use_backend(name):
                adamw = AdamW(slots, Settings(seed=9))
        for seed in (2, 3):
            adamw.step_(drawn(slots, BF16, seed=seed), loss_on(slots), 1e-3)
        found.append([t for slot in slots for t in slot[:3]])
    for ours, exact in zip(*found, strict=True):
        torch.testing.assert_close(ours, exact, rtol=2.0**-7, atol=1e-6)
        # What rounds differently lay within fp32's error of its random threshold.
        if ours.dtype == BF16:
            assert int((ours != exact).sum()) <= 0.01 * ours.numel()


@pytest.mark.reference
class TestRandomWords:
    COUNT = 1 << 16

    def words(self, seed=0, stream=0, step=1):
        like = torch.empty(self.COUNT)
        return reference.random_words(seed, stream, torch.tensor(float(step)), like)

    def test_every_bit_is_fair_and_none_follows_another(self):
        words = self.words()
        bits = ((words[:, None] >> torch.arange(32)) & 1).double() * 2 - 1
        limit = 5 / math.sqrt(self.COUNT)
        assert bits.mean(0).abs().max() < limit
        correlation = bits.T @ bits / self.COUNT - torch.eye(32)
        assert correlation.abs().max() < limit
        neighbours = (bits[1:] * bits[:-1]).mean(0)
        assert neighbours.abs().max() < limit

    @pytest.mark.parametrize("change", [{"seed": 1}, {"stream": 1}, {"step": 2}])
    def test_streams_are_independent(self, change):
        one, other = self.words(), self.words(**change)
        differing = sum(int(((one ^ other) >> bit & 1).sum()) for bit in range(32))
        assert abs(differing / (32 * self.COUNT) - 0.5) < 5 * 0.5 / math.sqrt(32 * self.COUNT)

    def test_the_three_shares_are_uniform_and_uncorrelated(self):
        shares = reference.shares(self.words())
        scaled = torch.stack([share.double() / 65536 - 0.5 for share in shares])
        assert scaled.mean(1).abs().max() < 5 * math.sqrt(1 / 12 / self.COUNT)
        assert (scaled.square().mean(1) - 1 / 12).abs().max() < 5 * 0.075 / math.sqrt(self.COUNT)
        correlation = torch.corrcoef(scaled) - torch.eye(3)
        assert correlation.abs().max() < 5 / math.sqrt(self.COUNT)
        for share in shares:
            counts = torch.bincount(share >> 8, minlength=256).double()
            expected = self.COUNT / 256
            assert ((counts - expected) ** 2 / expected).sum() < 255 + 5 * math.sqrt(2 * 255)

    def test_words_of_distant_elements_differ(self):
        words = self.words()
        assert len(words.unique()) == self.COUNT  # a bijection of the elements


@pytest.mark.reference
def test_rounding_keeps_what_is_no_number_and_what_needs_none():
    x = torch.tensor([1.0, -2.5, 0.0, -0.0, math.inf, -math.inf, math.nan])
    random = torch.full((7,), 0xFFFF)
    found = reference.rounded(x, BF16, random)
    torch.testing.assert_close(found.float(), x, rtol=0, atol=0, equal_nan=True)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_the_kernels_and_the_reference_agree_on_places(device):
    from fastllm.kernels import step_decision as kernels

    for name in ("RATE", "FACTOR", "SCALE", "TAKEN", "FAILED", "CLEAN", "SKIPPED"):
        assert getattr(kernels, name).value == getattr(reference, name)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_more_sums_and_tensors_than_a_block(backend, device):
    if backend != "triton":
        pytest.skip("a kernel")
    from fastllm.kernels.optimizer import finish_

    sums, count = torch.rand(20_000, device=device), 9_000
    present = torch.arange(count, device=device) % 2
    steps, scales = torch.zeros(count, device=device), torch.zeros(count, 2, device=device)
    numbers = torch.tensor([0.5, 0.0, 1.0], device=device)
    counts = torch.zeros(4, dtype=torch.int32, device=device)
    loss, norm = torch.ones((), device=device), torch.zeros((), device=device)
    logs = math.log(0.9), math.log(0.999)
    finish_(sums, present, steps, scales, numbers, counts, loss, norm, 2.0, *logs, 2000, False)
    torch.testing.assert_close(norm.double(), sums.double().sum().sqrt(), check_dtype=False)
    torch.testing.assert_close(numbers[1], 2.0 / (norm + 1e-6))
    assert torch.equal(steps, present.float()) and counts.tolist() == [1, 0, 0, 0]
    expected = torch.tensor([0.5 / 0.1, 0.001**-0.5], device=device).expand(count, 2)
    torch.testing.assert_close(scales, expected, rtol=1e-6, atol=0)


def test_refusals(make, backend):
    slots = make(shapes=((4, 8),))
    with use_backend("cpp"), pytest.raises(RuntimeError, match="cpp"):
        AdamW(slots, Settings())
    if backend != "triton":
        return
    gaps = Slot(torch.zeros(4, 16, device=slots[0].parameter.device)[:, ::2], *slots[0][1:])
    with pytest.raises(ValueError, match="expected contiguous"):
        AdamW([gaps], Settings()).step_([drawn(slots)[0]], loss_on(slots), 0.1)
    odd = Slot(torch.zeros(33, device=slots[0].parameter.device)[1:].view(4, 8), *slots[0][1:])
    with pytest.raises(ValueError, match="multiples of 16"):
        AdamW([odd], Settings()).step_([drawn(slots)[0]], loss_on(slots), 0.1)
    with pytest.raises(ValueError, match="left as zeros"):
        transposed = drawn(slots)[0].T.contiguous().T
        AdamW(slots, Settings()).step_([transposed], loss_on(slots), 0.1, zero=True)


# -- on a GPU --------------------------------------------------------------------------------------


@pytest.mark.cuda
def test_a_step_does_not_wait(make):
    slots = make(copy=BF16)
    adamw, steps = AdamW(slots, Settings(max_norm=1.0)), [drawn(slots, seed=s) for s in range(3)]
    adamw.step_(steps[0], loss_on(slots), 0.1)
    loss = loss_on(slots)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for gradients in steps:
            adamw.step_(gradients, loss, 0.1)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.cuda
def test_a_graph_replays_steps(make):
    slots, twins = make(copy=BF16), make(copy=BF16)
    captured, plain = AdamW(slots, Settings()), AdamW(twins, Settings())
    gradients, loss = drawn(slots), loss_on(slots)
    captured.step_(gradients, loss, 0.1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step_(gradients, loss, None)
    for _ in range(3):
        graph.replay()
    for _ in range(4):
        plain.step_(gradients, loss, 0.1)
    assert torch.equal(flat(slots), flat(twins))
    assert [int(n) for n in captured.steps] == [4] * 5


@pytest.mark.cuda
def test_more_than_2_to_the_31_elements(device):
    count = 2**31 + 8192 + 24
    weight = torch.zeros(count, dtype=BF16, device=device)
    slot = Slot(weight, *(torch.zeros_like(weight) for _ in range(2)), 0.0)
    adamw = AdamW([slot], Settings(max_norm=1.0))
    gradient = torch.zeros_like(weight)
    gradient[-3:] = 2.0
    norm = adamw.step_([gradient], torch.ones((), device=device), 0.5)
    torch.testing.assert_close(norm, torch.tensor(12.0**0.5, device=device))
    torch.testing.assert_close(weight[-3:].float(), torch.full((3,), -0.5, device=device))
    assert int(weight.count_nonzero()) == 3

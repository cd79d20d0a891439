from __future__ import annotations

import pytest
import torch

from fastllm.layout import PackedLayout
from fastllm.ops import attention, decode_attention
from fastllm.ops.decode_attention import decode_attention_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
large = pytest.mark.large

# prompt lengths [G], group of each sequence [B], tail lengths [B]
BATCHES = {
    "one token": ([0], [0], [1]),
    "one sequence": ([5], [0], [3]),
    "one group": ([6], [0, 0, 0], [1, 4, 2]),
    "three groups": ([4, 1, 7], [0, 0, 1, 2, 2, 2], [2, 5, 1, 3, 3, 1]),
    "not adjacent": ([4, 3], [1, 0, 1, 0, 1], [2, 1, 4, 3, 1]),
    "empty prompt": ([0, 3], [0, 1, 0], [2, 2, 1]),
    "unused prompt": ([3, 5, 2], [2, 0], [1, 2]),
    "across blocks": ([37, 1], [0, 0, 1], [19, 1, 33]),
    "long": pytest.param(([300, 130], [0] * 9 + [1] * 3, [*range(60, 72)]), marks=large),
}


def batches(*names):
    chosen = {name: BATCHES[name] for name in names} if names else BATCHES
    return pytest.mark.parametrize(
        ("prompts", "group", "tails"),
        [
            pytest.param(*case.values[0], marks=case.marks, id=name)
            if hasattr(case, "marks")
            else pytest.param(*case, id=name)
            for name, case in chosen.items()
        ],
    )


def batch(prompts, group, tails, heads=4, key_heads=2, head_dim=8, room=2):
    """A cache whose tails lie in shuffled rows, with rows and columns to spare."""
    size, spare = len(group), len(group) + 2
    longest = max(tails, default=0) + room
    starts = torch.tensor([0, *prompts]).cumsum(0)
    return {
        "q": torch.randn(size, heads, head_dim),
        "prefix_k": torch.randn(int(starts[-1]), key_heads, head_dim),
        "prefix_v": torch.randn(int(starts[-1]), key_heads, head_dim),
        "prefix_starts": starts.int(),
        "group": torch.tensor(group, dtype=torch.int32),
        "tail_k": torch.randn(spare, longest, key_heads, head_dim),
        "tail_v": torch.randn(spare, longest, key_heads, head_dim),
        "tail_rows": torch.randperm(spare)[:size].int(),
        "tail_lengths": torch.tensor(tails, dtype=torch.int32),
    }


def sequence_cache(given, b):
    """Keys and values of sequence b alone [L, K, D], in fp64."""
    first, last = given["prefix_starts"][given["group"][b] :][:2].tolist()
    row, length = int(given["tail_rows"][b]), int(given["tail_lengths"][b])
    return [
        torch.cat(
            (given[f"prefix_{kind}"][first:last], given[f"tail_{kind}"][row, :length])
        ).double()
        for kind in "kv"
    ]


def one_by_one(given, scale=None, window=None):
    """Plain softmax attention, one sequence at a time, in fp64."""
    outputs = []
    for b, q in enumerate(given["q"].double()):
        k, v = (t[-window:] if window else t for t in sequence_cache(given, b))
        k, v = (t.repeat_interleave(len(q) // t.shape[1], dim=1) for t in (k, v))
        scores = torch.einsum("hd,thd->ht", q, k) * (scale or q.shape[-1] ** -0.5)
        outputs.append(torch.einsum("ht,thd->hd", scores.softmax(-1), v))
    return torch.stack(outputs)


@pytest.fixture
def check(device, assert_error_ratio):
    def check(given, dtype=torch.float32, **options):
        given = {n: t.to(dtype) if t.is_floating_point() else t for n, t in given.items()}
        exact = one_by_one(given, **options)
        on_device = {name: t.to(device) for name, t in given.items()}
        low = decode_attention_reference(**on_device, **options)
        found = decode_attention(**on_device, **options)
        assert_error_ratio(found, exact.to(device), low)
        return found

    return check


@pytest.mark.parametrize("dtype", DTYPES)
@batches()
def test_batches(check, prompts, group, tails, dtype):
    check(batch(prompts, group, tails), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "key_heads", "head_dim"),
    [(1, 1, 8), (2, 1, 20), (4, 1, 32), (8, 2, 64), (3, 3, 80), (2, 2, 128)],
)
def test_heads(check, heads, key_heads, head_dim, dtype):
    check(batch([5, 2], [0, 0, 1], [3, 1, 2], heads, key_heads, head_dim), dtype)


@pytest.mark.parametrize("window", [1, 2, 5, 7, 100])
@batches("one group", "three groups", "empty prompt", "across blocks")
def test_windows(check, prompts, group, tails, window):
    check(batch(prompts, group, tails), window=window)


@pytest.mark.parametrize("scale", [0.05, 1.0, 3.0])
def test_scale(check, scale):
    check(batch([5], [0, 0], [3, 1]), scale=scale)


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_scores(check, dtype):
    given = batch([5], [0, 0], [3, 1])
    check({**given, "q": given["q"] * 300}, dtype)


def test_no_sequences(device):
    given = {name: t.to(device) for name, t in batch([3], [], []).items()}
    assert decode_attention(**given).shape == (0, 4, 8)


def test_cache_without_spare_room(check):
    given = batch([3], [0, 0], [2, 2], room=0)
    check({**given, "tail_rows": torch.tensor([1, 3], dtype=torch.int32)})


def test_strided_queries(check, restrided):
    given = batch([3, 2], [0, 1], [2, 1])
    for strides in ("every_other_row", "every_other_column", "transposed", "expanded"):
        q = restrided(given["q"], strides)
        check({**given, "q": q})


@pytest.mark.parametrize("name", ["prefix_k", "prefix_v", "tail_k", "tail_v"])
@pytest.mark.parametrize("strides", ["every_other_row", "every_other_column", "transposed"])
def test_strided_caches_are_right_or_refused(device, restrided, name, strides):
    given = batch([3, 2], [0, 1], [2, 1])
    expected = one_by_one(given)
    given = {n: t.to(device) for n, t in given.items()}
    given[name] = restrided(given[name], strides)
    try:
        found = decode_attention(**given)
    except (ValueError, RuntimeError) as error:
        assert "contiguous" in str(error)
    else:
        torch.testing.assert_close(found.double().cpu(), expected, atol=1e-5, rtol=1e-5)


def test_rest_of_the_cache_is_not_read(device):
    """A cache is allocated, not cleared: what lies past a tail may be anything, even NaN."""
    given = batch([4, 3], [1, 0, 1], [2, 1, 3])
    expected = one_by_one(given)
    for name in ("tail_k", "tail_v"):
        used = torch.zeros(given[name].shape[:2], dtype=torch.bool)
        for row, length in zip(given["tail_rows"], given["tail_lengths"], strict=True):
            used[row, :length] = True
        given[name][~used] = float("nan")
    found = decode_attention(**{name: t.to(device) for name, t in given.items()})
    torch.testing.assert_close(found.double().cpu(), expected, atol=1e-5, rtol=1e-5)


def test_other_groups_have_no_influence(device):
    given = {name: t.to(device) for name, t in batch([4, 3], [0, 1, 0], [2, 1, 3]).items()}
    before = decode_attention(**given)
    given["prefix_k"][4:] = 1e30
    given["prefix_v"][4:] = 1e30
    after = decode_attention(**given)
    assert torch.equal(after[0], before[0]) and torch.equal(after[2], before[2])
    assert not torch.equal(after[1], before[1])


def test_a_broken_sequence_stays_alone(backend, device):
    """Sequences that share a prompt are computed together, but not their infinities."""
    given = {n: t.to(device) for n, t in batch([6], [0, 0, 0], [3, 4, 2]).items()}
    expected = decode_attention(**given)
    given["tail_v"][given["tail_rows"][1].long(), 2] = float("inf")
    found = decode_attention(**given)
    assert not found[1].isfinite().all()
    assert torch.equal(found[[0, 2]], expected[[0, 2]])


@pytest.mark.parametrize("window", [None, 4])
def test_equals_the_last_row_of_packed_attention(device, window):
    """Sampler and trainer compute the same thing."""
    given = batch([5], [0, 0], [3, 2])
    layout = PackedLayout([5, 3, 2], [-1, 0, 0], device).select([7, 9])
    tails = [
        torch.cat([given[name][row, :n] for row, n in zip(given["tail_rows"], (3, 2), strict=True)])
        for name in ("tail_k", "tail_v")
    ]
    k, v = (
        torch.cat((given[f"prefix_{kind}"], tail)).to(device)
        for kind, tail in zip("kv", tails, strict=True)
    )
    expected = attention(given["q"].to(device), k, v, layout, window=window)
    found = decode_attention(**{n: t.to(device) for n, t in given.items()}, window=window)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_two_runs_are_bitwise_equal(device):
    given = batch([37, 1], [0, 0, 1], [19, 1, 33])
    given = {name: t.to(device) for name, t in given.items()}
    assert torch.equal(decode_attention(**given), decode_attention(**given))


def test_inputs_are_not_written_to(device):
    given = {name: t.to(device) for name, t in batch([4], [0, 0], [2, 3]).items()}
    before = {name: t.clone() for name, t in given.items()}
    decode_attention(**given)
    assert all(torch.equal(given[name], before[name]) for name in given)


@pytest.mark.parametrize("name", ["q", "prefix_k", "prefix_v", "tail_k", "tail_v"])
def test_gradients_are_refused(device, name):
    given = {n: t.to(device) for n, t in batch([4], [0], [2]).items()}
    given[name].requires_grad_()
    with pytest.raises(RuntimeError, match="no backward pass"):
        decode_attention(**given)
    with torch.no_grad():
        assert not decode_attention(**given).requires_grad


@pytest.mark.reference
def test_reference_in_fp64_equals_one_by_one():
    given = batch([4, 0, 7], [2, 0, 1, 2], [2, 5, 1, 3])
    given = {n: t.double() if t.is_floating_point() else t for n, t in given.items()}
    for window in (None, 3):
        torch.testing.assert_close(
            decode_attention_reference(**given, window=window), one_by_one(given, window=window)
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prefix_v": (3, 2, 8)}, r"\(4, 2, 8\), \(3, 2, 8\)"),
        ({"tail_v": (3, 3, 2, 8)}, r"same shape"),
        ({"prefix_k": (4, 1, 8), "prefix_v": (4, 1, 8)}, r"\(4, 1, 8\)"),
        ({"q": (2, 4, 6)}, r"\[Tp, K, 6\]"),
        ({"q": (2, 3, 8)}, "3 query heads.*2"),
        ({"q": (3, 4, 8)}, r"must be \[3\]"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_wrong_shapes(device, change, message):
    given = batch([4], [0, 0], [2, 1]) | {n: torch.zeros(shape) for n, shape in change.items()}
    with pytest.raises(ValueError, match=message):
        decode_attention(**{name: t.to(device) for name, t in given.items()})


def test_window_below_one(device):
    given = {name: t.to(device) for name, t in batch([4], [0], [2]).items()}
    with pytest.raises(ValueError, match="window must be at least 1"):
        decode_attention(**given, window=0)

from __future__ import annotations

import pytest
import torch

from fastllm.layout import PackedLayout
from fastllm.ops import attention, decode_attention
from fastllm.ops.decode_attention import BLOCK, decode_attention_reference

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
    "across blocks": ([63, 65], [0, 0, 1], [64, 1, 65]),
    "whole blocks": ([64], [0, 0], [128, 64]),
    "long": pytest.param(([300, 130], [0] * 9 + [1] * 3, [*range(60, 72)]), marks=large),
    "many": pytest.param(([70, 1], [0] * 41 + [1] * 3, [*range(1, 45)]), marks=large),
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


def tables(lengths, free):
    """A row of blocks, in any order, for each length; entries that nobody needs are nonsense."""
    used = [-(-length // BLOCK) for length in lengths]
    table = torch.full((len(lengths), max(used, default=0) + 1), 1 << 30, dtype=torch.int32)
    for row, count in zip(table, used, strict=True):
        row[:count] = torch.tensor([free.pop() for _ in range(count)], dtype=torch.int32)
    return table


def batch(prompts, group, tails, heads=4, key_heads=2, head_dim=8):
    """A cache in shuffled blocks: a few to spare, and NaN wherever there is no token."""
    total = sum(-(-length // BLOCK) for length in [*prompts, *tails]) + 2
    free = torch.randperm(total).tolist()
    given = {
        "q": torch.randn(len(group), heads, head_dim),
        "keys": torch.full((total, key_heads, head_dim, BLOCK), torch.nan),
        "values": torch.full((total, key_heads, BLOCK, head_dim), torch.nan),
        "prefix_blocks": tables(prompts, free),
        "prefix_lengths": torch.tensor(prompts, dtype=torch.int32),
        "group": torch.tensor(group, dtype=torch.int32),
        "tail_blocks": tables(tails, free),
        "tail_lengths": torch.tensor(tails, dtype=torch.int32),
    }
    for kind in ("prefix", "tail"):
        for row, length in enumerate(given[f"{kind}_lengths"]):
            block, place = places(given[f"{kind}_blocks"][row], int(length))
            given["keys"][block, :, :, place] = torch.randn(int(length), key_heads, head_dim)
            given["values"][block, :, place] = torch.randn(int(length), key_heads, head_dim)
    return given


def places(blocks, length):
    """Block of each of the first tokens of a run, and where in it they are."""
    token = torch.arange(length)
    return blocks[token // BLOCK].long(), token % BLOCK


def run(given, kind, row):
    """Keys and values of one prompt or tail [L, K, D]."""
    block, place = places(given[f"{kind}_blocks"][row], int(given[f"{kind}_lengths"][row]))
    return given["keys"][block, :, :, place], given["values"][block, :, place]


def one_by_one(given, scale=None, window=None):
    """Plain softmax attention, one sequence at a time, in fp64."""
    outputs = []
    for b, q in enumerate(given["q"].double()):
        runs = run(given, "prefix", int(given["group"][b])), run(given, "tail", b)
        k, v = (torch.cat(pair).double() for pair in zip(*runs, strict=True))
        k, v = (t[-window:] if window else t for t in (k, v))
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
    [(1, 1, 8), (2, 1, 20), (4, 1, 32), (6, 2, 48), (8, 2, 64), (3, 3, 80), (2, 2, 128)],
)
def test_heads(check, heads, key_heads, head_dim, dtype):
    check(batch([5, 2], [0, 0, 1], [3, 1, 2], heads, key_heads, head_dim), dtype)


@large
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [2, 14, 16, 36, 66, 80, 96, 100, 112, 256])
@pytest.mark.parametrize("heads", [1, 2, 3, 5, 7, 11, 140])
def test_many_heads(check, heads, head_dim, dtype):
    check(batch([70, 2], [0, 0, 1], [3, 33, 65], heads, 1, head_dim), dtype)


@pytest.mark.parametrize("window", [1, 2, 5, 7, 66, 100])
@batches("one group", "three groups", "empty prompt", "across blocks")
def test_windows(check, prompts, group, tails, window):
    check(batch(prompts, group, tails), window=window)


@pytest.mark.parametrize("window", [None, 3, 270, 400])
@pytest.mark.parametrize(
    ("prompts", "group", "tails"),
    [
        ([255, 257], [0, 0, 1], [1, 256, 257]),
        ([513], [0], [300]),
        # More than 32 splits of 256 tokens: all of them are longer then.
        ([8200], [0, 0], [1, 3]),
        ([0], [0], [8449]),
    ],
    ids=str,
)
def test_runs_of_many_splits(check, prompts, group, tails, window):
    check(batch(prompts, group, tails, heads=2, key_heads=1, head_dim=4), window=window)


def test_neighbours_are_cut_into_tiles(check):
    """Runs of a prompt that do not begin or end where a tile of sequences would."""
    check(batch([9, 70, 3], [0] * 5 + [1] * 20 + [0] * 2 + [2] * 9, [2] * 36, 4, 1))


def test_company_changes_nothing_in_triton(device, backend):
    """A run is divided by its length alone, wherever a sequence stands and whoever is there."""
    if backend != "triton":
        pytest.skip("PyTorch promises nothing; for C++ see below")
    given = batch([300, 5, 70], [0, 1, 2], [2, 600, 66], head_dim=16)
    given = {name: tensor.to(device) for name, tensor in given.items()}
    together = decode_attention(**given)
    for row in range(3):
        alone = {n: given[n][row : row + 1] for n in ("q", "tail_blocks", "tail_lengths")}
        alone["tail_blocks"] = alone["tail_blocks"][:, : -(-int(alone["tail_lengths"]) // BLOCK)]
        for name in ("prefix_blocks", "prefix_lengths"):
            alone[name] = given[name][row : row + 1]
        alone["group"] = torch.zeros_like(given["group"][:1])
        assert torch.equal(decode_attention(**given | alone), together[row : row + 1])


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


def test_tables_without_spare_columns(check):
    given = batch([64], [0, 0], [64, 1])
    for name in ("prefix_blocks", "tail_blocks"):
        given[name] = given[name][:, :-1].contiguous()
    check(given)


def test_slices_of_wider_tables(check):
    """The scheduler's tables have room for more sequences and longer ones."""
    given = batch([3, 70], [0, 1], [2, 66])
    for name in ("prefix_blocks", "prefix_lengths", "tail_blocks", "tail_lengths", "group"):
        wide = torch.full([n + 3 for n in given[name].shape], -7, dtype=torch.int32)
        part = wide[tuple(slice(n) for n in given[name].shape)]
        part.copy_(given[name])
        given[name] = part
    check(given)


def test_strided_queries(check, restrided):
    given = batch([3, 2], [0, 1], [2, 1])
    for strides in ("every_other_row", "every_other_column", "transposed", "expanded"):
        q = restrided(given["q"], strides)
        check({**given, "q": q})


@pytest.mark.parametrize("name", ["keys", "values"])
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


@pytest.mark.parametrize("rubbish", [torch.nan, torch.inf, 1e30])
def test_rest_of_the_cache_is_not_read(device, rubbish):
    """A cache is allocated, not cleared: what lies past a length may be anything."""
    given = batch([4, 67], [1, 0, 1], [2, 1, 66])
    clean = {n: t.nan_to_num(0.0) if t.is_floating_point() else t for n, t in given.items()}
    expected = decode_attention(**{name: t.to(device) for name, t in clean.items()})
    for name in ("keys", "values"):
        given[name][given[name].isnan()] = rubbish
    found = decode_attention(**{name: t.to(device) for name, t in given.items()})
    assert torch.equal(found, expected)


def test_other_groups_have_no_influence(device):
    given = {name: t.to(device) for name, t in batch([4, 3], [0, 1, 0], [2, 1, 3]).items()}
    before = decode_attention(**given)
    for name in ("keys", "values"):
        given[name][given["prefix_blocks"][1, 0].long()] = 1e30
    after = decode_attention(**given)
    assert torch.equal(after[0], before[0]) and torch.equal(after[2], before[2])
    assert not torch.equal(after[1], before[1])


def test_a_broken_sequence_stays_alone(device):
    """Sequences that share a prompt are computed together, but not their infinities."""
    given = {n: t.to(device) for n, t in batch([6], [0, 0, 0], [3, 4, 2]).items()}
    expected = decode_attention(**given)
    given["values"][given["tail_blocks"][1, 0].long(), :, 2] = float("inf")
    found = decode_attention(**given)
    assert not found[1].isfinite().all()
    assert torch.equal(found[[0, 2]], expected[[0, 2]])


# -- what the sampler computes and what the trainer computes ---------------------------------------


def packed(given):
    """The same sequences as packed rows: keys, values, and the layout of the newest tokens."""
    prompts, tails = given["prefix_lengths"].tolist(), given["tail_lengths"].tolist()
    runs = [run(given, "prefix", g) for g in range(len(prompts))]
    runs += [run(given, "tail", b) for b in range(len(tails))]
    k, v = (torch.cat(tensors) for tensors in zip(*runs, strict=True))
    prefix = [-1] * len(prompts) + given["group"].tolist()
    newest = torch.tensor(prompts + tails).cumsum(0)[len(prompts) :] - 1
    layout = PackedLayout(prompts + tails, prefix, given["q"].device)
    return k, v, layout.select(newest.tolist())


@pytest.mark.parametrize("window", [None, 4, 70])
def test_equals_the_last_row_of_packed_attention(device, window):
    given = batch([5, 70], [0, 0, 1], [3, 2, 66])
    k, v, layout = packed(given)
    expected = attention(
        given["q"].to(device), k.to(device), v.to(device), layout.to(device), window=window
    )
    found = decode_attention(**{n: t.to(device) for n, t in given.items()}, window=window)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


# Order and rounding of every sum are the same in both: the ratio of GRPO is exactly one on policy.
@pytest.mark.reference
@pytest.mark.parametrize(
    ("heads", "key_heads", "head_dim"),
    [(1, 1, 16), (4, 2, 32), (12, 4, 64), (3, 1, 80), (7, 1, 20), (9, 1, 128), (5, 5, 96)],
)
@pytest.mark.parametrize("length", [0, 1, 63, 64, 65, 200])
def test_equals_packed_attention_bit_for_bit(cpp_kernels, heads, key_heads, head_dim, length):
    tails = [1, 2, 63, 64, 65, 130]
    given = batch([length, 7], [0] * 5 + [1], tails, heads, key_heads, head_dim)
    k, v, layout = packed(given)
    expected, _ = cpp_kernels.attention.forward(given["q"], k, v, layout, 0.3, 0)
    assert torch.equal(cpp_kernels.decode_attention.forward(**given, scale=0.3, window=0), expected)


@pytest.mark.reference
def test_token_by_token_equals_packed_attention_bit_for_bit(cpp_kernels):
    """A prompt and three completions: all queries at once, and one after another."""
    prompt, tail, heads, head_dim = 40, 70, 4, 32
    given = batch([prompt], [0] * 3, [tail] * 3, heads, 2, head_dim)
    layout = PackedLayout([prompt, tail, tail, tail], [-1, 0, 0, 0])
    k, v, _ = packed(given)
    q = torch.randn(prompt + 3 * tail, heads, head_dim)
    expected, _ = cpp_kernels.attention.forward(q, k, v, layout, 0.2, 0)
    for token in range(tail):
        rows = prompt + token + tail * torch.arange(3)
        given["q"], given["tail_lengths"] = q[rows], torch.full((3,), token + 1, dtype=torch.int32)
        found = cpp_kernels.decode_attention.forward(**given, scale=0.2, window=0)
        assert torch.equal(found, expected[rows]), token


@pytest.mark.reference
@pytest.mark.parametrize("dtype", DTYPES)
def test_company_and_threads_do_not_change_the_numbers(cpp_kernels, dtype):
    given = batch([130, 70], [0] * 30 + [1] * 3, [*range(1, 34)], 6, 2, 40)
    given = {n: t.to(dtype) if t.is_floating_point() else t for n, t in given.items()}

    def attend(part):
        rows = {n: given[n][part] for n in ("q", "group", "tail_blocks", "tail_lengths")}
        return cpp_kernels.decode_attention.forward(**given | rows, scale=0.2, window=0)

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = attend(slice(None))
        for part in (slice(7, 8), slice(2, 5), slice(11, 33), slice(29, 33)):
            assert torch.equal(attend(part), expected[part]), part
        torch.set_num_threads(3)
        for _ in range(3):
            assert torch.equal(attend(slice(None)), expected)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", DTYPES)
def test_two_runs_are_bitwise_equal(device, dtype):
    given = batch([37, 1], [0, 0, 1], [19, 1, 33])
    given = {n: t.to(device, dtype if t.is_floating_point() else None) for n, t in given.items()}
    assert torch.equal(decode_attention(**given), decode_attention(**given))


# -- arguments -------------------------------------------------------------------------------------


def test_inputs_are_not_written_to(device):
    given = {name: t.to(device) for name, t in batch([4], [0, 0], [2, 3]).items()}
    before = {name: t.clone() for name, t in given.items()}
    decode_attention(**given)
    for name, tensor in given.items():
        torch.testing.assert_close(tensor, before[name], atol=0, rtol=0, equal_nan=True)


@pytest.mark.cuda
@pytest.mark.parametrize(("heads", "key_heads", "head_dim"), [(32, 8, 128), (14, 2, 64)])
def test_a_graph_replays_it_with_other_lengths(check, backend, heads, key_heads, head_dim):
    """Lengths are read on the device: no call waits for it, and other numbers need no new graph."""
    given = batch([300, 900], [0] * 8 + [1] * 9, [*range(200, 217)], heads, key_heads, head_dim)
    given = {
        name: tensor.to("cuda", torch.bfloat16 if tensor.is_floating_point() else None)
        for name, tensor in given.items()
    }
    decode_attention(**given)
    torch.cuda.set_sync_debug_mode("error")
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = decode_attention(**given)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    given["tail_lengths"] -= 99
    graph.replay()
    assert torch.equal(found, decode_attention(**given))


@pytest.mark.cuda
def test_caches_past_two_thousand_million_numbers(backend):
    """The last block of a cache of 2^32 elements: its offset does not fit 32 bits."""
    blocks, heads, head_dim = 1 << 16, 8, 128
    keys = torch.zeros(blocks, heads, head_dim, BLOCK, dtype=torch.bfloat16, device="cuda")
    values = torch.zeros(blocks, heads, BLOCK, head_dim, dtype=torch.bfloat16, device="cuda")
    values[-1] = 3.0
    table = torch.tensor([[blocks - 1]], dtype=torch.int32, device="cuda")
    one = torch.ones(1, dtype=torch.int32, device="cuda")
    q = torch.randn(1, 32, head_dim, dtype=torch.bfloat16, device="cuda")
    found = decode_attention(q, keys, values, table, 64 * one, 0 * one, table, 7 * one)
    assert (found == 3).all()


@pytest.mark.parametrize("name", ["q", "keys", "values"])
def test_gradients_are_refused(device, name):
    given = {n: t.to(device) for n, t in batch([4], [0], [2]).items()}
    given[name].requires_grad_()
    with pytest.raises(RuntimeError, match="no backward pass"):
        decode_attention(**given)
    with torch.no_grad():
        assert not decode_attention(**given).requires_grad


@pytest.mark.reference
def test_reference_in_fp64_equals_one_by_one():
    given = batch([4, 0, 67], [2, 0, 1, 2], [2, 65, 1, 3])
    given = {n: t.double() if t.is_floating_point() else t for n, t in given.items()}
    for window in (None, 3, 66):
        torch.testing.assert_close(
            decode_attention_reference(**given, window=window), one_by_one(given, window=window)
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keys": (3, 2, BLOCK, 8)}, r"\(3, 2, 64, 8\)"),
        ({"values": (2, 2, BLOCK, 8)}, r"expected keys \[N, K, 8, 64\] and values \[N, K, 64, 8\]"),
        ({"q": (2, 4, 6)}, r"keys \[N, K, 6, 64\]"),
        ({"q": (2, 3, 8)}, "3 query heads.*2"),
        ({"q": (3, 4, 8)}, r"tail_blocks \[3, \?\], found \(2, 2\)"),
        ({"group": (3,)}, r"group must be \[2\], found \(3,\)"),
        ({"tail_lengths": (1, 2)}, r"tail_lengths must be \[2\], found \(1, 2\)"),
        ({"prefix_lengths": (2,)}, r"prefix_lengths \[G\], found \(1, 2\) and \(2,\)"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_wrong_shapes(device, change, message):
    given = batch([4], [0, 0], [2, 1])
    given |= {n: torch.zeros(shape, dtype=given[n].dtype) for n, shape in change.items()}
    with pytest.raises(ValueError, match=message):
        decode_attention(**{name: t.to(device) for name, t in given.items()})


@pytest.mark.reference
@pytest.mark.parametrize(
    ("name", "place", "value", "message"),
    [
        ("prefix_blocks", (0, 1), 6, r"prefix_blocks must lie in 0..5, found 6 at \[0, 1\]"),
        ("tail_blocks", (1, 0), -1, r"tail_blocks must lie in 0..5, found -1 at \[1, 0\]"),
        ("group", (1,), 1, r"group must lie in 0..0, found 1 at 1"),
        ("tail_lengths", (0,), 129, r"tail_lengths must lie in 0..128, found 129 at 0"),
        ("prefix_lengths", (0,), -1, r"prefix_lengths must lie in 0..192, found -1"),
    ],
)
def test_memory_outside_of_the_cache_is_not_read(cpp_kernels, name, place, value, message):
    given = batch([70], [0, 0], [2, 1])
    given[name][place] = value
    with pytest.raises(RuntimeError, match=message):
        cpp_kernels.decode_attention.forward(**given, scale=0.2, window=0)


def test_window_below_one(device):
    given = {name: t.to(device) for name, t in batch([4], [0], [2]).items()}
    with pytest.raises(ValueError, match="window must be at least 1"):
        decode_attention(**given, window=0)

from __future__ import annotations

import pytest
import torch

from fastllm.layout import PackedLayout
from fastllm.ops import rope, rope_into_cache
from fastllm.ops.rope import rope_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def tables(positions, head_dim):
    inverse_frequency = 10000.0 ** (-torch.arange(0, head_dim, 2) / head_dim)
    angles = torch.arange(positions)[:, None] * inverse_frequency
    return {"cos": angles.cos(), "sin": angles.sin()}


def inputs(tokens, heads, key_heads, head_dim):
    return {
        "q": torch.randn(tokens, heads, head_dim),
        "k": torch.randn(tokens, key_heads, head_dim),
    }


def rotated(x, cos, sin):
    """The other common way to write it: multiplication of complex numbers, in fp64."""
    a, b = x.double().chunk(2, dim=-1)
    turned = torch.complex(a, b) * torch.complex(cos.double(), sin.double())[:, None]
    return torch.cat((turned.real, turned.imag), dim=-1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "key_heads", "head_dim"),
    [(1, 1, 2), (2, 1, 8), (4, 2, 20), (4, 4, 32), (4, 1, 64), (3, 3, 80), (2, 2, 130)],
)
@pytest.mark.parametrize("tokens", [1, 7, pytest.param(130, marks=pytest.mark.large)])
def test_outputs_and_gradients(matches_reference, tokens, heads, key_heads, head_dim, dtype):
    matches_reference(
        rope,
        rope_reference,
        inputs(tokens, heads, key_heads, head_dim),
        dtype,
        constants=tables(tokens + 3, head_dim),
    )


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_positions_in_any_order(matches_reference, dtype):
    positions = torch.tensor([4, 0, 0, 9, 1, 9], dtype=dtype)
    matches_reference(
        rope,
        rope_reference,
        inputs(6, 2, 1, 8),
        constants={**tables(10, 8), "positions": positions},
    )


@pytest.mark.parametrize(
    ("strides", "grad_strides"),
    [
        ("every_other_row", "contiguous"),
        ("every_other_column", "transposed"),
        ("transposed", "expanded"),
        ("inside", "every_other_row"),
        ("expanded", "every_other_column"),
    ],
)
def test_strided_tensors(matches_reference, strides, grad_strides):
    matches_reference(
        rope,
        rope_reference,
        inputs(5, 4, 2, 8),
        constants=tables(5, 8),
        strides=strides,
        grad_strides=grad_strides,
    )


def test_strided_positions_and_tables(matches_reference):
    wide = tables(10, 16)
    matches_reference(
        rope,
        rope_reference,
        inputs(5, 2, 2, 8),
        constants={
            "cos": wide["cos"][:, ::2],
            "sin": wide["sin"][:, ::2],
            "positions": torch.tensor([1, 0, 7, 0, 2, 0, 9, 0, 3, 0])[::2],
        },
    )


def test_parts_of_one_projection(device):
    """q and k are slices of the fused projection's output, and so are their gradients."""
    fused = torch.randn(5, (4 + 2 + 2) * 8, device=device)
    table = tables(5, 8)

    def parts(projected):
        heads = projected.view(5, 8, 8)
        return heads[:, :4], heads[:, 4:6]

    gradients = []
    for function, dtype in ((rope, torch.float32), (rope_reference, torch.float64)):
        leaf = fused.to(dtype, copy=True).requires_grad_()
        q, k = function(*parts(leaf), *(t.to(device, dtype) for t in table.values()))
        (q.square().sum() + 3 * k.sum()).backward()
        gradients.append(leaf.grad.double())
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("frozen", [("q",), ("k",)])
def test_frozen_inputs_get_no_gradient(matches_reference, frozen):
    matches_reference(
        rope, rope_reference, inputs(5, 2, 1, 8), constants=tables(5, 8), frozen=frozen
    )


@pytest.mark.parametrize("only_output", [0, 1], ids=["only q", "only k"])
def test_gradient_of_one_output(matches_reference, only_output):
    matches_reference(
        rope, rope_reference, inputs(5, 2, 1, 8), constants=tables(5, 8), only_output=only_output
    )


def test_no_tokens(matches_reference):
    matches_reference(rope, rope_reference, inputs(0, 2, 1, 8), constants=tables(4, 8))


def test_equals_complex_multiplication(device):
    given, table = inputs(9, 2, 1, 20), tables(9, 20)
    found = rope(**{name: t.to(device) for name, t in (given | table).items()})
    for x, turned in zip(given.values(), found, strict=True):
        expected = rotated(x, table["cos"], table["sin"])
        torch.testing.assert_close(turned.double().cpu(), expected, atol=1e-6, rtol=1e-6)


def test_scores_depend_on_distance_alone(device):
    q, k = torch.randn(2, 1, 1, 32, device=device).unbind()
    table = {name: t.to(device) for name, t in tables(50, 32).items()}

    def score(query_position, key_position):
        first = rope(q, k, **table, positions=torch.tensor([query_position], device=device))[0]
        second = rope(q, k, **table, positions=torch.tensor([key_position], device=device))[1]
        return (first * second).sum()

    torch.testing.assert_close(score(12, 5), score(48, 41), atol=1e-4, rtol=1e-4)


def test_packed_segments_start_again_at_their_prefix(device):
    layout = PackedLayout([3, 2, 2], prefix=[-1, 0, 0], device=device)
    q, k = (torch.randn(7, 2, 8, device=device) for _ in range(2))
    table = {name: t.to(device) for name, t in tables(5, 8).items()}
    packed = rope(q, k, **table, positions=layout.positions)
    for rows in ([0, 1, 2, 3, 4], [0, 1, 2, 5, 6]):
        alone = rope(q[rows], k[rows], **table)
        assert torch.equal(packed[0][rows], alone[0])
        assert torch.equal(packed[1][rows], alone[1])


@pytest.mark.reference
def test_reference_gradcheck():
    q, k = (torch.randn(3, heads, 6, dtype=torch.float64, requires_grad=True) for heads in (2, 1))
    table = {name: t.double() for name, t in tables(5, 6).items()}
    positions = torch.tensor([4, 0, 2])
    assert torch.autograd.gradcheck(
        lambda q, k: rope_reference(q, k, **table, positions=positions), (q, k)
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(4, 1, 8)}, r"k must be .*\[5, K, 8\]"),
        ({"k": torch.zeros(5, 1, 6)}, r"k must be .*\[5, K, 8\]"),
        ({"k": torch.zeros(5, 1, 8).half()}, "float32"),
        ({"cos": torch.zeros(5, 8)}, r"\[P, 4\]"),
        ({"sin": torch.zeros(4, 4)}, r"\[P, 4\]"),
        ({"cos": torch.zeros(4, 4), "sin": torch.zeros(4, 4)}, "5 tokens.*4 positions"),
        ({"positions": torch.zeros(4, dtype=torch.int64)}, r"integers \[5\]"),
        ({"positions": torch.zeros(5)}, r"integers \[5\]"),
    ],
)
def test_wrong_arguments(device, change, message):
    given = inputs(5, 2, 1, 8) | tables(5, 8) | change
    with pytest.raises(ValueError, match=message):
        rope(**{name: t.to(device) for name, t in given.items()})


def test_odd_head_size(device):
    q = torch.zeros(2, 1, 7, device=device)
    table = torch.zeros(2, 3, device=device)
    with pytest.raises(ValueError, match=r"even.*7"):
        rope(q, q, table, table)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_slices_of_one_buffer_are_read_and_written_in_place(cpp_kernels, dtype):
    tokens, heads, key_heads, size = 5, 4, 2, 12
    fused = torch.randn(tokens, (heads + 2 * key_heads) * size).to(dtype)
    cos, sin = torch.rand(tokens, size // 2), torch.rand(tokens, size // 2)
    positions = torch.arange(tokens, dtype=torch.int32)

    def slices(buffer):
        by_head = buffer.view(tokens, heads + 2 * key_heads, size)
        return by_head[:, :heads], by_head[:, heads : heads + key_heads]

    kernels = cpp_kernels.rope
    q, k = slices(fused)
    expected = kernels.forward(q.contiguous(), k.contiguous(), cos, sin, positions, True)
    found = kernels.forward(q, k, cos, sin, positions, True)
    assert all(map(torch.equal, found, expected)) and all(t.is_contiguous() for t in found)
    by_head = kernels.forward(
        *(t.transpose(0, 1).contiguous().transpose(0, 1) for t in (q, k)), cos, sin, positions, True
    )
    assert all(map(torch.equal, by_head, expected))
    values = fused[:, (heads + key_heads) * size :].clone()
    kernels.into_(q, k, cos, sin, positions, True, q, k)
    assert all(map(torch.equal, slices(fused), expected))
    assert torch.equal(fused[:, (heads + key_heads) * size :], values), "written past the keys"


# -- norms in front, and keys of other tokens ------------------------------------------------------


def normed(tokens, heads, key_heads, head_dim, key_tokens=None):
    given = inputs(tokens, heads, key_heads, head_dim)
    if key_tokens is not None:
        given["k"] = torch.randn(key_tokens, key_heads, head_dim)
    return {**given, "q_norm": torch.randn(head_dim), "k_norm": torch.randn(head_dim)}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "key_heads", "head_dim"), [(1, 1, 2), (5, 2, 20), (4, 1, 64), (3, 3, 80), (2, 2, 130)]
)
@pytest.mark.parametrize("tokens", [1, 7, pytest.param(130, marks=pytest.mark.large)])
def test_norms_in_front(matches_reference, tokens, heads, key_heads, head_dim, dtype):
    matches_reference(
        rope,
        rope_reference,
        normed(tokens, heads, key_heads, head_dim),
        dtype,
        constants=tables(tokens + 3, head_dim),
        eps=1e-3,
    )


def test_norms_in_front_of_many_heads(matches_reference):
    """Programs walk over the heads, and there are more of these than programs."""
    matches_reference(
        rope, rope_reference, normed(31, 7, 3, 64), constants=tables(31, 64), rtol=1e-6
    )


@pytest.mark.parametrize("with_norms", [False, True])
@pytest.mark.parametrize("key_tokens", [2, 9])
def test_keys_of_other_tokens(matches_reference, key_tokens, with_norms):
    given = normed(5, 4, 2, 8, key_tokens)
    if not with_norms:
        given = {name: given[name] for name in ("q", "k")}
    places = {
        "positions": torch.tensor([3, 0, 8, 8, 1]),
        "k_positions": torch.arange(key_tokens, dtype=torch.int32).flip(0),
    }
    matches_reference(rope, rope_reference, given, constants={**tables(9, 8), **places})


def test_keys_of_other_tokens_need_positions_of_their_own(device):
    given, places = normed(5, 4, 2, 8, 3), torch.arange(5)
    given = {n: t.to(device) for n, t in (given | tables(9, 8) | {"positions": places}).items()}
    with pytest.raises(ValueError, match=r"k must be .*\[5, K, 8\]"):
        rope(**given)
    with pytest.raises(ValueError, match=r"k_positions must be integers \[3\]"):
        rope(**given, k_positions=given["positions"])


@pytest.mark.parametrize(
    ("strides", "grad_strides"),
    [
        ("every_other_row", "expanded"),
        ("every_other_column", "transposed"),
        ("inside", "every_other_row"),
        ("transposed", "inside"),
    ],
)
def test_norms_in_front_of_strided_heads(matches_reference, strides, grad_strides):
    matches_reference(
        rope,
        rope_reference,
        normed(5, 4, 2, 8),
        constants=tables(5, 8),
        strides=strides,
        grad_strides=grad_strides,
    )


@pytest.mark.parametrize(
    "frozen", [("q_norm", "k_norm"), ("q_norm",), ("k_norm",), ("q", "k"), ("q", "q_norm")]
)
def test_frozen_norms_get_no_gradient(matches_reference, frozen):
    matches_reference(
        rope, rope_reference, normed(5, 2, 1, 8), constants=tables(5, 8), frozen=frozen
    )


@pytest.mark.parametrize("only_output", [0, 1], ids=["only q", "only k"])
def test_gradient_of_one_normed_output(matches_reference, only_output):
    matches_reference(
        rope, rope_reference, normed(5, 2, 1, 8), constants=tables(5, 8), only_output=only_output
    )


def test_no_tokens_with_norms(matches_reference):
    found = matches_reference(rope, rope_reference, normed(0, 2, 1, 8), constants=tables(4, 8))
    assert not found.gradient_of_q_norm.any()


def test_two_runs_with_norms_are_bitwise_equal(device):
    given = {n: t.to(device).requires_grad_() for n, t in normed(23, 5, 2, 16).items()}
    table = {n: t.to(device) for n, t in tables(23, 16).items()}
    gradients = [torch.randn(23, heads, 16, device=device) for heads in (5, 2)]
    first, second = (
        torch.autograd.grad(rope(**given, **table), tuple(given.values()), gradients)
        for _ in range(2)
    )
    assert all(map(torch.equal, first, second))


def test_fp32_norms_of_bf16_heads(device):
    given = {n: t.to(device) for n, t in normed(5, 2, 1, 8).items()}
    leaves = {n: (t if "norm" in n else t.bfloat16()).requires_grad_() for n, t in given.items()}
    table = {n: t.to(device) for n, t in tables(5, 8).items()}
    q, k = rope(**leaves, **table)
    (q.sum() + k.sum()).backward()
    assert {n: t.grad.dtype for n, t in leaves.items()} == {n: t.dtype for n, t in leaves.items()}


@pytest.mark.reference
def test_reference_with_norms_is_norm_then_rope():
    given, table = normed(5, 2, 1, 8), tables(5, 8)
    q, k = (
        torch.nn.functional.rms_norm(given[n], (8,), given[f"{n}_norm"], eps=1e-3) for n in "qk"
    )
    found = rope_reference(**given, **table, eps=1e-3)
    for one, other in zip(found, rope_reference(q, k, **table), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    "change", [{"k_norm": None}, {"q_norm": torch.ones(4)}, {"k_norm": torch.ones(1, 8)}]
)
def test_wrong_norms(device, change):
    given = normed(5, 2, 1, 8) | tables(5, 8) | change
    with pytest.raises(ValueError, match=r"rope: q_norm and k_norm must both be \[8\] or None"):
        rope(**{n: t if t is None else t.to(device) for n, t in given.items()})


# -- into the cache --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_norms", [False, True])
@pytest.mark.parametrize("head_dim", [8, 80])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_into_the_cache(request, device, dtype, with_norms, head_dim, index_dtype):
    """As `rope`, and each key and value is where it belongs, and nowhere else."""
    if dtype == torch.bfloat16:
        request.getfixturevalue("rounds_bf16")
    tokens, key_heads = 3, 2
    projected = torch.randn(tokens, 9, head_dim).to(device, dtype)
    q, k, v = projected[:, :5], projected[:, 5:7], projected[:, 7:]
    norms = {n: torch.rand(head_dim, device=device) for n in ("q_norm", "k_norm") if with_norms}
    table = {n: t.to(device) for n, t in tables(40, head_dim).items()}
    positions, block, place = (
        torch.tensor(numbers, device=device, dtype=index_dtype)
        for numbers in ([39, 0, 7], [4, 0, 2], [63, 0, 17])
    )
    keys = torch.full((6, key_heads, head_dim, 64), 7.0, device=device, dtype=dtype)
    values = torch.full((6, key_heads, 64, head_dim), 7.0, device=device, dtype=dtype)
    found = rope_into_cache(
        q, k, v, **table, positions=positions, keys=keys, values=values, block=block, place=place,
        **norms,
    )  # fmt: skip
    expected, rotated_k = rope(q, k, **table, positions=positions, **norms)
    assert torch.equal(found, expected)
    block, place = block.long(), place.long()
    assert torch.equal(keys[block, :, :, place], rotated_k)
    assert torch.equal(values[block, :, place], v)
    keys[block, :, :, place] = 7.0
    values[block, :, place] = 7.0
    assert keys.eq(7).all() and values.eq(7).all()


def test_a_cache_that_does_not_fit(device):
    q, k = torch.zeros(3, 4, 8, device=device), torch.zeros(3, 2, 8, device=device)
    table = {n: t.to(device) for n, t in tables(4, 8).items()}
    where = torch.zeros(3, dtype=torch.int32, device=device)
    keys, values = torch.zeros(5, 2, 8, 64, device=device), torch.zeros(5, 2, 64, 8, device=device)
    for wrong in ((keys, keys), (keys.half(), values), (keys.mT, values), (keys[:, :1], values)):
        with pytest.raises(ValueError, match=r"rope_into_cache: expected .*\[N, K, D, 64\]"):
            rope_into_cache(q, k, k, **table, positions=where, keys=wrong[0], values=wrong[1],
                            block=where, place=where)  # fmt: skip


@pytest.mark.cuda
def test_more_than_2_to_the_31_elements(backend):
    tokens = 2**31 // 4096 + 2
    q = torch.zeros(tokens, 32, 128, dtype=torch.bfloat16, device="cuda")
    q[-1] = torch.randn(32, 128, device="cuda")
    table = {n: t.cuda() for n, t in tables(4, 128).items()}
    positions = torch.full((tokens,), 3, dtype=torch.int32, device="cuda")
    found = rope(q, q[:, :1], **table, positions=positions)[0][-1:]
    expected = rope_reference(q[-1:], q[-1:, :1], **table, positions=positions[-1:])[0]
    torch.testing.assert_close(found, expected)

"""The transformer on packed and padded rows, in every dtype, and what it starts from."""

from __future__ import annotations

import math

import pytest
import torch

from fastllm import ModelConfig, PackedLayout, Transformer

FAMILIES = {
    "llama": {},
    "llama-biases": {"attention_bias": True, "mlp_bias": True},
    "tied": {"tie_word_embeddings": True},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 8},
    "mistral": {"model_type": "mistral", "sliding_window": 3},
}


@pytest.fixture(params=FAMILIES)
def built(request, sizes):
    model = Transformer(ModelConfig(**sizes, **FAMILIES[request.param]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape)
    return model


@pytest.fixture
def tokens():
    return torch.randint(0, 40, (3, 9))


def test_a_padded_batch_is_its_rows(built, tokens):
    lengths = torch.tensor([9, 4, 1])
    logits = built(tokens, lengths)
    assert logits.shape == (3, 9, 40)
    for row, length in enumerate(lengths.tolist()):
        alone = built(tokens[row : row + 1, :length])[0]
        torch.testing.assert_close(logits[row, :length], alone, rtol=1e-5, atol=1e-5)
        assert logits[row, length:].eq(0).all()


def test_what_follows_changes_nothing_before_it(built, tokens):
    changed = tokens.clone()
    changed[:, 6:] = torch.randint(0, 40, (3, 3))
    assert torch.equal(built(tokens)[:, :6], built(changed)[:, :6])
    assert not torch.equal(built(tokens)[:, 6:], built(changed)[:, 6:])


def test_a_continuation_is_what_follows_its_prefix(built, tokens):
    first, second = tokens[0], torch.cat((tokens[0, :5], tokens[1, 5:]))
    packed = torch.cat((first, second[5:]))
    hidden = built.hidden(packed, PackedLayout([5, 4, 4], prefix=[-1, 0, 0]))
    whole = built.hidden(torch.cat((first, second)), PackedLayout([9, 9]))
    torch.testing.assert_close(hidden[:9], whole[:9], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(hidden[9:], whole[14:], rtol=1e-5, atol=1e-5)


def test_rows_are_chosen_before_the_last_layer(built, tokens):
    layout, rows = PackedLayout([4, 5]), torch.tensor([0, 3, 8])
    every = built.hidden(tokens[0], layout)
    chosen = built.hidden(tokens[0], layout, rows)
    torch.testing.assert_close(chosen, every[rows], rtol=1e-5, atol=1e-6)
    assert built.hidden(tokens[0], layout, rows[:0]).shape == (0, 16)


def test_an_empty_row_is_no_error(built):
    nothing = torch.empty(0, dtype=torch.int64)
    hidden = built.hidden(nothing, PackedLayout([]), nothing)
    hidden.sum().backward()
    assert hidden.shape == (0, 16)


def test_recomputing_gives_the_same_gradients(built, tokens):
    found = []
    for recompute in (False, True):
        built.zero_grad()
        built.model.gradient_checkpointing = recompute
        built(tokens).square().sum().backward()
        found.append([p.grad.clone() for p in built.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_may_be_wider_than_the_arithmetic(built, tokens, dtype):
    expected = built(tokens)
    built.model.compute_dtype = dtype
    found = built(tokens)
    assert found.dtype == dtype and built.lm_head.weight.dtype == torch.float32
    scale = expected.abs().max()
    assert (found.float() - expected).abs().max() < 16 * torch.finfo(dtype).eps * scale
    found.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in built.parameters())
    narrow = built.to(dtype)(tokens)
    assert narrow.dtype == dtype


@pytest.mark.parametrize(
    ("lengths", "problem"), [([9, 9], r"must be \[3\]"), ([10, 1, 1], "0..9"), ([-1, 1, 1], "0..9")]
)
def test_lengths_that_do_not_fit_are_refused(model, tokens, lengths, problem):
    with pytest.raises(ValueError, match=problem):
        model(tokens, torch.tensor(lengths))


def test_a_new_model_knows_nothing_and_its_depth_adds_little(sizes):
    config = ModelConfig(**{**sizes, "hidden_size": 64, "vocab_size": 512})
    model = Transformer(config)
    spread = {name: float(p.std()) for name, p in model.named_parameters() if p.dim() > 1}
    assert spread["model.layers.0.mlp.gate_proj.weight"] == pytest.approx(0.02, rel=0.1)
    assert spread["model.layers.0.mlp.down_proj.weight"] == pytest.approx(0.01, rel=0.1)
    assert spread["model.layers.1.self_attn.o_proj.weight"] == pytest.approx(0.01, rel=0.1)
    assert all(p.eq(1).all() for n, p in model.named_parameters() if "norm" in n)
    tokens = torch.randint(0, 512, (4, 16))
    logp = torch.log_softmax(model(tokens), -1)
    assert float(-logp.mean()) == pytest.approx(math.log(512), rel=0.01)


def test_a_tied_head_is_the_embedding_table(sizes):
    tied = Transformer(ModelConfig(**sizes, tie_word_embeddings=True))
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    loose = Transformer(ModelConfig(**sizes))
    assert loose.lm_head.weight is not loose.model.embed_tokens.weight


def test_rotary_tables_grow_without_changing(model):
    short = [t.clone() for t in model.model.rotary(10, torch.device("cpu"))]
    longer = model.model.rotary(1000, torch.device("cpu"))
    assert longer[0].shape[0] >= 1000
    for one, other in zip(short, longer, strict=True):
        assert torch.equal(one, other[: one.shape[0]])

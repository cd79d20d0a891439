"""Segments of a packed row do not see each other: not nearly, not at all."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from fastllm import PackedLayout, RewardModel, Transformer
from fastllm.data.packing import pack_groups, pack_pairs, pack_sequences


@pytest.fixture
def embedded(config, device):
    """Runs a model and keeps the embeddings of its tokens, with their gradient."""

    def run(model, *inputs):
        kept = []

        def keep(module, arguments, output):
            output.retain_grad()
            kept.append(output)

        with model.model.embed_tokens.register_forward_hook(keep):
            output = model(*inputs)
        return output, kept[0]

    return run


@pytest.mark.parametrize("window", [pytest.param(None, marks=pytest.mark.large), 3])
def test_documents_do_not_see_each_other(embedded, config, device, ids, window):
    config.sliding_window, config.layer_types = window, ["sliding_attention", "full_attention"]
    model = Transformer(config).to(device)
    model.forward = model.hidden
    layout = PackedLayout([5, 7, 1, 4], device=device)
    tokens = torch.tensor(ids(layout.total_tokens), device=device)
    hidden, embeddings = embedded(model, tokens, layout)
    bounds = layout.offsets
    for first, last in pairwise(bounds):
        embeddings.grad = None
        hidden[first:last].square().sum().backward(retain_graph=True)
        outside = torch.cat((embeddings.grad[:first], embeddings.grad[last:]))
        assert torch.count_nonzero(outside) == 0
        assert (embeddings.grad[first:last].abs().sum(-1) > 0).all()


@pytest.mark.large
def test_a_token_does_not_see_those_after_it(embedded, config, device, ids):
    model = Transformer(config).to(device)
    model.forward = model.hidden
    layout = PackedLayout([6, 3, 4], prefix=[-1, 0, 0], device=device)
    tokens = torch.tensor(ids(13), device=device)
    hidden, embeddings = embedded(model, tokens, layout)
    hidden[2].square().sum().backward(retain_graph=True)
    assert torch.count_nonzero(embeddings.grad[3:]) == 0
    embeddings.grad = None
    hidden[10].square().sum().backward()  # the second token of the second continuation
    seen = embeddings.grad.abs().sum(-1) > 0
    assert seen.tolist() == [True] * 6 + [False] * 3 + [True] * 2 + [False] * 2


def test_answers_to_one_prompt_do_not_see_each_other(embedded, config, device, ids):
    model = Transformer(config).to(device)
    model.forward = model.hidden
    batch = pack_groups([ids(4)], [ids(3), ids(5)], [0, 0]).to(device)
    hidden, embeddings = embedded(model, batch.input_ids, batch.layout, batch.rows)
    second = hidden[batch.source[batch.sequence == 1]]
    second.square().sum().backward()
    seen = embeddings.grad.abs().sum(-1) > 0
    # The prompt, and all of the second answer but its last token, which predicts nothing.
    assert seen.tolist() == [True] * 4 + [False] * 3 + [True] * 4 + [False]


def test_a_pair_is_two_sequences(embedded, config, device, ids):
    model = RewardModel(config).to(device)
    model.forward = model.score_rows
    beginning = ids(4)
    batch = pack_pairs([(beginning + ids(3), beginning + ids(2)), (ids(3), ids(2))]).to(device)
    scores, embeddings = embedded(model, batch.input_ids, batch.layout, batch.rows)
    scores[batch.chosen[0]].backward()
    seen = embeddings.grad.abs().sum(-1) > 0
    assert seen.tolist() == [True] * 7 + [False] * 7


@pytest.mark.large
def test_what_a_neighbour_says_changes_no_bit(config, device, ids):
    model = Transformer(config).to(device)
    document, mask = ids(9), [True] * 9
    hidden = []
    for neighbour in (ids(6), ids(6)):
        batch = pack_sequences([neighbour, document], [[True] * 6, mask]).to(device)
        hidden.append(model.hidden(batch.input_ids, batch.layout)[6:])
    assert torch.equal(*hidden)

"""Backends agree with PyTorch over a whole training run, and the sampler with the trainer."""

from __future__ import annotations

import pytest
import torch

import fastllm
from fastllm import RewardModel, Transformer, generate
from fastllm.data.packing import pack_completions, pack_groups, pack_pairs
from fastllm.ops import linear_logprob, use_backend

STEPS = 5
FEW_STEPS = 2  # for the Triton interpreter


@pytest.fixture
def curve(backend, trainer, examples, step):
    """Losses of a few steps of plain gradient descent from the same weights."""
    interpreted = backend == "triton" and trainer.device.type == "cpu"
    start = {name: t.clone() for name, t in trainer.model.state_dict().items()}

    def run():
        trainer.model.load_state_dict(start)
        losses = []
        for i in range(FEW_STEPS if interpreted else STEPS):
            loss, gradients = step([examples[: 1 + i % 2], examples[1 + i % 2 :]])
            losses.append(float(loss))
            with torch.no_grad():
                for name, parameter in trainer.model.named_parameters():
                    parameter -= 0.05 * gradients[name]
        return torch.tensor(losses)

    return run


def test_backends_agree_on_a_training_curve(backend, curve):
    found = curve()
    with use_backend("torch"):
        expected = curve()
    assert expected.diff().abs().max() > 1e-3, "nothing was trained"
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("temperature", "window"),
    [(0.7, 4), pytest.param(1.0, None, marks=pytest.mark.large)],
)
def test_sampler_and_trainer_agree(backend, device, config, ids, temperature, window):
    config.sliding_window, config.layer_types = window, ["sliding_attention", "full_attention"]
    model = Transformer(config).to(device)
    prompts = [ids(7), ids(1)]
    completions = generate(model, prompts, 6, temperature, num_return_sequences=2, seed=1)
    batch = pack_groups(prompts, [c.token_ids for c in completions], [0, 0, 1, 1]).to(device)
    hidden = model.hidden(batch.input_ids, batch.layout, batch.rows)[batch.source]
    logp = linear_logprob(hidden, model.lm_head.weight, batch.targets, temperature=temperature)
    sampled = torch.tensor([p for c in completions for p in c.logprobs], device=device)
    assert (logp - sampled).abs().max() < 1e-5


@pytest.mark.parametrize(
    "pad_token_id",
    [
        pytest.param(256, id="pad", marks=pytest.mark.large),
        pytest.param(258, id="pad is eos"),
        pytest.param(None, id="no pad", marks=pytest.mark.large),
    ],
)
def test_a_score_does_not_depend_on_the_batch(backend, device, config, ids, pad_token_id):
    """258 ends every sequence; where it is the padding too, the token before it is read."""
    config.pad_token_id = pad_token_id
    model = RewardModel(config).to(device)
    prompt = ids(5)
    sequences = [[*prompt, *ids(n), 258] for n in (3, 1, 6)]
    alone = torch.stack([model(torch.tensor([s], device=device))[0] for s in sequences])

    def close(scores):
        torch.testing.assert_close(scores, alone, rtol=1e-5, atol=1e-6)

    padding = 0 if pad_token_id is None else pad_token_id
    width = max(map(len, sequences)) + 2
    padded = torch.tensor([s + [padding] * (width - len(s)) for s in sequences], device=device)
    lengths = torch.tensor([len(s) - (pad_token_id == 258) for s in sequences])
    close(model(padded, lengths))
    if pad_token_id is not None:
        close(model(padded))
    batch, index = pack_completions([prompt] * 3, [s[5:] for s in sequences], pad_token_id)
    close(model.score_rows(batch.input_ids.to(device), batch.layout.to(device), batch.rows)[index])
    for options in ({}, {"share_prefix": False}, {"pad_to": width}):
        pairs = pack_pairs([(sequences[0], sequences[2])], pad_token_id=pad_token_id, **options)
        pairs = pairs.to(device)
        scores = model.score_rows(pairs.input_ids, pairs.layout, pairs.rows)
        assert torch.allclose(scores[pairs.chosen], alone[0], rtol=1e-5, atol=1e-6)
        assert torch.allclose(scores[pairs.rejected], alone[2], rtol=1e-5, atol=1e-6)


@pytest.mark.reference
def test_the_public_names_of_the_design_are_there():
    assert all(getattr(fastllm, name) is not None for name in fastllm.__all__)

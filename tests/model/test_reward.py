"""A reward model reads one token of a sequence: the last that is not padding."""

from __future__ import annotations

import pytest
import torch

from fastllm import ModelConfig, PackedLayout, RewardModel
from fastllm.model.reward import scored_lengths

PAD, END = 0, 2


@pytest.fixture
def sequence():
    return torch.tensor([5, 9, 7, 11, END])


def padded(sequence, width, token=PAD):
    return torch.cat((sequence, sequence.new_full((width - len(sequence),), token)))[None]


def test_padding_changes_no_score(reward_model, sequence):
    alone = reward_model(sequence[None])
    assert alone.shape == (1,) and alone.dtype == torch.float32
    for width in (5, 6, 12):
        torch.testing.assert_close(reward_model(padded(sequence, width)), alone)
    batch = torch.cat((padded(sequence, 8), padded(sequence[:2], 8), padded(sequence, 8)))
    scores = reward_model(batch)
    torch.testing.assert_close(scores[0], scores[2])
    torch.testing.assert_close(scores[1], reward_model(sequence[None, :2])[0])


def test_the_end_token_is_read(reward_model, sequence):
    other = sequence.clone()
    other[-1] = 3
    assert reward_model(sequence[None]) != reward_model(other[None])


def test_where_padding_is_the_end_token_the_one_before_it_is_read(sizes, sequence):
    model = RewardModel(ModelConfig(**sizes, pad_token_id=END, eos_token_id=END))
    without_end = model(sequence[None, :-1])
    for width in (5, 9):
        torch.testing.assert_close(model(padded(sequence, width, END)), without_end)


def test_without_a_pad_token_every_token_counts(sizes, sequence):
    model = RewardModel(ModelConfig(**sizes))
    expected = model.score_rows(padded(sequence, 7)[0], PackedLayout([7]), torch.tensor([6]))
    torch.testing.assert_close(model(padded(sequence, 7)), expected)
    torch.testing.assert_close(model(padded(sequence, 7), torch.tensor([5])), model(sequence[None]))


def test_a_pad_token_inside_a_sequence_is_a_token(reward_model):
    ids = torch.tensor([[5, PAD, 7, PAD]])
    assert scored_lengths(ids, PAD).tolist() == [3]
    torch.testing.assert_close(reward_model(ids), reward_model(ids[:, :3], torch.tensor([3])))


def test_a_row_of_padding_is_an_error(reward_model):
    with pytest.raises(ValueError, match="row 1 has no token to score"):
        reward_model(torch.tensor([[5, 6], [PAD, PAD]]))
    with pytest.raises(ValueError, match="lengths must be"):
        reward_model(torch.tensor([[5, 6]]), torch.tensor([3]))


def test_the_head_runs_in_fp32(reward_model, sequence):
    reward_model.model.compute_dtype = torch.bfloat16
    score = reward_model(sequence[None])
    assert score.dtype == torch.float32
    assert reward_model.to(torch.bfloat16)(sequence[None]).dtype == torch.float32


def test_the_head_has_no_bias_and_one_row(reward_model):
    assert reward_model.score.weight.shape == (1, 16) and reward_model.score.bias is None
    names = dict(reward_model.named_parameters())
    assert "lm_head.weight" not in names and "model.embed_tokens.weight" in names

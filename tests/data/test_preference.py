"""The preference dataset and the collator: training ids, padding, the length rule."""

from __future__ import annotations

import pytest
import torch

from fastllm.data.encoding import encode_preferences
from fastllm.data.errors import DataError
from fastllm.data.preference import PreferenceDataset, RewardDataCollator
from fastllm.data.records import preference_records
from fastllm.data.tokenizer import Tokenizer

PAIRS = [
    {"prompt": "2+2=", "chosen": "4", "rejected": "5"},
    {"chosen": "a long answer", "rejected": "short", "margin": 1.5},
]


def test_dataset():
    dataset = PreferenceDataset([*PAIRS, {"chosen_ids": [5], "rejected_ids": [6]}])
    assert len(dataset) == 3
    assert dataset[0] == PAIRS[0]
    assert dataset[1] == {"prompt": "", **PAIRS[1]}
    assert dataset[-1] == {"chosen_ids": [5], "rejected_ids": [6]}
    assert len(list(dataset)) == 3
    with pytest.raises(DataError, match=r"pairs\[0\]: missing 'rejected'"):
        PreferenceDataset([{"chosen": "a"}])


def test_serves_a_data_loader():
    loader = torch.utils.data.DataLoader(
        PreferenceDataset(PAIRS), batch_size=2, collate_fn=RewardDataCollator(64)
    )
    (batch,) = loader
    assert batch["chosen_ids"].shape == (2, 14)


def test_a_sequence_is_what_training_makes_of_it(own_tokenizer):
    collator = RewardDataCollator(64, own_tokenizer)
    (pair,), _ = encode_preferences(preference_records(PAIRS[:1]), own_tokenizer)
    chosen, rejected = collator.collate_pair("2+2=", "4", "5")
    assert (chosen.tolist(), rejected.tolist()) == (pair.chosen.tolist(), pair.rejected.tolist())
    assert collator.encode("2+2=", "4").tolist() == pair.chosen.tolist()
    assert chosen.dtype == torch.int64
    assert own_tokenizer.decode(chosen, skip_special_tokens=False) == "2+2=4<eos>"


def test_messages(byte_tokenizer):
    collator = RewardDataCollator(256, byte_tokenizer)
    user = [{"role": "user", "content": "Hi"}]
    reply = [{"role": "assistant", "content": "Hello"}]
    assert collator.encode(user, reply).tolist() == byte_tokenizer.apply_chat_template(user + reply)


def test_batches_are_padded_on_the_right(byte_tokenizer):
    batch = RewardDataCollator(64, byte_tokenizer)(PAIRS)
    assert batch["chosen_ids"].shape == batch["rejected_ids"].shape == (2, 14)
    assert batch["chosen_lengths"].tolist() == [6, 14]
    assert batch["rejected_lengths"].tolist() == [6, 6]
    assert batch["chosen_ids"][0, 6:].tolist() == [byte_tokenizer.pad_token_id] * 8
    assert byte_tokenizer.decode(batch["rejected_ids"][1]) == "short"
    assert batch["margin"].tolist() == [0.0, 1.5]
    assert "margin" not in RewardDataCollator(64, byte_tokenizer)(PAIRS[:1])


def test_long_pairs_are_dropped_from_a_batch_and_counted():
    collator = RewardDataCollator(6)
    batch = collator(PAIRS)
    assert batch["chosen_ids"].shape == (1, 6)
    assert collator.dropped == 1
    collator(PAIRS)
    assert collator.dropped == 2


def test_one_long_pair_is_an_error():
    collator = RewardDataCollator(6)
    with pytest.raises(DataError, match="the sequence has 7 tokens and block_size is 6"):
        collator.encode("2+2=", "44")
    with pytest.raises(DataError, match="'rejected' has 7 tokens and block_size is 6"):
        collator.collate_pair("2+2=", "4", "55")
    with pytest.raises(DataError, match=r"none of the 1 pairs .* = 6: the shortest has 14 tokens"):
        collator(PAIRS[1:])
    with pytest.raises(ValueError, match="block_size must be at least 1, found 0"):
        RewardDataCollator(0)


def test_the_byte_tokenizer_is_the_default_and_is_said(caplog):
    caplog.set_level("INFO", "fastllm")
    assert RewardDataCollator(8).tokenizer.fingerprint == Tokenizer.bytes().fingerprint
    assert "no tokenizer given, using the byte tokenizer" in caplog.text.replace("<", "")


def test_wrong_types():
    with pytest.raises(
        DataError, match="'chosen' must be a string or a list of messages, found int"
    ):
        RewardDataCollator(8).collate_pair("a", 1, "b")


def test_a_tokenizer_without_pad(hf_folder):
    batch = RewardDataCollator(64, Tokenizer.from_pretrained(hf_folder()))(PAIRS)
    assert batch["chosen_ids"].shape[0] == 2

"""What the sections work on: lengths as they are in real data, and models drawn on the device."""

from __future__ import annotations

import math
import random
from typing import Any

import torch

from fastllm import ModelConfig, Tokenizer
from fastllm.data.packing import common_prefix
from fastllm.layout import NO_PREFIX

from ..steps import material
from .case import Context

Pair = tuple[list[int], list[int]]

# Ids that the byte tokenizer knows (bytes, above the special tokens), whatever the vocabulary.
IDS = (8, 260)


def pairs(count: int, context: Context) -> list[Pair]:
    """Preference pairs with the lengths and shared beginnings of real ones, and ids drawn anew."""
    draws = random.Random(context.seed)

    def ids(length: int) -> list[int]:
        return [draws.randrange(*IDS) for _ in range(length)]

    found = []
    for shared, first, second in _sizes(count, context):
        prompt, chosen, rejected = ids(shared), ids(max(1, first)), ids(max(1, second))
        rejected[0] = IDS[0] if chosen[0] != IDS[0] else IDS[0] + 1
        found.append((prompt + chosen, prompt + rejected))
    return found


def _sizes(count: int, context: Context) -> list[tuple[int, int, int]]:
    """(shared, first, second) lengths of each pair."""
    if context.scale == "tiny":
        return [(5, 3, 4)] * count
    try:
        real = material.real(material.PAIRS)
    except material.NotHere:
        return _drawn_sizes(count, random.Random(context.seed))
    # About four bytes to a token, as a tokenizer of 150,000 entries has it on this text.
    found = []
    for row in real[:count]:
        first, second = (row[side].encode()[::4] for side in ("chosen", "rejected"))
        shared = common_prefix(list(row["chosen"].encode()), list(row["rejected"].encode())) // 4
        shared = min(shared, len(first) - 1, len(second) - 1)
        found.append((shared, len(first) - shared, len(second) - shared))
    while len(found) < count:
        found += found[: count - len(found)]
    return found


def _drawn_sizes(count: int, draws: random.Random) -> list[tuple[int, int, int]]:
    """The spread of 1,800 pairs of hh's harmless half, four bytes to a token: in the median 90
    tokens are shared, and 28 and 36 are not; the logarithms have a deviation of about 1."""

    def length(median: float) -> int:
        return min(900, max(1, round(draws.lognormvariate(math.log(median), 1.0))))

    return [(length(90), length(28), length(36)) for _ in range(count)]


def pair_segments(context: Context) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Lengths and prefixes of a packed row of such pairs, of about 16k tokens."""
    most = context.pick(16384, 16384, 24)
    lengths: list[int] = []
    prefix: list[int] = []
    for shared, first, second in _sizes(512, context):
        if sum(lengths) + shared + first + second > most:
            break
        start = len(lengths)
        lengths += [shared, first, second]
        prefix += [NO_PREFIX, start, start]
    return tuple(lengths), tuple(prefix)


LLAMA_1B: dict[str, Any] = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
}
QWEN_HALF_B: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
    "model_type": "qwen2",
}
TINY: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}


def config(sizes: dict[str, Any], context: Context) -> ModelConfig:
    """A model of these sizes whose completions never end early."""
    if context.scale == "tiny":
        sizes = TINY | {"model_type": sizes.get("model_type", "llama")}
    tokenizer = Tokenizer.bytes()
    return ModelConfig(
        **sizes,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
    )


def model(kind: Any, sizes: dict[str, Any], context: Context) -> Any:
    """Random weights, drawn on the device: a billion of them take the host half a minute."""
    torch.manual_seed(context.seed)
    with torch.device(context.device.place):
        return kind(config(sizes, context))


def loaded(kind: Any, sizes: ModelConfig, start: dict[str, torch.Tensor], context: Context) -> Any:
    """A model with these weights, on the device."""
    with torch.device(context.device.place):
        found = kind(sizes)
    found.load_state_dict(start)
    return found


def prompts(count: int, length: int, context: Context) -> list[dict[str, str]]:
    """Texts of so many ASCII characters, which are as many tokens."""
    draws = random.Random(context.seed)
    return [
        {"prompt": "".join(draws.choice("abcdefghijklmnopqrstuvwxyz ") for _ in range(length))}
        for _ in range(count)
    ]


def tokenizer(sizes: ModelConfig, folder: str) -> Tokenizer:
    """The byte tokenizer, with a name for every token of the model."""
    from pathlib import Path

    return material.byte_tokenizer(Path(folder) / "tokenizer", sizes.vocab_size)

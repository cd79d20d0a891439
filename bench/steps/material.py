"""What the cases work on: models drawn from a seed, and records, made or real."""

from __future__ import annotations

import gzip
import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import torch

from fastllm import ModelConfig, RewardModel, Tokenizer, Transformer
from fastllm.data.encoding import encode_preferences
from fastllm.data.records import preference_records
from fastllm.training.sampler import EpochSampler

from .job import Job

SEED = 42
SMALL = {"n_layer": 4, "n_head": 4, "n_kv_head": 2, "n_embd": 128}
LARGE = {"n_layer": 12, "n_head": 12, "n_kv_head": 4, "n_embd": 768}
LARGE_VOCABULARY = 32_000
PAIRS, MATHS = "hh_harmless_pairs.jsonl.gz", "gsm8k_train.jsonl.gz"


class NotHere(RuntimeError):
    """A case cannot run here, and why."""


def real(name: str) -> list[dict[str, Any]]:
    """Records of a file of real data.

    Raises:
        NotHere: neither --data nor $FASTLLM_DATA nor ../shared/data has it.
    """
    path = data_folder() / name
    if not path.exists():
        raise NotHere(f"{name} is not in {path.parent}: --data or FASTLLM_DATA says where it is")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def data_folder() -> Path:
    return Path(
        os.environ.get("FASTLLM_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data"
    )


@cache
def bpe(name: str, size: int) -> Tokenizer:
    """A tokenizer trained on all texts of a file of real data."""
    return Tokenizer.train((text for row in real(name) for text in row.values()), size)


def byte_tokenizer(folder: Path, vocabulary: int) -> Tokenizer:
    """The byte tokenizer without its last bytes, or with more tokens, which no text has."""
    Tokenizer.bytes().save_pretrained(folder)
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    tokens = content["model"]["vocab"]
    more = {f"unused {index}": index for index in range(len(tokens), vocabulary)}
    content["model"]["vocab"] = {k: v for k, v in (tokens | more).items() if v < vocabulary}
    file.write_text(json.dumps(content), encoding="utf-8")
    return Tokenizer.from_pretrained(folder)


def ascii_tokenizer(folder: Path) -> Tokenizer:
    """One token per ASCII character.

    Whatever a model draws is text, and the text has as many tokens again: reward models that read
    texts (TRL's) and token ids (ours) see the same.
    """
    return byte_tokenizer(folder, Tokenizer.bytes().vocab_size - 128)


def language_model(
    folder: Path, sizes: dict[str, int], tokenizer: Tokenizer, length: int, **changes: Any
) -> str:
    """A model of these sizes in `folder`."""
    return _saved(Transformer, folder, sizes, tokenizer, length, changes)


def reward_model(
    folder: Path, sizes: dict[str, int], tokenizer: Tokenizer, length: int, **changes: Any
) -> str:
    return _saved(RewardModel, folder, sizes, tokenizer, length, changes)


def pairs(count: int, length: int) -> list[dict[str, list[int]]]:
    """Full sequences whose first tokens differ, so that nothing is shared."""
    ids = _ids(count * 2, length).view(count, 2, length)
    ids[:, 0, 0], ids[:, 1, 0] = 4, 5
    return [{"chosen_ids": a, "rejected_ids": b} for a, b in ids.tolist()]


def sequences(count: int, length: int, vocabulary: int = 259) -> list[list[int]]:
    """Full sequences of any tokens but the special ones."""
    return _ids(count, length, vocabulary).tolist()


def real_pairs(tokenizer: Tokenizer, max_length: int) -> list[dict[str, Any]]:
    """Human preferences as token ids, as all trainers encode them; those that fit."""
    encoded, _ = encode_preferences(preference_records(real(PAIRS)), tokenizer, max_length)
    return [
        {"chosen_ids": list(map(int, pair.chosen)), "rejected_ids": list(map(int, pair.rejected))}
        for pair in encoded
    ]


def maths() -> list[dict[str, str]]:
    """Problems with their solutions; loss falls on the solutions, here and in TRL."""
    return [{"prompt": f"{row['question']}\n", "completion": row["answer"]} for row in real(MATHS)]


def prompts(count: int, length: int) -> list[dict[str, str]]:
    """Texts of some letters and spaces."""
    generator = torch.Generator().manual_seed(SEED)
    draws = torch.randint(0, 27, (count, length), generator=generator).tolist()
    return [{"prompt": "".join("abcdefghijklmnopqrstuvwxyz "[i] for i in row)} for row in draws]


def training(records: list[Any], batch: int, **fields: Any) -> Job:
    """A training job that says in which order fastllm draws the records."""
    sampler = EpochSampler(len(records), batch, SEED)
    order = [i for step in range(sampler.steps_per_epoch) for i in sampler.indices(step)]
    return Job(records=records, order=order, batch=batch, seed=SEED, **fields)


def _saved(
    kind: Any,
    folder: Path,
    sizes: dict[str, int],
    tokenizer: Tokenizer,
    length: int,
    changes: dict[str, Any],
) -> str:
    settings: dict[str, Any] = {
        "vocab_size": tokenizer.vocab_size,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = ModelConfig.scratch(block_size=length, **sizes, **(settings | changes))
    torch.manual_seed(SEED)
    kind(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def _ids(count: int, length: int, vocabulary: int = 259) -> torch.Tensor:
    generator = torch.Generator().manual_seed(SEED)
    return torch.randint(8, vocabulary, (count, length), generator=generator)

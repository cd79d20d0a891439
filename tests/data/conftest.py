"""Fixtures of the data tests: tokenizers, files, real data."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastllm.data.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[2]

TEXTS = [
    "The quick brown fox jumps over the lazy dog, and the dog does not mind.\n",
    "Numbers: 0 1 22 333 4096, a sum: 12+35=47; a price: $3.50.\n",
    "Accents: café naïve über; other scripts: 日本語, русский, عربى; emoji: 😀👍🏽.\n",
] * 20

# A conversation for every shape that templates treat differently.
CONVERSATIONS = [
    [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello there."}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "  What is 2 + 2?\n"},
        {"role": "assistant", "content": "It is 4. 😀"},
        {"role": "user", "content": "And café?"},
        {"role": "assistant", "content": "A coffee house\n"},
    ],
]


@pytest.fixture
def byte_tokenizer() -> Tokenizer:
    return Tokenizer.bytes()


@pytest.fixture(scope="session")
def bpe_tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS, vocab_size=400)


@pytest.fixture(params=["bytes", "bpe"])
def own_tokenizer(request: pytest.FixtureRequest, bpe_tokenizer: Tokenizer) -> Tokenizer:
    return Tokenizer.bytes() if request.param == "bytes" else bpe_tokenizer


@pytest.fixture
def texts() -> list[str]:
    return TEXTS


@pytest.fixture
def conversations() -> list[list[dict[str, str]]]:
    return CONVERSATIONS


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """Write a data file: bytes and strings as they are, other values as one JSON line each."""

    def write_file(name: str, *content: Any) -> str:
        lines = [
            item
            if isinstance(item, bytes)
            else (item if isinstance(item, str) else json.dumps(item) + "\n").encode()
            for item in content
        ]
        path = tmp_path / name
        opener = gzip.open if name.endswith(".gz") else open
        with opener(path, "wb") as file:
            file.write(b"".join(lines))
        return str(path)

    return write_file


@pytest.fixture
def real_data() -> Callable[[str], Path]:
    """The path of a file of real data; skips where it is absent."""

    def find(name: str) -> Path:
        folder = Path(os.environ.get("FASTLLM_DATA", ROOT.parent / "shared" / "data"))
        if not (folder / name).is_file():
            pytest.skip(f"{name} is not in {folder} (set FASTLLM_DATA)")
        return folder / name

    return find


@pytest.fixture
def hf_folder(tmp_path: Path) -> Callable[..., Path]:
    """Make a small foreign tokenizer folder as models have them: other special tokens, BOS before
    every text, a chat template with BOS."""

    def make(
        template: str | None = None, frame: tuple[str, ...] = ("<s>", "$A"), **config: Any
    ) -> Path:
        from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers
        from tokenizers import Tokenizer as Backend

        backend = Backend(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=350,
            special_tokens=["<s>", "</s>", "[INST]", "[/INST]"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator(TEXTS, trainer)
        backend.add_tokens([AddedToken("<tool>", special=False)])
        backend.post_processor = processors.TemplateProcessing(
            single=list(frame),
            pair=[*frame, "$B"],
            special_tokens=[("<s>", 0), ("</s>", 1)],
        )
        folder = tmp_path / "foreign"
        folder.mkdir()
        (folder / "tokenizer.json").write_text(backend.to_str(), encoding="utf-8")
        full = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "eos_token": {"content": "</s>", "__type": "AddedToken"},
            "clean_up_tokenization_spaces": False,
            **({"chat_template": template} if template else {}),
            **config,
        }
        written = {key: value for key, value in full.items() if value is not None}
        (folder / "tokenizer_config.json").write_text(json.dumps(written), encoding="utf-8")
        return folder

    return make

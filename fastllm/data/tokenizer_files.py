"""The files of a tokenizer: read from a Hugging Face folder, or made for our own tokenizers."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from fastllm.data.chat import DEFAULT_TEMPLATE
from fastllm.data.errors import DataError

Files = dict[str, bytes]

TOKENIZER = "tokenizer.json"
CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS = "special_tokens_map.json"
CHAT_TEMPLATE = "chat_template.jinja"

KNOWN_FILES = (
    TOKENIZER,
    CONFIG,
    SPECIAL_TOKENS,
    CHAT_TEMPLATE,
    "chat_template.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
)
"""What belongs to a tokenizer in a Hugging Face folder. All of it is copied along unchanged."""

# The order is the order of the ids.
OWN_SPECIAL_TOKENS = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
OWN_TURN_TOKEN = "<|im_start|>"
NAMED_TOKENS = tuple(OWN_SPECIAL_TOKENS)


def read_folder(path: Path) -> Files:
    """Read a folder's tokenizer files, or a `tokenizer.json` and the files beside it."""
    folder, main = (path, TOKENIZER) if path.is_dir() else (path.parent, path.name)
    if not (folder / main).is_file():
        others = sorted(name for name in KNOWN_FILES if (folder / name).is_file())
        found = f"found {', '.join(others)}" if others else "found no tokenizer file"
        hint = (
            "; save it again with transformers: AutoTokenizer.from_pretrained(...)"
            ".save_pretrained(...)"
        )
        raise DataError(f"{path}: no {main}, {found}{hint if others else ''}")
    files = {TOKENIZER: (folder / main).read_bytes()}
    for name in KNOWN_FILES:
        if name != TOKENIZER and (folder / name).is_file():
            files[name] = (folder / name).read_bytes()
    return files


def read_config(files: Files, name: str) -> dict[str, Any]:
    """Parse one of the JSON files; {} when it is not there."""
    if name not in files:
        return {}
    try:
        config = json.loads(files[name])
    except ValueError as error:
        raise DataError(f"{name}: not JSON ({error})") from error
    if not isinstance(config, dict):
        raise DataError(f"{name}: expected an object, found {type(config).__name__}")
    return config


def special_tokens(files: Files) -> dict[str, str]:
    """Return the named special tokens that the files give, e.g. {"eos_token": "</s>"}."""
    tokens: dict[str, str] = {}
    for name in (SPECIAL_TOKENS, CONFIG):  # the config has the last word
        config = read_config(files, name)
        for key in (*NAMED_TOKENS, "unk_token"):
            token = config.get(key)
            if isinstance(token, dict):
                token = token.get("content")
            if isinstance(token, str):
                tokens[key] = token
    return tokens


def special_tokens_of_model(folder: Path, backend: tokenizers.Tokenizer) -> dict[str, str]:
    """Return the special tokens that a model's `config.json` names by id."""
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError):  # no model here: nothing to learn, nothing to complain about
        return {}
    tokens = {}
    for key in NAMED_TOKENS:
        token_id = config.get(f"{key}_id") if isinstance(config, dict) else None
        if isinstance(token_id, list) and token_id:
            token_id = token_id[0]
        if isinstance(token_id, int) and (token := backend.id_to_token(token_id)) is not None:
            tokens[key] = token
    return tokens


def chat_template(files: Files) -> str | None:
    """Return the chat template, wherever the folder keeps it."""
    if CHAT_TEMPLATE in files:
        return files[CHAT_TEMPLATE].decode("utf-8")
    template = read_config(files, "chat_template.json").get("chat_template")
    if template is None:
        template = read_config(files, CONFIG).get("chat_template")
    if isinstance(template, list):  # several named templates
        template = {entry.get("name"): entry.get("template") for entry in template}.get("default")
    return template if isinstance(template, str) else None


def build_backend(files: Files) -> tokenizers.Tokenizer:
    """Build the tokenizer as transformers does: `tokenizer.json`, then what its config adds."""
    with rust_errors(TOKENIZER):
        backend = tokenizers.Tokenizer.from_str(files[TOKENIZER].decode("utf-8"))
    config = read_config(files, CONFIG)
    backend.no_padding()
    backend.no_truncation()
    vocabulary = backend.get_vocab(with_added_tokens=True)
    for _, token in sorted((config.get("added_tokens_decoder") or {}).items(), key=_by_id):
        if token["content"] not in vocabulary:
            with rust_errors(CONFIG):
                backend.add_tokens([tokenizers.AddedToken(**token)])
    named = special_tokens(files)
    backend.add_special_tokens([token for token in named.values() if token not in vocabulary])
    return backend


def _by_id(item: tuple[str, Any]) -> int:
    return int(item[0])


def byte_files() -> Files:
    """Return the files of the byte tokenizer: byte-level BPE without merges."""
    specials = [*OWN_SPECIAL_TOKENS.values(), OWN_TURN_TOKEN]
    vocabulary = {token: index for index, token in enumerate([*specials, *_byte_alphabet()])}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(specials)
    return _own_files(backend)


def _byte_alphabet() -> list[str]:
    """Return the characters that stand for the bytes 0 to 255 in byte-level BPE, in that order.

    Printable Latin-1 bytes stand for themselves, the others for the characters from U+0100 on.
    """
    themselves = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in themselves else next(others)) for byte in range(256)]


def trained_files(texts: Iterable[str], vocab_size: int) -> Files:
    """Train byte-level BPE on the texts and return its files."""
    specials = [*OWN_SPECIAL_TOKENS.values(), OWN_TURN_TOKEN]
    smallest = len(specials) + len(pre_tokenizers.ByteLevel.alphabet())
    if vocab_size < smallest:
        raise DataError(
            f"vocab_size must be at least {smallest} (256 bytes and {len(specials)} special "
            f"tokens), found {vocab_size}"
        )
    backend = tokenizers.Tokenizer(models.BPE())
    # Single digits let a model see the places of a number, whatever its length.
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    with rust_errors("training the tokenizer"):
        backend.train_from_iterator(texts, trainer)
    return _own_files(backend)


def _own_files(backend: tokenizers.Tokenizer) -> Files:
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **OWN_SPECIAL_TOKENS,
        "additional_special_tokens": [OWN_TURN_TOKEN],
        "clean_up_tokenization_spaces": False,
    }
    specials = {**OWN_SPECIAL_TOKENS, "additional_special_tokens": [OWN_TURN_TOKEN]}
    return {
        TOKENIZER: backend.to_str(pretty=True).encode(),
        CONFIG: (json.dumps(config, indent=2) + "\n").encode(),
        SPECIAL_TOKENS: (json.dumps(specials, indent=2) + "\n").encode(),
        CHAT_TEMPLATE: DEFAULT_TEMPLATE.encode(),
    }


def pack(files: Files) -> dict[str, Any]:
    """Return the files as JSON values: text as it is, anything else in base64."""
    packed: dict[str, Any] = {}
    for name, content in files.items():
        try:
            packed[name] = content.decode("utf-8")
        except UnicodeDecodeError:
            packed[name] = {"base64": base64.b64encode(content).decode("ascii")}
    return packed


def unpack(packed: Mapping[str, Any]) -> Files:
    """Undo `pack`. Names that are not a tokenizer's own are refused: they could be any path."""
    files: Files = {}
    for name, content in packed.items():
        if name not in KNOWN_FILES:
            raise DataError(f"{name!r} is not a tokenizer file")
        if isinstance(content, str):
            files[name] = content.encode("utf-8")
        else:
            files[name] = base64.b64decode(content["base64"])
    return files


_LIBRARY_ERRORS = (Exception, TypeError, UnicodeEncodeError, UnicodeDecodeError)


@contextmanager
def rust_errors(what: str) -> Iterator[None]:
    """Turn what the tokenizers library raises into DataError.

    It raises plain `Exception` for most faults and pyo3's PanicException, which is not even an
    `Exception`, when its Rust code panics (a regular expression out of its limits, for one).
    """
    try:
        yield
    except BaseException as error:
        panic = type(error).__name__ == "PanicException"
        if not panic and type(error) not in _LIBRARY_ERRORS:
            raise
        raise DataError(f"{what}: the tokenizer failed: {error}") from error

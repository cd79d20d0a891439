"""The tokenizer: the tokenizers library, special tokens and a chat template behind one class."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from fastllm.data import chat, tokenizer_files
from fastllm.data.errors import DataError
from fastllm.data.tokenizer_files import Files, rust_errors

logger = logging.getLogger("fastllm")

DEFAULT_VOCAB_SIZE = 4096

MIN_BYTES_FOR_BPE = 1_000_000
"""Texts smaller than this are read byte by byte: a megabyte is about 250,000 tokens of a 4,096
token vocabulary, some 60 of each; with fewer, most tokens are too rare to be learned."""


_TEXTS_AT_ONCE = 1024
"""The library keeps some 140 bytes for each token (its text, its place) until it is asked for the
ids. This many texts keep every thread busy, and what is kept for them small."""


class Tokenizer:
    """Text to token ids and back.

    Made by `from_pretrained`, `train`, `bytes` or `from_json`. It holds the files it was made
    from, so saving a tokenizer that was loaded writes the same bytes again.
    """

    def __init__(
        self, files: Files, source: str, specials: Mapping[str, str] | None = None
    ) -> None:
        self._files = files
        self._source = source
        self.backend = tokenizer_files.build_backend(files)
        self.special_tokens = {**(specials or {}), **tokenizer_files.special_tokens(files)}
        self.chat_template = tokenizer_files.chat_template(files)
        vocabulary = self.backend.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise DataError(f"{source}: the tokenizer has an empty vocabulary")
        self.vocab_size: int = max(vocabulary.values()) + 1
        """One more than the largest token id."""

    @classmethod
    def from_pretrained(cls, path: str | Path) -> Tokenizer:
        """Load a Hugging Face folder, or a `tokenizer.json` with what lies beside it."""
        path = Path(path)
        if not path.exists():
            raise DataError(f"{path}: no such folder or file; expected a tokenizer.json there")
        files = tokenizer_files.read_folder(path)
        try:
            tokenizer = cls(files, str(path))
        except DataError as error:
            raise DataError(f"{path}: {error}") from error
        folder = path if path.is_dir() else path.parent
        of_model = tokenizer_files.special_tokens_of_model(folder, tokenizer.backend)
        tokenizer.special_tokens = {**of_model, **tokenizer.special_tokens}
        return tokenizer

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int = DEFAULT_VOCAB_SIZE) -> Tokenizer:
        """Train byte-level BPE on `texts`. The vocabulary is smaller if the texts are short."""
        return cls(tokenizer_files.trained_files(texts, vocab_size), "trained on the data")

    @classmethod
    def bytes(cls) -> Tokenizer:
        """Return the tokenizer with one token per byte: nothing to train, nothing unknown."""
        return cls(tokenizer_files.byte_files(), "built in")

    @classmethod
    def from_json(cls, text: str) -> Tokenizer:
        """Undo `to_json`."""
        try:
            packed = json.loads(text)
            files = tokenizer_files.unpack(packed["files"])
            return cls(files, packed["source"], packed["special_tokens"])
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"not a stored tokenizer: {error}") from error

    def to_json(self) -> str:
        """Return everything as one string, to be kept inside another file."""
        return json.dumps(
            {
                "source": self._source,
                "special_tokens": self.special_tokens,
                "files": tokenizer_files.pack(self._files),
            }
        )

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the files into a folder, where transformers' AutoTokenizer reads them."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in self._files.items():
            (folder / name).write_bytes(content)

    @property
    def pad_token_id(self) -> int | None:
        """The id of the padding token; None where the tokenizer has none."""
        return self._special_id("pad_token")

    @property
    def bos_token_id(self) -> int | None:
        """The id of the token that begins a text; None where the tokenizer has none."""
        return self._special_id("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        """The id of the token that ends a text; None where the tokenizer has none."""
        return self._special_id("eos_token")

    @property
    def eos_token(self) -> str | None:
        """The token that ends a text, as a string."""
        return self.special_tokens.get("eos_token")

    def _special_id(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        return None if token is None else self.backend.token_to_id(token)

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Return the token ids of a text, with nothing added unless asked for."""
        return self.encode_batch([text], add_special_tokens)[0]

    def encode_batch(
        self, texts: Sequence[str], add_special_tokens: bool = False
    ) -> list[list[int]]:
        """Return the token ids of each text.

        `add_special_tokens` frames a text as the tokenizer's own rule says (BOS before it, for
        many); a text that begins with BOS gets no second one.
        """
        return list(self.encode_each(texts, add_special_tokens))

    def encode_each(
        self, texts: Iterable[str], add_special_tokens: bool = False
    ) -> Iterator[list[int]]:
        """Yield what `encode_batch` returns, with little more than the ids in memory."""
        twice = [self.bos_token_id] * 2 if self.bos_token_id is not None else None
        remaining = iter(texts)
        while some := list(islice(remaining, _TEXTS_AT_ONCE)):
            with rust_errors("encoding"):
                encodings = self.backend.encode_batch_fast(
                    some, add_special_tokens=add_special_tokens
                )
            for encoding in encodings:
                ids = encoding.ids
                yield ids[1:] if add_special_tokens and ids[:2] == twice else ids

    @property
    def adds_eos(self) -> bool:
        """Whether `add_special_tokens` ends a text with EOS."""
        eos = self.eos_token_id
        return eos is not None and self.encode("", add_special_tokens=True)[-1:] == [eos]

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Return the text of token ids (a list, an array or a tensor)."""
        with rust_errors("decoding"):
            return self.backend.decode(
                [int(token) for token in ids], skip_special_tokens=skip_special_tokens
            )

    def decode_batch(
        self, rows: Iterable[Sequence[int]], skip_special_tokens: bool = True
    ) -> list[str]:
        """Return the text of each row of token ids."""
        with rust_errors("decoding"):
            return self.backend.decode_batch(
                [list(row) for row in rows], skip_special_tokens=skip_special_tokens
            )

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = False,
        tools: Sequence[Any] | None = None,
        **template_kwargs: Any,
    ) -> str:
        """Return a conversation as the text that the chat template makes of it."""
        return chat.render(
            self._template(),
            messages,
            self.special_tokens,
            add_generation_prompt,
            tools,
            **template_kwargs,
        )

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = False,
        tools: Sequence[Any] | None = None,
        **template_kwargs: Any,
    ) -> list[int]:
        """Return a conversation as token ids.

        The template alone decides about special tokens, so BOS is never doubled.
        """
        return self.encode(
            self.render_chat(messages, add_generation_prompt, tools, **template_kwargs)
        )

    def apply_chat_template_with_mask(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Any] | None = None,
        **template_kwargs: Any,
    ) -> tuple[list[int], list[bool]]:
        """Return token ids [T], and for each whether the assistant wrote it (its end included)."""
        text, spans = chat.render_with_spans(
            self._template(), messages, self.special_tokens, tools, **template_kwargs
        )
        if not chat.has_generation_marks(self._template()):
            added = self.backend.get_added_tokens_decoder().values()
            chat.check_turns_end(text, spans, [token.content for token in added])
        with rust_errors("encoding"):
            encoding = self.backend.encode(text, add_special_tokens=False)
        return encoding.ids, chat.token_mask(encoding.offsets, spans)

    def ending_ids(self, conversational: bool) -> list[int]:
        """Return what a complete sequence has after an answer, as trainers encode it.

        EOS for strings; for conversations what the chat template puts after the last message.
        """
        if not conversational:
            return [] if self.eos_token_id is None else [self.eos_token_id]
        mark = "answer"
        turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": mark}]
        return self.encode(self.render_chat(turns).rpartition(mark)[2])

    def _template(self) -> str:
        if self.chat_template is None:
            raise DataError(
                f"{self._source}: the tokenizer has no chat template, which messages need; put a "
                f"{tokenizer_files.CHAT_TEMPLATE} beside its tokenizer.json, or use strings"
            )
        return self.chat_template

    @property
    def fingerprint(self) -> str:
        """A hash of the vocabulary and the special tokens: equal where token ids mean the same."""
        vocabulary = sorted(self.backend.get_vocab(with_added_tokens=True).items())
        specials = [self.pad_token_id, self.bos_token_id, self.eos_token_id]
        content = json.dumps([vocabulary, specials], ensure_ascii=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    @property
    def description(self) -> str:
        """One line: which kind, how large, where from."""
        model = json.loads(self._files[tokenizer_files.TOKENIZER]).get("model") or {}
        kind = model.get("type") or "BPE"
        if kind == "BPE" and not model.get("merges"):
            kind = "byte"
        return f"{kind} tokenizer, {self.vocab_size:,} tokens, {self._source}"

    def __repr__(self) -> str:
        return f"<{self.description}>"


def choose_tokenizer(
    tokenizer: Tokenizer | str | Path | None = None,
    model_folder: str | Path | None = None,
    texts: Iterable[str] | None = None,
    vocab_size: int | None = None,
) -> Tokenizer:
    """Return the tokenizer to use, and log which it is and why.

    In this order: the one that is asked for (a Tokenizer, a path, "bytes" or "bpe"); that of the
    model; byte-level BPE trained on `texts` where they hold at least `MIN_BYTES_FOR_BPE` bytes;
    bytes.
    """
    chosen, reason = _choose(tokenizer, model_folder, texts, vocab_size)
    logger.info("tokenizer: %s (%s)", chosen.description, reason)
    return chosen


def _choose(
    tokenizer: Tokenizer | str | Path | None,
    model_folder: str | Path | None,
    texts: Iterable[str] | None,
    vocab_size: int | None,
) -> tuple[Tokenizer, str]:
    size = DEFAULT_VOCAB_SIZE if vocab_size is None else vocab_size
    match tokenizer:
        case Tokenizer():
            return tokenizer, "as given"
        case "bytes":
            return Tokenizer.bytes(), "as asked for"
        case "bpe":
            if texts is None:
                raise DataError("tokenizer 'bpe' is trained on texts, and there are none")
            return Tokenizer.train(texts, size), "as asked for"
        case str() | Path():
            return Tokenizer.from_pretrained(tokenizer), "as asked for"
    if model_folder is not None and (Path(model_folder) / tokenizer_files.TOKENIZER).is_file():
        return Tokenizer.from_pretrained(model_folder), "the model's own"
    texts = list(texts or ())
    held = sum(len(text.encode("utf-8", "replace")) for text in texts)
    if held >= MIN_BYTES_FOR_BPE:
        return Tokenizer.train(texts, size), f"the data hold {held:,} bytes of text"
    return Tokenizer.bytes(), f"{held:,} bytes of text are too few to train BPE"

"""The texts of records to token ids, many at once: framing, EOS, chat templates."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from fastllm.data.columns import Messages, Text
from fastllm.data.errors import DataError
from fastllm.data.records import PreferenceRecord, PromptRecord, SFTRecord
from fastllm.data.tokenizer import Tokenizer

logger = logging.getLogger("fastllm")

AnyRecord = SFTRecord | PreferenceRecord | PromptRecord
Result = TypeVar("Result")

# One row of token ids. A list of Python's integers would take ten times the memory.
TokenIds: TypeAlias = NDArray[np.int32]


def joined(prompt: Text | None, answer: Text) -> Text:
    """Return the answer after its prompt: two strings, or two lists of messages."""
    if prompt is None:
        return answer
    return prompt + answer  # type: ignore[operator]  # records have both in the same form


def tokenise_wholes(
    texts: Sequence[Text | None], records: Sequence[AnyRecord], tokenizer: Tokenizer
) -> list[TokenIds]:
    """Return the token ids of whole texts ([] for None). Strings get EOS unless they end in it."""
    return _tokenise(texts, records, tokenizer, prompt=False)


def tokenise_prompts(
    texts: Sequence[Text | None], records: Sequence[AnyRecord], tokenizer: Tokenizer
) -> list[TokenIds]:
    """Return the token ids of prompts, ready to be continued: strings without EOS, messages with
    the beginning of the assistant's turn, [] for None."""
    rows = _tokenise(texts, records, tokenizer, prompt=True)
    if not tokenizer.adds_eos:
        return rows
    return [
        ids[:-1] if isinstance(text, str) else ids for text, ids in zip(texts, rows, strict=True)
    ]


def _tokenise(
    texts: Sequence[Text | None],
    records: Sequence[AnyRecord],
    tokenizer: Tokenizer,
    prompt: bool,
) -> list[TokenIds]:
    strings = {index: text for index, text in enumerate(texts) if isinstance(text, str)}
    if strings and not prompt:
        ending = _ending(tokenizer)
        strings = {
            index: text if text.endswith(ending) else text + ending
            for index, text in strings.items()
        }
    chats = {
        index: _rendered(text, records[index], tokenizer, prompt)
        for index, text in enumerate(texts)
        if isinstance(text, list)
    }
    rows = [_NOTHING] * len(texts)
    for written, framed in ((strings, True), (chats, False)):
        batch = tokenizer.encode_each(written.values(), add_special_tokens=framed)
        for index, ids in zip(written, batch, strict=True):
            rows[index] = np.array(ids, dtype=np.int32)
    return rows


_NOTHING = np.empty(0, dtype=np.int32)


def _ending(tokenizer: Tokenizer) -> str:
    if tokenizer.eos_token is None:
        logger.warning(
            "%s has no end-of-sequence token: a model trained on these strings never learns to "
            "stop",
            tokenizer.description,
        )
    return "" if tokenizer.eos_token is None or tokenizer.adds_eos else tokenizer.eos_token


def _rendered(messages: Messages, record: AnyRecord, tokenizer: Tokenizer, prompt: bool) -> str:
    if not messages:  # a conversation that has not begun
        return ""
    return _citing(
        record,
        lambda: tokenizer.render_chat(
            messages,
            add_generation_prompt=prompt,
            tools=record.template.tools,
            **record.template.kwargs,
        ),
    )


def tokenise_spoken(
    text: Text, record: AnyRecord, tokenizer: Tokenizer
) -> tuple[TokenIds, NDArray[np.bool_]]:
    """Return the token ids of a conversation, and for each whether the assistant wrote it."""
    if isinstance(text, str):
        raise DataError(
            f"{record.origin}: assistant_only_loss needs messages, found a string; strings with "
            "'prompt' and 'completion' carry loss on the completion without it"
        )
    ids, spoken = _citing(
        record,
        lambda: tokenizer.apply_chat_template_with_mask(
            text, tools=record.template.tools, **record.template.kwargs
        ),
    )
    if not any(spoken):
        raise DataError(f"{record.origin}: assistant_only_loss, but the assistant says nothing")
    return np.array(ids, dtype=np.int32), np.array(spoken, dtype=bool)


def _citing(record: AnyRecord, render: Callable[[], Result]) -> Result:
    try:
        return render()
    except DataError as error:
        raise DataError(f"{record.origin}: {error}") from error


def given_ids(ids: Sequence[int], record: AnyRecord, tokenizer: Tokenizer) -> TokenIds:
    """Return a pre-tokenised record's ids. Raises DataError for one the tokenizer does not have."""
    if ids and max(ids) >= tokenizer.vocab_size:
        raise DataError(
            f"{record.origin}: token id {max(ids)} is outside the vocabulary of "
            f"{tokenizer.vocab_size:,} tokens ({tokenizer.description})"
        )
    return np.array(ids, dtype=np.int32)

"""Read and check single columns of a record: texts, messages, token ids, masks."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

from fastllm.data.errors import DataError
from fastllm.data.reader import Record

Messages: TypeAlias = list[dict[str, Any]]
Text: TypeAlias = str | Messages

IGNORE_INDEX = -100


def found(record: Record) -> str:
    """The end of a message about a column that is not there."""
    names = [repr(str(key)) for key, value in record.items() if value is not None]
    return f"found {', '.join(names) or 'an empty record'}"


def read_text(record: Record, column: str, empty: bool = False) -> Text:
    """Return a string or a list of messages; `empty` allows a list without messages."""
    value = _column(record, column)
    if isinstance(value, str):
        return _well_formed(value, record, column)
    if isinstance(value, list | tuple) and (value or empty):
        return read_messages(record, column) if value else []
    kind = "an empty list" if isinstance(value, list | tuple) else type(value).__name__
    raise DataError(
        f"{record.origin}: {column!r} must be a string or a list of messages, found {kind}"
    )


def read_messages(record: Record, column: str) -> Messages:
    """Return a non-empty list of chat messages, each checked for its role and content."""
    value = _column(record, column)
    if not isinstance(value, list | tuple) or not value:
        kind = "an empty list" if isinstance(value, list | tuple) else type(value).__name__
        raise DataError(f"{record.origin}: {column!r} must be a list of messages, found {kind}")
    return [_message(message, record, f"{column}[{index}]") for index, message in enumerate(value)]


def _message(message: Any, record: Record, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise DataError(
            f"{record.origin}: {where} must be a message with 'role' and 'content', "
            f"found {type(message).__name__}"
        )
    if not isinstance(message.get("role"), str):
        problem = "missing 'role'" if "role" not in message else "'role' must be a string"
        raise DataError(f"{record.origin}: {where}: {problem}")
    content = message.get("content")
    if isinstance(content, str):
        _well_formed(content, record, where)
    elif isinstance(content, list | tuple):
        _text_blocks(content, record, where)
    elif content is not None:
        raise DataError(
            f"{record.origin}: {where}: 'content' must be a string, found {type(content).__name__}"
        )
    elif not message.get("tool_calls"):  # an assistant turn may be a tool call and nothing else
        raise DataError(f"{record.origin}: {where}: missing 'content'")
    return dict(message)


def _text_blocks(blocks: Iterable[Any], record: Record, where: str) -> None:
    for block in blocks:
        kind = block.get("type") if isinstance(block, Mapping) else type(block).__name__
        if kind != "text" or not isinstance(block.get("text"), str):
            raise DataError(
                f"{record.origin}: {where}: 'content' must be text; blocks of type {kind!r} "
                "are not supported"
            )
        _well_formed(block["text"], record, where)


def read_tools(record: Record) -> list[Any] | None:
    """Return the tool schemas, which may be stored as a JSON string."""
    tools = record.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise DataError(f"{record.origin}: 'tools' is not JSON ({error})") from error
    if not tools:
        return None
    if not isinstance(tools, list | tuple):
        raise DataError(
            f"{record.origin}: 'tools' must be a list of schemas, found {type(tools).__name__}"
        )
    return list(tools)


def read_token_ids(record: Record, column: str) -> list[int]:
    """Return a non-empty list of token ids; arrays and tensors are taken too."""
    ids = _integers(record, column)
    if not ids:
        raise DataError(f"{record.origin}: {column!r} must hold token ids, found an empty list")
    if min(ids) < 0:
        raise DataError(f"{record.origin}: {column!r} holds the negative token id {min(ids)}")
    return ids


def read_mask(record: Record, column: str, length: int) -> list[bool]:
    """Return a mask of 0 and 1 as long as the record's `input_ids`."""
    bits = _integers(record, column)
    _same_length(record, column, len(bits), length)
    if not set(bits) <= {0, 1}:
        raise DataError(f"{record.origin}: {column!r} must hold 0 and 1 only")
    return [bit == 1 for bit in bits]


def read_labels(record: Record, input_ids: list[int]) -> list[bool]:
    """Return where the labels carry loss: a label is the token's own id, or -100 for no loss."""
    labels = _integers(record, "labels")
    _same_length(record, "labels", len(labels), len(input_ids))
    for index, (label, token) in enumerate(zip(labels, input_ids, strict=True)):
        if label not in (token, IGNORE_INDEX):
            raise DataError(
                f"{record.origin}: labels[{index}] is {label}, expected input_ids[{index}] = "
                f"{token}, or -100 for no loss"
            )
    return [label != IGNORE_INDEX for label in labels]


def _integers(record: Record, column: str) -> list[int]:
    value = _column(record, column)
    if hasattr(value, "tolist"):
        value = value.tolist()
    if not isinstance(value, list | tuple):
        raise DataError(
            f"{record.origin}: {column!r} must be a list of integers, found {type(value).__name__}"
        )
    for item in value:
        if not isinstance(item, int):
            raise DataError(
                f"{record.origin}: {column!r} must be a list of integers, "
                f"found {type(item).__name__} in it"
            )
    return list(value)


def _same_length(record: Record, column: str, length: int, expected: int) -> None:
    if length != expected:
        raise DataError(
            f"{record.origin}: {column!r} must be as long as 'input_ids' ({expected}), "
            f"found {length}"
        )


def _column(record: Record, column: str) -> Any:
    value = record.get(column)
    if value is None:
        raise DataError(f"{record.origin}: missing {column!r}")
    return value


def _well_formed(text: str, record: Record, where: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        surrogate = f"\\u{ord(text[error.start]):04x}"
        raise DataError(
            f"{record.origin}: {where!r} holds half a surrogate pair ({surrogate}), "
            "which is not text"
        ) from error
    return text

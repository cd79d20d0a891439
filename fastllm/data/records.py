"""TRL's record types, read from files and from memory, checked and brought to one form.

    SFT           {"text"} | {"messages"} | {"prompt", "completion"} | {"input_ids"[, "labels"]}
    preference    {"chosen", "rejected"[, "prompt"][, "margin"]} | {"chosen_ids", "rejected_ids"}
    prompts       {"prompt", **columns for the reward functions}

Each text is a string or a list of chat messages. Strings are used as they stand: a completion
follows its prompt with nothing put between.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fastllm.data import columns
from fastllm.data.columns import Messages, Text, read_mask, read_messages, read_text, read_token_ids
from fastllm.data.errors import DataError
from fastllm.data.reader import Record, read_records

__all__ = [
    "Messages",
    "PreferenceRecord",
    "PromptRecord",
    "Record",
    "SFTRecord",
    "Text",
    "is_conversational",
    "preference_records",
    "prompt_records",
    "read_records",
    "sft_records",
]

logger = logging.getLogger("fastllm")

PROMPT_ALIASES = ("question", "instruction")
COMPLETION_ALIASES = ("response", "answer", "output")


@dataclass(frozen=True, slots=True)
class Template:
    """What a record tells the chat template besides its messages."""

    tools: list[Any] | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)


PLAIN_TEMPLATE = Template()


@dataclass(frozen=True, slots=True)
class SFTRecord:
    """One text to learn. Without a prompt, `completion` is the whole text or conversation.

    A pre-tokenised record has `input_ids` and a `loss_mask` instead (None: every token).
    """

    origin: str
    completion: Text = ""
    prompt: Text | None = None
    input_ids: list[int] | None = None
    loss_mask: list[bool] | None = None
    template: Template = PLAIN_TEMPLATE


@dataclass(frozen=True, slots=True)
class PreferenceRecord:
    """Two answers, the better one in `chosen`; pre-tokenised ones have only the `_ids`."""

    origin: str
    chosen: Text = ""
    rejected: Text = ""
    prompt: Text | None = None
    margin: float | None = None
    chosen_ids: list[int] | None = None
    rejected_ids: list[int] | None = None
    template: Template = PLAIN_TEMPLATE


@dataclass(frozen=True, slots=True)
class PromptRecord:
    """A prompt to answer; `columns` are the record's other columns, for the reward functions."""

    origin: str
    prompt: Text
    columns: dict[str, Any]
    template: Template = PLAIN_TEMPLATE


def is_conversational(text: Text | None) -> bool:
    """Tell a list of chat messages from a string."""
    return isinstance(text, list)


def sft_records(source: Any, name: str = "items") -> list[SFTRecord]:
    """Read records for supervised fine-tuning; see `read_records` for what `source` may be."""
    if _are(source, SFTRecord):
        return list(source)
    aliases = _Aliases()
    records = [_sft_record(record, aliases) for record in read_records(source, name)]
    aliases.log(source, name)
    return records


def preference_records(source: Any, name: str = "pairs") -> list[PreferenceRecord]:
    """Read preference pairs; see `read_records` for what `source` may be."""
    if _are(source, PreferenceRecord):
        return list(source)
    return [_preference_record(record) for record in read_records(source, name)]


def prompt_records(source: Any, name: str = "prompts") -> list[PromptRecord]:
    """Read prompts for GRPO or generation; see `read_records` for what `source` may be."""
    if _are(source, PromptRecord):
        return list(source)
    aliases = _Aliases()
    raw = read_records(source, name, string_column="prompt")
    records = [_prompt_record(record, aliases) for record in raw]
    aliases.log(source, name)
    return records


def _are(source: Any, kind: type) -> bool:
    """Whether a list was read before."""
    return isinstance(source, list) and bool(source) and isinstance(source[0], kind)


class _Aliases:
    """Finds a column under its own or another common name, and says once which was used."""

    def __init__(self) -> None:
        self.used: dict[str, str] = {}

    def find(self, record: Record, column: str, others: tuple[str, ...]) -> str | None:
        if _has(record, column):
            return column
        for other in others:
            if _has(record, other):
                self.used[other] = column
                return other
        return None

    def log(self, source: Any, name: str) -> None:
        if self.used:
            where = source if isinstance(source, str) else getattr(source, "name", name)
            pairs = ", ".join(f"{other!r} as {column!r}" for other, column in self.used.items())
            logger.info("%s: reading %s", where, pairs)


def _has(record: Record, column: str) -> bool:
    # A table of mixed records, as `datasets` makes it, fills the missing columns with None.
    return record.get(column) is not None


def _sft_record(record: Record, aliases: _Aliases) -> SFTRecord:
    if _has(record, "input_ids"):
        return _tokenised(record)
    template = _template(record)
    if _has(record, "messages"):
        return SFTRecord(record.origin, read_messages(record, "messages"), template=template)
    prompt = aliases.find(record, "prompt", PROMPT_ALIASES)
    completion = aliases.find(record, "completion", COMPLETION_ALIASES)
    if prompt is not None and completion is not None:
        return _prompt_completion(record, prompt, completion, template)
    if _has(record, "text"):
        text = read_text(record, "text")
        if is_conversational(text):
            raise DataError(f"{record.origin}: 'text' must be a string, found a list of messages")
        return SFTRecord(record.origin, text)
    if prompt is not None and not _has(record, "chosen"):
        raise DataError(f"{record.origin}: missing 'completion' ({columns.found(record)})")
    if completion is not None:
        raise DataError(f"{record.origin}: missing 'prompt' ({columns.found(record)})")
    raise DataError(
        f"{record.origin}: expected 'text', 'messages' or 'prompt' and 'completion' "
        f"({columns.found(record)})"
    )


def _prompt_completion(
    record: Record, prompt_column: str, completion_column: str, template: Template
) -> SFTRecord:
    prompt = _prompt(record, prompt_column)
    completion = read_text(record, completion_column)
    _same_form(record, {prompt_column: prompt, completion_column: completion})
    return SFTRecord(record.origin, completion, prompt, template=template)


def _prompt(record: Record, column: str) -> Text:
    prompt = read_text(record, column, empty=True)
    if column == "instruction" and isinstance(prompt, str) and record.get("input"):
        # Alpaca's third column: what the instruction is about.
        return f"{prompt}\n\n{read_text(record, 'input')}"
    return prompt


def _tokenised(record: Record) -> SFTRecord:
    ids = read_token_ids(record, "input_ids")
    masks = [
        read_mask(record, column, len(ids))
        for column in ("completion_mask", "assistant_masks")
        if _has(record, column)
    ]
    if _has(record, "labels"):
        masks.append(columns.read_labels(record, ids))
    loss_mask = [all(bits) for bits in zip(*masks, strict=True)] if masks else None
    return SFTRecord(record.origin, input_ids=ids, loss_mask=loss_mask)


def _preference_record(record: Record) -> PreferenceRecord:
    margin = _margin(record)
    for good, bad in (
        ("chosen_ids", "rejected_ids"),
        ("chosen_input_ids", "rejected_input_ids"),  # TRL's older names
    ):
        if _has(record, good) or _has(record, bad):
            return PreferenceRecord(
                record.origin,
                chosen_ids=read_token_ids(record, good),
                rejected_ids=read_token_ids(record, bad),
                margin=margin,
            )
    prompt = read_text(record, "prompt", empty=True) if _has(record, "prompt") else None
    chosen, rejected = read_text(record, "chosen"), read_text(record, "rejected")
    sides: dict[str, Text] = {"chosen": chosen, "rejected": rejected}
    _same_form(record, sides if prompt is None else {"prompt": prompt, **sides})
    return PreferenceRecord(
        record.origin, chosen, rejected, prompt, margin, template=_template(record)
    )


def _margin(record: Record) -> float | None:
    margin = record.get("margin")
    if margin is None:
        return None
    if isinstance(margin, bool) or not isinstance(margin, int | float) or not math.isfinite(margin):
        raise DataError(f"{record.origin}: 'margin' must be a finite number, found {margin!r}")
    return float(margin)


def _prompt_record(record: Record, aliases: _Aliases) -> PromptRecord:
    column = aliases.find(record, "prompt", PROMPT_ALIASES)
    if column is None:
        raise DataError(f"{record.origin}: missing 'prompt' ({columns.found(record)})")
    others = {key: value for key, value in record.items() if key != column}
    return PromptRecord(record.origin, _prompt(record, column), others, _template(record))


def _template(record: Record) -> Template:
    tools = columns.read_tools(record)
    kwargs = record.get("chat_template_kwargs") or {}
    if not isinstance(kwargs, Mapping):
        raise DataError(
            f"{record.origin}: 'chat_template_kwargs' must be an object, "
            f"found {type(kwargs).__name__}"
        )
    return Template(tools, dict(kwargs)) if tools or kwargs else PLAIN_TEMPLATE


def _same_form(record: Record, texts: dict[str, Text]) -> None:
    forms = {column: is_conversational(text) for column, text in texts.items()}
    if len(set(forms.values())) > 1:
        found = ", ".join(
            f"{column!r} is {'a list of messages' if chat else 'a string'}"
            for column, chat in forms.items()
        )
        raise DataError(f"{record.origin}: strings and messages cannot be mixed: {found}")

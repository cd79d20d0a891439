"""Chat templates: rendering by transformers' rules, in a sandbox, and where the assistant speaks.

A template is code that comes with a model, so it sees plain JSON values only.
`{% generation %} ... {% endgeneration %}` marks what the assistant wrote; templates without the
marks are located by rendering the conversation turn by turn.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from fastllm.data.errors import DataError

Span = tuple[int, int]

DEFAULT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] + eos_token }}{% endif %}"
    "{{ '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""ChatML, with the end-of-sequence token at the end of every turn."""

# Unicode keeps these two for a program's own use; no text may contain them.
BEGIN, END = "\ufdd0", "\ufdd1"
_MARKS = re.compile(f"[{BEGIN}{END}]")


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    special_tokens: Mapping[str, str],
    add_generation_prompt: bool = False,
    tools: Sequence[Any] | None = None,
    **kwargs: Any,
) -> str:
    """Return the conversation as text. `special_tokens` are `bos_token`, `eos_token`, ..."""
    text, _ = _render(template, messages, special_tokens, add_generation_prompt, tools, kwargs)
    return text


def render_with_spans(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    special_tokens: Mapping[str, str],
    tools: Sequence[Any] | None = None,
    **kwargs: Any,
) -> tuple[str, list[Span]]:
    """Return the text and the character spans [start, end) that the assistant wrote.

    A span includes the token that ends the turn, so that the model learns to stop.
    """
    text, spans = _render(template, messages, special_tokens, False, tools, kwargs)
    if not has_generation_marks(template):
        spans = _spans_by_prefix(template, messages, special_tokens, tools, kwargs, text)
    return text, spans


def has_generation_marks(template: str) -> bool:
    """Tell whether the template itself marks what the assistant wrote."""
    return re.search(r"\{%-?\s*generation\s*-?%\}", template) is not None


def check_turns_end(text: str, spans: Sequence[Span], special_tokens: Sequence[str]) -> None:
    """Raise DataError if a span does not end in a special token: nothing in it says to stop."""
    for start, end in spans:
        if not text[start:end].endswith(tuple(special_tokens)):
            raise DataError(
                "the chat template has no {% generation %} marks and puts no special token after "
                f"what the assistant wrote ({text[start:end][-20:]!r}), so a model would not learn "
                "to stop; use a template with the marks, or records with 'prompt' and 'completion'"
            )


def token_mask(offsets: Sequence[Span], spans: Sequence[Span]) -> list[bool]:
    """Mark the tokens that hold any character of a span.

    `offsets` [T] are the tokens' character ranges in ascending order.
    """
    mask = [False] * len(offsets)
    token = 0
    for start, end in spans:
        while token < len(offsets) and offsets[token][1] <= start:
            token += 1
        while token < len(offsets) and offsets[token][0] < end:
            mask[token] = True
            token += 1
    return mask


def _spans_by_prefix(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    special_tokens: Mapping[str, str],
    tools: Sequence[Any] | None,
    kwargs: dict[str, Any],
    text: str,
) -> list[Span]:
    """Find the assistant's turns as what each one adds to the rendered turns before it."""
    spans = []
    for index, message in enumerate(messages):
        if message.get("role") != "assistant":
            continue
        before, _ = _render(template, messages[:index], special_tokens, True, tools, kwargs)
        after, _ = _render(template, messages[: index + 1], special_tokens, False, tools, kwargs)
        # The white space after the end-of-turn token is not the model's to write.
        turn = after[len(before) :].rstrip()
        if not (after.startswith(before) and text.startswith(before + turn) and turn):
            raise DataError(
                "the chat template has no {% generation %} marks and renders a turn differently "
                "once others follow, so what the assistant wrote cannot be located; use a "
                "template with the marks, or records with 'prompt' and 'completion'"
            )
        spans.append((len(before), len(before) + len(turn)))
    return spans


def _render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    special_tokens: Mapping[str, str],
    add_generation_prompt: bool,
    tools: Sequence[Any] | None,
    kwargs: Mapping[str, Any],
) -> tuple[str, list[Span]]:
    values = {
        "documents": None,
        **special_tokens,
        **kwargs,
        "messages": list(messages),
        "tools": tools,
        "add_generation_prompt": add_generation_prompt,
    }
    from fastllm.data import sandbox  # jinja2 is slow to import, and most data need no template

    compiled = sandbox.compiled(template)
    try:
        marked = compiled.render(_plain(values))
    except sandbox.FAULTS as error:
        raise DataError(f"the chat template cannot render these messages: {error}") from error
    return _without_marks(marked)


def _without_marks(marked: str) -> tuple[str, list[Span]]:
    """Take the marks out of a rendered text and return the spans they enclosed."""
    spans: list[Span] = []
    open_at: list[int] = []
    for removed, mark in enumerate(_MARKS.finditer(marked)):
        place = mark.start() - removed
        if mark.group() == BEGIN:
            open_at.append(place)
        else:
            spans.append((open_at.pop(), place))
    return _MARKS.sub("", marked), spans


def _plain(value: Any) -> Any:
    """Rebuild a value of JSON types; the sandbox must see no method that it does not know."""
    match value:
        case None | bool():
            return value
        case str():
            if _MARKS.search(value):
                raise DataError("a message holds U+FDD0 or U+FDD1, which is not a character")
            return str.__str__(value)
        case int():
            return int(value)
        case float():
            return float(value)
        case Mapping():
            return {_plain(key): _plain(item) for key, item in value.items()}
        case list() | tuple():
            return [_plain(item) for item in value]
    return f"<{type(value).__name__}>"

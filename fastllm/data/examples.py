"""The smallest training example: a prompt and the response to it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Example:
    """One demonstration: `response` is what the model should write after `prompt`."""

    prompt: str
    response: str


def format_example(example: Example) -> str:
    """Return the text that a trainer sees: the response directly after the prompt.

    Nothing is put between the two. A separator belongs to the prompt ("What is 2 + 2?\\n"), so
    that the same prompt given to `generate`, GRPO or a reward model later is, character for
    character, the one the model was trained on.
    """
    return example.prompt + example.response

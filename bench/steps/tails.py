"""What a padded batch wastes: completions of very different lengths, and a prompt stored again."""

from __future__ import annotations

import random
from pathlib import Path

from fastllm import Tokenizer

from . import judge, material
from .contest import Case
from .entrants import FLOAT, fastllm, loop
from .job import Job

SECTION = "generate"


def cases() -> list[Case]:
    return [long_tails(64, 512, prompt=128), group_on_a_long_prompt(16, 2048, new=64)]


def quick_cases() -> list[Case]:
    return [long_tails(8, 64, prompt=32), group_on_a_long_prompt(4, 256, new=16)]


def long_tails(count: int, longest: int, prompt: int) -> Case:
    """Each request has a length of its own: in a padded batch, all run until the last one ends.

    Work is what was asked for, whoever draws more than that.
    """
    wanted = lengths(count, longest)

    def job(folder: Path) -> Job:
        records = [
            {"ids": ids, "new_tokens": length}
            for ids, length in zip(material.sequences(count, prompt), wanted, strict=True)
        ]
        return Job(
            kind="generate", model=_model(folder, prompt + longest), records=records, group=1
        )

    return Case(
        section=SECTION,
        name="long tails",
        size=f"4 x 128, {count} completions of {min(wanted)} to {longest}, prompts of {prompt}",
        dtype=FLOAT,
        job=job,
        contenders=(
            fastllm(),
            fastllm("fastllm, padded", settings={"padded": True}),
            loop("transformers, padded"),
        ),
        judge=judge.regrets,
        work=sum(wanted),
        unit="tokens",
        checked=1,
    )


def lengths(count: int, longest: int, shortest: int = 8) -> list[int]:
    """Even in their logarithms, both ends included, in any order."""
    steps = range(count)
    found = [round(shortest * (longest / shortest) ** (i / (count - 1))) for i in steps]
    random.Random(material.SEED).shuffle(found)
    return found


def group_on_a_long_prompt(group: int, prompt: int, new: int) -> Case:
    """The memory shown is that of keys and values."""

    def job(folder: Path) -> Job:
        return Job(
            kind="generate",
            model=_model(folder, prompt + new),
            records=[{"ids": ids} for ids in material.sequences(1, prompt)],
            group=group,
            new_tokens=new,
        )

    return Case(
        section=SECTION,
        name="group on a long prompt",
        size=f"4 x 128, {group} completions of {new}, prompt of {prompt}",
        dtype=FLOAT,
        job=job,
        contenders=(
            fastllm(),
            fastllm("fastllm, prompts apart", settings={"apart": True}),
            loop(),
        ),
        judge=judge.regrets,
        work=group * new,
        unit="tokens",
        held=True,
        checked=1,
        gigabytes=2.0,
    )


def _model(folder: Path, length: int) -> str:
    return material.language_model(folder, material.SMALL, Tokenizer.bytes(), length)

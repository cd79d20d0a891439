"""Whole GRPO steps against TRL's, in their parts, and the training pass of one group by itself."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastllm import Tokenizer

from . import material
from .contest import Case
from .entrants import FLOAT, fastllm, fastllm_with_glibc, loop, trl, trl_defaults
from .job import Job
from .limits import Shape
from .workers import Contender

SECTION = "steps"

PARTS: dict[str, Any] = {
    part: (1, "steps") for part in ("prefill", "decoding", "scoring", "training", "rest")
}

# How far the mean rewards of two draws of 64 completions may be apart.
SAMPLED = 0.05


@dataclass(frozen=True)
class Size:
    """A step: prompts x group x new tokens."""

    prompts: int = 8
    group: int = 8
    new: int = 64
    prompt: int = 32
    large: bool = False
    passes: int = 1
    reward: str = "reward function"

    def __str__(self) -> str:
        model = "12 x 768" if self.large else "4 x 128"
        long = f"prompts of {self.prompt}, " if self.prompt != 32 else ""
        return f"{model}, {long}{self.prompts} x {self.group} x {self.new}, {self.reward}"

    @property
    def sizes(self) -> dict[str, int]:
        return material.LARGE if self.large else material.SMALL


def cases() -> list[Case]:
    """The model and the function that reward, a long prompt, a large model, one group's pass."""
    apart = fastllm("fastllm, not shared", settings={"share_prefix": False})
    small = (trl(), replace(trl_defaults(), tolerance=SAMPLED), fastllm_with_glibc())
    return [
        _step(Size(), *small),
        _step(Size(reward="reward model"), *small),
        _step(Size(prompts=4, group=16, prompt=512), apart, trl()),
        _step(Size(large=True, passes=4), trl()),
        training_pass(16, 2048, new=64),
    ]


def quick_cases() -> list[Case]:
    return [_step(Size(prompts=2, group=4, new=16), trl())]


def _step(size: Size, *others: Contender) -> Case:
    vocabulary = material.LARGE_VOCABULARY if size.large else ASCII
    scored = size.reward == "reward model"
    shape = Shape.of(size.sizes, vocabulary)
    limit = shape.grpo_step(size.prompts, size.group, size.prompt, size.new, scored)
    return Case(
        section=SECTION,
        name="GRPO step",
        size=str(size),
        dtype=FLOAT,
        job=lambda folder: _rollouts(folder, size),
        contenders=(fastllm(), *others),
        reference="trl",
        work=1,
        unit="steps",
        parts=PARTS,
        limits={"": limit},
        # Compared: the mean reward of what is drawn before anything is learned, and its length.
        tolerance=SAMPLED * (64 / (size.prompts * size.group)) ** 0.5,
        checked=1,
        rounds=3 if size.large else None,
        gigabytes=8.0 if size.large else 3.5 if size.prompt > 32 else 1.0,
    )


# Tokens of `material.ascii_tokenizer`.
ASCII = Tokenizer.bytes().vocab_size - 128


def _rollouts(folder: Path, size: Size) -> Job:
    place = folder / "tokenizer"
    tokenizer = (
        material.byte_tokenizer(place, material.LARGE_VOCABULARY)
        if size.large
        else material.ascii_tokenizer(place)
    )
    length = max(1024, size.prompt + size.new)
    # No EOS: completions of full length.
    model = material.language_model(folder, size.sizes, tokenizer, length, eos_token_id=None)
    reward = ""
    if size.reward == "reward model":
        reward = material.reward_model(folder / "reward", size.sizes, tokenizer, length)
    return Job(
        kind="grpo",
        model=model,
        reward_model=reward,
        records=material.prompts(64, size.prompt),
        batch=size.prompts * size.group,
        passes=size.passes,
        group=size.group,
        new_tokens=size.new,
        learning_rate=1e-5 if size.large else 1e-3,
    )


def training_pass(group: int, prompt: int, new: int) -> Case:
    """Forward and backward of a group: the prompt once, or once for each completion."""
    shape = Shape.of(material.SMALL, Tokenizer.bytes().vocab_size)
    return Case(
        section=SECTION,
        name="GRPO training pass",
        size=f"4 x 128, {group} completions of {new}, prompt of {prompt}",
        dtype=FLOAT,
        job=lambda folder: _group(folder, group, prompt, new),
        contenders=(
            fastllm(),
            fastllm("fastllm, not shared", settings={"share_prefix": False}),
            fastllm("fastllm, padded", settings={"share_prefix": False, "packing": False}),
            loop("transformers, padded"),
        ),
        reference="transformers, padded",
        work=1,
        unit="passes",
        limits={"": shape.training(1, group, prompt, new)},
        checked=1,
        rounds=5,
        gigabytes=4.0,
    )


def _group(folder: Path, group: int, prompt: int, new: int) -> Job:
    model = material.language_model(folder, material.SMALL, Tokenizer.bytes(), prompt + new)
    (ids,) = material.sequences(1, prompt)
    draws = random.Random(material.SEED)
    record = {
        "ids": ids,
        "completions": [row[:new] for row in material.sequences(group, prompt)],
        "advantages": [draws.gauss(0.0, 1.0) for _ in range(group)],
    }
    return Job(kind="group_pass", model=model, records=[record])

"""Greedy generation against `transformers.generate`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fastllm import Tokenizer

from ..options import Options
from ..records import Record
from . import material
from .contest import Case, run_all
from .entrants import FLOAT, fastllm, loop
from .job import Job

NAME = "generate"

PROMPT, NEW_TOKENS = 128, 128


def run(options: Options) -> Iterator[Record]:
    """Two models at two batch sizes; in a hurry, the small one at batch 1."""
    sizes = [("4 x 128", 1)] if options.quick else [(m, b) for m in MODELS for b in (1, 32)]
    yield from run_all([_case(model, batch) for model, batch in sizes], options)


MODELS = {"4 x 128": (material.SMALL, 259), "12 x 768": (material.LARGE, 32_000)}


def _case(model: str, batch: int) -> Case:
    def job(folder: Path) -> Job:
        sizes, vocabulary = MODELS[model]
        place = material.language_model(
            folder, sizes, Tokenizer.bytes(), 512, vocab_size=vocabulary
        )
        records = [{"ids": ids} for ids in material.sequences(batch, PROMPT, vocabulary)]
        return Job(kind="generate", model=place, records=records, new_tokens=NEW_TOKENS)

    return Case(
        section=NAME,
        name="greedy generation",
        size=f"{model}, batch {batch}, {PROMPT} + {NEW_TOKENS}",
        dtype=FLOAT,
        job=job,
        contenders=(
            fastllm(),
            loop(),
            loop("transformers, static cache", cache="static"),
            loop("transformers, static cache, compiled", cache="static", compile=True),
        ),
        reference="transformers",
        work=batch * NEW_TOKENS,
        unit="tokens",
        # The first tokens of each completion; of two nearly even ones, rounding chooses.
        tolerance=0.0,
        slack=0.1,
        checked=2,
        rounds=None if model == "4 x 128" else 3,
        gigabytes=1.0 if model == "4 x 128" else 2.5,
    )

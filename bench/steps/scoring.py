"""Scores of a reward model: full sequences in a batch, and pairs of real lengths."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fastllm import Tokenizer

from ..options import Options
from ..records import Record
from . import material
from .contest import Case, run_all
from .entrants import BFLOAT, FLOAT, fastllm, loop
from .job import Job
from .workers import Contender

NAME = "scoring"

BATCH, LENGTH = 32, 256


def run(options: Options) -> Iterator[Record]:
    """Scoring; in a hurry, full sequences in fp32 only."""
    cases = [_full(FLOAT)] if options.quick else [_full(FLOAT), _full(BFLOAT), _real()]
    yield from run_all(cases, options)


def _full(dtype: str) -> Case:
    others: tuple[Contender, ...]
    if dtype == FLOAT:
        others = (loop(), loop("transformers, compiled", compile=True))
    else:
        others = (
            loop("transformers, autocast", "amp"),
            loop("transformers, bf16 weights", "bf16"),
            loop("transformers, bf16 weights, compiled", "bf16", compile=True),
            fastllm("fastllm, fp32"),
        )
    return Case(
        section=NAME,
        name="scoring",
        size=f"4 x 128, {BATCH} x {LENGTH}",
        dtype=dtype,
        job=_sequences,
        contenders=(fastllm(dtype=dtype), *others),
        reference="transformers" if dtype == FLOAT else "transformers, autocast",
        work=BATCH,
        unit="samples",
        tolerance=1e-3 if dtype == FLOAT else 3e-2,
    )


def _real() -> Case:
    return Case(
        section=NAME,
        name="scoring hh-rlhf harmless",
        size="4 x 128, 16 pairs of up to 1,024",
        dtype=FLOAT,
        job=_pairs,
        contenders=(
            fastllm(),
            loop(),
            loop("transformers, sorted by length", sort=True),
            loop("transformers, sorted, compiled", sort=True, compile=True),
        ),
        reference="transformers",
        work=BATCH,
        unit="samples",
        block_steps=4,
    )


def _sequences(folder: Path) -> Job:
    model = material.reward_model(folder, material.SMALL, Tokenizer.bytes(), LENGTH)
    records = [{"ids": ids} for ids in material.sequences(BATCH, LENGTH)]
    return Job(kind="score", model=model, records=records, batch=BATCH)


def _pairs(folder: Path) -> Job:
    tokenizer = material.bpe(material.PAIRS, 4096)
    model = material.reward_model(folder, material.SMALL, tokenizer, 2048)
    records = material.real_pairs(tokenizer, 1024)
    return Job(kind="score_pairs", model=model, records=records, batch=BATCH // 2)

"""Whole training steps: SFT, reward models and GRPO, against TRL and a plain transformers loop."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from fastllm import Tokenizer

from ..options import Options
from ..records import Record
from . import grpo, material
from .contest import Case, run_all
from .entrants import (
    BFLOAT,
    FLOAT,
    ROUNDED,
    fastllm,
    fastllm_with_glibc,
    loop,
    trl,
    trl_defaults,
)
from .job import Job
from .workers import Contender

NAME = "steps"

PAIRS, LENGTH = 8, 256


def run(options: Options) -> Iterator[Record]:
    """All cases; in a hurry, the reference configuration in fp32 and a small GRPO step."""
    quick = [_reward_step(), *grpo.quick_cases()]
    yield from run_all(quick if options.quick else _cases(), options)


def _cases() -> list[Case]:
    return [
        _reward_step(),
        _reward_step_bf16(),
        _reward_real(),
        _sft_step(FLOAT),
        _sft_step(BFLOAT),
        _sft_real(),
        *grpo.cases(),
    ]


def _reward_step() -> Case:
    """The reference configuration: full sequences that share nothing."""
    return Case(
        section=NAME,
        name="RM step",
        size=f"4 x 128, {PAIRS} pairs x {LENGTH}",
        dtype=FLOAT,
        job=_full_pairs,
        contenders=(
            fastllm(),
            loop(),
            trl(),
            loop("transformers, compiled", compile=True),
            trl("trl, compiled", compile=True),
            trl_defaults(),
            fastllm_with_glibc(),
        ),
        reference="transformers",
        work=1,
        unit="steps",
        curve=True,
    )


def _reward_step_bf16() -> Case:
    return Case(
        section=NAME,
        name="RM step",
        size=f"4 x 128, {PAIRS} pairs x {LENGTH}",
        dtype=BFLOAT,
        job=_full_pairs,
        contenders=(
            fastllm(dtype=BFLOAT),
            fastllm("fastllm, fp32"),
            loop("transformers, autocast", "amp"),
            loop("transformers, bf16 weights", "bf16"),
            loop("transformers, autocast, compiled", "amp", compile=True),
            loop("transformers, bf16 weights, compiled", "bf16", compile=True),
            trl("trl, autocast", "amp"),
        ),
        reference="transformers, autocast",
        work=1,
        unit="steps",
        curve=True,
        tolerance=ROUNDED,
    )


def _reward_real() -> Case:
    return Case(
        section=NAME,
        name="RM on hh-rlhf harmless",
        size="4 x 128, BPE of 4,096, 8 pairs of up to 1,024",
        dtype=FLOAT,
        job=_real_pairs,
        contenders=(fastllm(), trl(), trl_defaults()),
        reference="trl",
        work=PAIRS,
        unit="pairs",
        curve=True,
        block_steps=5,
    )


def _sft_step(dtype: str) -> Case:
    others: tuple[Contender, ...]
    if dtype == FLOAT:
        others = (
            loop(),
            loop("transformers, compiled", compile=True),
            trl(),
            trl_defaults(),
            fastllm_with_glibc(),
        )
    else:
        others = (
            loop("transformers, autocast", "amp"),
            loop("transformers, autocast, compiled", "amp", compile=True),
            loop("transformers, bf16 weights, compiled", "bf16", compile=True),
            trl("trl, autocast", "amp"),
            fastllm("fastllm, fp32"),
        )
    return Case(
        section=NAME,
        name="SFT step",
        size="12 x 768, 32,000 tokens, 4 x 512",
        dtype=dtype,
        job=_full_sequences,
        contenders=(fastllm(dtype=dtype), *others),
        reference="transformers" if dtype == FLOAT else "transformers, autocast",
        work=4 * 512,
        unit="tokens",
        curve=True,
        checked=2,
        tolerance=1e-3 if dtype == FLOAT else 5 * ROUNDED,
        rounds=3,
        gigabytes=7.5,
    )


def _sft_real() -> Case:
    return Case(
        section=NAME,
        name="SFT on gsm8k",
        size="12 x 768, 32,000 tokens, block 512",
        dtype=FLOAT,
        job=_maths,
        contenders=(
            fastllm(),
            trl("trl, padded"),
            # It fills its rows with the longest problems first, so only the loss before the first
            # step can be compared: about the same (10.4 to 10.6) for all problems.
            replace(trl("trl, packed", packing=True, rows=4), tolerance=0.2, compared=1),
        ),
        reference="trl, padded",
        work=1000,
        unit="tokens",
        per_token=True,
        curve=True,
        checked=2,
        block_steps=2,
        rounds=3,
        gigabytes=7.5,
    )


def _full_pairs(folder: Path) -> Job:
    model = material.reward_model(folder, material.SMALL, Tokenizer.bytes(), LENGTH)
    records = material.pairs(64, LENGTH)
    return material.training(records, PAIRS, kind="rm", model=model, max_length=LENGTH)


def _real_pairs(folder: Path) -> Job:
    tokenizer = material.bpe(material.PAIRS, 4096)
    model = material.reward_model(folder, material.SMALL, tokenizer, 2048)
    records = material.real_pairs(tokenizer, 1024)
    return material.training(records, PAIRS, kind="rm", model=model)


def _full_sequences(folder: Path) -> Job:
    vocabulary = material.LARGE_VOCABULARY
    tokenizer = material.byte_tokenizer(folder / "tokenizer", vocabulary)
    model = material.language_model(folder, material.LARGE, tokenizer, 512)
    records = [{"input_ids": ids} for ids in material.sequences(16, 512, vocabulary)]
    return material.training(
        records, 4, kind="sft", model=model, max_length=512, learning_rate=3e-4
    )


def _maths(folder: Path) -> Job:
    vocabulary = material.LARGE_VOCABULARY
    tokenizer = material.bpe(material.MATHS, vocabulary)
    model = material.language_model(folder, material.LARGE, tokenizer, 512, vocab_size=vocabulary)
    return material.training(
        material.maths()[:2000], 8, kind="sft", model=model, max_length=512, learning_rate=3e-4
    )

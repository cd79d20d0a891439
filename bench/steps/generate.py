"""Greedy generation against `transformers.generate` and llama.cpp, prefill and decoding apart."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastllm import Tokenizer

from ..options import Options
from ..records import Record
from . import judge, material, tails
from .contest import Case, run_all
from .entrants import BFLOAT, FLOAT, fastllm, llama, loop
from .job import Job
from .limits import Memory, Shape
from .workers import Contender

NAME = "generate"

SMALL, LARGE = "4 x 128", "12 x 768"
MODELS = {SMALL: (material.SMALL, 259), LARGE: (material.LARGE, material.LARGE_VOCABULARY)}
INT8 = "int8"

# How far behind the best token a drawn one may be, in log-probability: rounding of fp32, and of
# what is kept in fewer bits.
REGRET = {FLOAT: 1e-3, BFLOAT: 0.05, INT8: 0.1}


def run(options: Options) -> Iterator[Record]:
    """All sizes; in a hurry, the small model at batch 1 and short tails."""
    cases = [*_cases(), *tails.cases()]
    if options.quick:
        cases = [_case(Size(SMALL, 1, new=32), *_peers(FLOAT, static=True)), *tails.quick_cases()]
    yield from run_all(cases, options)


@dataclass(frozen=True)
class Size:
    """What is generated."""

    model: str
    prompts: int
    group: int = 1
    prompt: int = 128
    new: int = 128

    @property
    def batch(self) -> int:
        return self.prompts * self.group

    def __str__(self) -> str:
        batch = (
            f"{self.prompts} prompts x {self.group}" if self.group > 1 else f"batch {self.batch}"
        )
        return f"{self.model}, {batch}, {self.prompt} + {self.new}"


def _cases() -> list[Case]:
    """Against batch, prompt length and group size, then the same in fewer bits."""
    compiled = loop("transformers, static cache, compiled", cache="static", compile=True)
    static, plain = _peers(FLOAT, static=True), _peers(FLOAT)
    narrow = _peers(BFLOAT)
    apart = fastllm("fastllm, prompts apart", settings={"apart": True})
    return [
        _case(Size(SMALL, 1), *static, compiled, llama("f32")),
        _case(Size(SMALL, 32), *static, llama("f32")),
        _case(Size(SMALL, 64), *static),
        _case(Size(SMALL, 32, prompt=512), *plain),
        _case(Size(SMALL, 2, group=16, prompt=512), *plain, apart),
        _case(Size(SMALL, 1), *narrow, llama("bf16"), dtype=BFLOAT),
        _case(Size(SMALL, 32), *narrow, dtype=BFLOAT),
        _case(Size(LARGE, 1), *static, compiled, llama("f32")),
        _case(Size(LARGE, 32), *static, llama("f32")),
        _case(Size(LARGE, 64, new=64), *plain),
        _case(Size(LARGE, 2, group=8, prompt=512, new=64), *plain, apart),
        _case(Size(LARGE, 1), *narrow, llama("bf16"), dtype=BFLOAT),
        _case(Size(LARGE, 32, new=64), *narrow, dtype=BFLOAT),
        _case(Size(LARGE, 1), fastllm("fastllm, bf16", BFLOAT), llama("q8_0"), dtype=INT8),
    ]


def _peers(dtype: str, static: bool = False) -> tuple[Contender, ...]:
    plain = loop() if dtype == FLOAT else loop("transformers, bf16 weights", "bf16")
    return (plain, loop("transformers, static cache", cache="static")) if static else (plain,)


def _case(size: Size, *others: Contender, dtype: str = FLOAT) -> Case:
    sizes, vocabulary = MODELS[size.model]
    large = size.model == LARGE
    shape = Shape.of(sizes, vocabulary)
    work: dict[str, Any] = {
        "prefill": (size.batch * size.prompt, "tokens"),
        "decoding": (size.batch * (size.new - 1), "tokens"),
    }
    cache = FLOAT if dtype == INT8 else dtype
    limit = shape.decoding(size.prompts, size.group, size.prompt, size.new, dtype, cache)
    return Case(
        section=NAME,
        name="greedy generation",
        size=str(size),
        dtype=dtype,
        asked_as=FLOAT if dtype == INT8 else "",
        job=lambda folder: _job(folder, size),
        contenders=(_ours(dtype), *others, *_reading(limit, large and size.batch == 1)),
        judge=judge.regrets,
        tolerance=REGRET[dtype],
        work=size.batch * size.new,
        unit="tokens",
        parts=work,
        limits={"decoding": limit},
        checked=1 if large else 2,
        rounds=3 if large else None,
        gigabytes=2.5 if large else 1.0,
    )


def _ours(dtype: str) -> Contender:
    return fastllm(settings={"weights": INT8}) if dtype == INT8 else fastllm(dtype=dtype)


def _reading(limit: Memory, wanted: bool) -> tuple[Contender, ...]:
    """The memory as a contender: where reading is all, its rate in the same minutes counts."""
    if not wanted:
        return ()
    settings = {"read": int(limit.bytes_per_step), "times": limit.steps}
    return (fastllm("a read of the same bytes", settings=settings, compared=0),)


def _job(folder: Path, size: Size) -> Job:
    sizes, vocabulary = MODELS[size.model]
    length = max(512, size.prompt + size.new)
    place = material.language_model(folder, sizes, Tokenizer.bytes(), length, vocab_size=vocabulary)
    records = [{"ids": ids} for ids in material.sequences(size.prompts, size.prompt, vocabulary)]
    return Job(kind="generate", model=place, records=records, group=size.group, new_tokens=size.new)

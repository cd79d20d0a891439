"""This project's side of generation: prompts through the engine, until the last one has ended."""

from __future__ import annotations

from collections.abc import Sequence

from bench.steps.drawing import Drawn, in_parts
from bench.steps.job import Job
from bench.steps.turns import Block
from fastllm import SamplingParams, Transformer
from fastllm.generation import Engine

# Token steps between two looks at what has ended.
TOKENS_AT_ONCE = 64

# The engine's own default.
PREFILL_TOKENS = 8192


def generate(job: Job, model: Transformer) -> Block:
    """Greedy completions; nothing stops early.

    Settings: `weights` of the engine, `padded` for all completions as long as the longest one,
    `apart` for every completion with a prompt of its own.
    """
    copies, group = (job.group, 1) if job.settings.get("apart") else (1, job.group)
    records = [record for record in job.records for _ in range(copies)]
    prompts = [record["ids"] for record in records]
    lengths = [record.get("new_tokens", job.new_tokens) for record in records]
    if job.settings.get("padded"):
        lengths = [max(lengths)] * len(lengths)
    engine = Engine(
        model,
        weights=job.settings.get("weights", "auto"),
        # All at a time, as in a padded batch, however long the prompts.
        prefill_tokens=max(PREFILL_TOKENS, sum(map(len, prompts))),
    )

    def draw(whole: bool) -> Drawn:
        return complete(engine, prompts, lengths if whole else [1] * len(prompts), group)

    every = [length for length in lengths for _ in range(group)]
    return in_parts(draw, job.lengths, every)


def complete(
    engine: Engine, prompts: Sequence[list[int]], lengths: Sequence[int], group: int
) -> Drawn:
    """All completions, those of the first prompt first; the engine is as `generate` drives it."""
    places = {}
    for number, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        params = SamplingParams(
            max_new_tokens=length,
            temperature=0.0,
            num_return_sequences=group,
            stop_token_ids=(),
        )
        places[engine.add_request(prompt, params)] = number
    drawn: list[list[int]] = [[] for _ in range(len(prompts) * group)]
    while engine.has_unfinished_requests():
        for sequence in engine.advance(TOKENS_AT_ONCE):
            assert sequence.tokens is not None
            place = places[sequence.request.id] * group + sequence.index
            drawn[place] = sequence.tokens.since(0)[0]
    return Drawn(drawn, engine.stats.peak_cache_bytes)

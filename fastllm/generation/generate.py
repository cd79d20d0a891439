"""`generate`: completions of prompts, with the log-probability of every token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from inspect import signature
from typing import Any

import torch

from ..model import Transformer
from .engine import Engine, StepName
from .native_step import Weights
from .requests import Completion, Stats
from .requests import Sequence as Drawn
from .sampling import SamplingParams, random_keys
from .stopping import TextCodec

OnFinished = Callable[[int, list[Completion]], None]

# A token step returns when a sequence ends; this bounds what an interrupt has to wait for.
_TOKENS_AT_ONCE = 64


def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int | Sequence[int],
    temperature: float = 1.0,
    *,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    min_new_tokens: int = 0,
    num_return_sequences: int = 1,
    stop_token_ids: Sequence[int] | None = None,
    stop_strings: Sequence[str] = (),
    tokenizer: TextCodec | None = None,
    seed: int | None = None,
    request_ids: Sequence[int] | None = None,
    max_batch_size: int | None = 256,
    prefill_tokens: int = 8192,
    cache_bytes: int | None = None,
    weights: Weights = "auto",
    step: StepName = "auto",
    engine: Engine | None = None,
    on_finished: OnFinished | None = None,
    stats: Stats | None = None,
) -> list[Completion]:
    """Complete token prompts.

    What a sequence says depends on its seed and its request, not on its company: see `Engine`.

    Args:
        model: the language model; no gradients are recorded.
        prompts: token ids of each prompt.
        max_new_tokens: longest completion, in tokens; of all prompts, or of each.
        temperature, top_k, top_p, min_p, repetition_penalty, min_new_tokens, num_return_sequences,
            stop_token_ids: see `SamplingParams`; temperature 0 is greedy.
        stop_strings: text that ends a completion; needs a tokenizer.
        tokenizer: with one, completions have their text.
        seed: None draws one from PyTorch's default generator.
        request_ids: 64-bit integer that names each prompt's random stream; None for 0, 1, 2, ...
        max_batch_size, prefill_tokens, cache_bytes, weights, step: see `Engine`.
        engine: what these five are for, to be used again: one of this model, whose memory and CUDA
            graphs stay. After training, `Engine.update_weights` is the caller's.
        on_finished: called with a prompt's number and completions when the last of them ends.
        stats: what was done is added to it.

    Returns:
        Completions, all those of the first prompt first.

    Raises:
        ValueError: an option out of its range, or a prompt that the model cannot complete.
        RuntimeError: the model's logits are not finite.
    """
    lengths = _lengths(max_new_tokens, len(prompts))
    params = SamplingParams(
        max_new_tokens=max(lengths, default=1),
        min_new_tokens=min_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        num_return_sequences=num_return_sequences,
        stop_token_ids=stop_token_ids,
        stop_strings=stop_strings,
        seed=seed,
    )
    options: dict[str, Any] = {
        "max_batch_size": max_batch_size,
        "cache_bytes": cache_bytes,
        "prefill_tokens": prefill_tokens,
        "weights": weights,
        "step": step,
    }
    engine = _engine(engine, model, tokenizer, options, stats)
    streams = _streams(seed, request_ids, len(prompts), num_return_sequences)
    for number, of_prompt in enumerate(streams):
        own = replace(params, max_new_tokens=lengths[number])
        engine.submit(number, prompts[number], own, of_prompt, f"prompt {number}")
    return _Completed(len(prompts), num_return_sequences, tokenizer, on_finished).by(engine)


def _engine(
    engine: Engine | None,
    model: Transformer,
    tokenizer: TextCodec | None,
    options: dict[str, Any],
    stats: Stats | None,
) -> Engine:
    """The engine that was given, if it serves, or a new one; it counts in `stats`."""
    if engine is None:
        engine = Engine(model, tokenizer, **options)
        engine.stats = stats or engine.stats
        return engine
    if engine.model is not model or engine.has_unfinished_requests():
        raise ValueError("engine: expected an idle engine of this model")
    for name, value in options.items():
        if value != signature(Engine).parameters[name].default:
            raise ValueError(f"{name}: the engine that was given has its own")
    engine.stats = stats or engine.stats
    return engine


class _Completed:
    """Completions in their order, as they end in any other."""

    def __init__(
        self,
        prompts: int,
        copies: int,
        tokenizer: TextCodec | None,
        on_finished: OnFinished | None,
    ) -> None:
        self._groups: list[list[Completion | None]] = [[None] * copies for _ in range(prompts)]
        self._missing = [copies] * prompts
        self._tokenizer, self._on_finished = tokenizer, on_finished

    def by(self, engine: Engine) -> list[Completion]:
        """Run an engine until everything is completed."""
        while engine.has_unfinished_requests():
            self._add(engine.advance(_TOKENS_AT_ONCE))
        return [completion for n in range(len(self._groups)) for completion in self._of(n)]

    def _add(self, finished: Sequence[Drawn]) -> None:
        for sequence in finished:
            number = sequence.request.id
            self._groups[number][sequence.index] = self._completion(sequence)
            self._missing[number] -= 1
            if not self._missing[number] and self._on_finished is not None:
                self._on_finished(number, self._of(number))

    def _of(self, number: int) -> list[Completion]:
        return [completion for completion in self._groups[number] if completion is not None]

    def _completion(self, sequence: Drawn) -> Completion:
        assert sequence.tokens is not None and sequence.finish_reason is not None
        token_ids, logprobs, sampling_logprobs = sequence.tokens.since(0)
        text = None
        if sequence.reader is not None:
            text = sequence.reader.text
        elif self._tokenizer is not None:
            text = self._tokenizer.decode(token_ids)
        return Completion(token_ids, logprobs, sampling_logprobs, sequence.finish_reason, text)


def _lengths(max_new_tokens: int | Sequence[int], prompts: int) -> list[int]:
    """The longest completion of each prompt."""
    if isinstance(max_new_tokens, int):
        return [max_new_tokens] * prompts
    if len(max_new_tokens) != prompts:
        raise ValueError(
            f"max_new_tokens: expected a number or {prompts} (prompts), found {len(max_new_tokens)}"
        )
    return list(max_new_tokens)


def _streams(
    seed: int | None, request_ids: Sequence[int] | None, prompts: int, copies: int
) -> list[list[int]]:
    """The keys of the random streams of each prompt's completions."""
    if request_ids is None:
        request_ids = range(prompts)
    if len(request_ids) != prompts:
        raise ValueError(f"request_ids: expected {prompts} (prompts), found {len(request_ids)}")
    if seed is None:
        seed = int(torch.randint(1 << 62, ()))
    ids = torch.tensor(list(request_ids), dtype=torch.int64).repeat_interleave(copies)
    keys = random_keys(seed, ids, torch.arange(copies).repeat(prompts))
    return keys.view(prompts, copies).tolist()

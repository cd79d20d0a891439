"""`fastllm generate`: completions of prompts, streamed, as records, or the best of several."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from .folder import check_file
from .infer import arithmetic, load, written
from .options import UsageError

if TYPE_CHECKING:
    from fastllm.data.encoding import EncodedPrompt
    from fastllm.data.tokenizer import Tokenizer
    from fastllm.generation import Completion, SamplingParams, Stats
    from fastllm.training.selection import Judge

DEFAULT_NEW_TOKENS = 128
# Completions wait for the reward model until they fill a pass of it.
SCORED_TOKENS = 16384
SAMPLING = (
    *("temperature", "top_k", "top_p", "min_p", "repetition_penalty"),
    *("min_new_tokens", "max_new_tokens", "num_return_sequences"),
)


def generate(values: dict[str, Any]) -> int:
    """Sample completions of --prompt or of the prompts of --data."""
    out, streamed = values.get("out"), values.get("stream", False)
    _check(values)
    check_file(out, overwrite=values.get("overwrite", False))
    from fastllm.data import encode_prompts, prompt_records
    from fastllm.generation import Stats
    from fastllm.model import Transformer

    params = _params(values)
    model, tokenizer = load(values, Transformer)
    source = values["prompt"] if "prompt" in values else values["data"]
    prompts, _ = encode_prompts(prompt_records(source, "--prompt"), tokenizer)
    if streamed:
        _print_summary(_stream(model, tokenizer, prompts[0], params, values))
        return 0
    judge, stats = _judge(values, tokenizer), Stats()
    with written(out) as file:
        show = _show if file is None else lambda record: print(_line(record), file=file, flush=True)
        records = Records(prompts, judge, values.get("best", False), show)
        _sample(model, tokenizer, prompts, params, values, records.add, stats)
        records.finish()
    _print_summary(stats)
    return 0


class Records:
    """Turns completions into records, and hands these on in the order of the prompts.

    Args:
        prompts: what is completed.
        judge: scores completions, some passes after they have ended; None for no scores.
        best: keep only the best completion of each prompt.
        write: takes a record.
    """

    def __init__(
        self,
        prompts: Sequence[EncodedPrompt],
        judge: Judge | None,
        best: bool,
        write: Callable[[dict[str, Any]], None],
    ) -> None:
        self._prompts, self._judge, self._best, self._write = prompts, judge, best, write
        self._unscored: list[tuple[int, list[Completion]]] = []
        self._unscored_tokens = 0
        self._ready: dict[int, list[dict[str, Any]]] = {}
        self._next = 0

    def add(self, index: int, completions: list[Completion]) -> None:
        """The completions of prompt `index` have ended."""
        if self._judge is None:
            self._settle(index, [(completion, None) for completion in completions])
            return
        self._unscored.append((index, completions))
        self._unscored_tokens += sum(len(completion.token_ids) for completion in completions)
        if self._unscored_tokens >= SCORED_TOKENS:
            self.finish()

    def finish(self) -> None:
        """Score what waits for it."""
        waiting, self._unscored, self._unscored_tokens = self._unscored, [], 0
        if self._judge is None or not waiting:
            return
        prompts = [self._prompts[index] for index, group in waiting for _ in group]
        scores = iter(self._judge(prompts, [c for _, group in waiting for c in group]))
        for index, group in waiting:
            scored = [(completion, next(scores)) for completion in group]
            self._settle(index, [max(scored, key=lambda pair: pair[1])] if self._best else scored)

    def _settle(self, index: int, scored: Sequence[tuple[Completion, float | None]]) -> None:
        self._ready[index] = [_record(self._prompts[index], *pair) for pair in scored]
        while self._next in self._ready:
            for record in self._ready.pop(self._next):
                self._write(record)
            self._next += 1


def _check(values: dict[str, Any]) -> None:
    if ("prompt" in values) == ("data" in values):
        raise UsageError("generate needs either --prompt or --data")
    if values.get("best") and "reward_model" not in values:
        raise UsageError("--best needs --reward_model, which says what is best")
    if values.get("cache_gb") is not None and values["cache_gb"] <= 0:
        raise UsageError(f"--cache_gb: expected more than 0, found {values['cache_gb']}")
    if values.get("stream"):
        several = values.get("num_return_sequences", 1) != 1
        if len(values.get("prompt", ())) != 1 or several:
            raise UsageError("--stream shows one completion of one --prompt as it is drawn")
        for name in ("out", "reward_model"):
            if name in values:
                raise UsageError(f"--stream prints to the terminal: it goes without --{name}")


def _params(values: dict[str, Any]) -> SamplingParams:
    from fastllm.generation import SamplingParams

    given = {name: values[name] for name in SAMPLING if values.get(name) is not None}
    if "max_new_tokens" not in given:
        given["max_new_tokens"] = max(DEFAULT_NEW_TOKENS, given.get("min_new_tokens", 0))
    return SamplingParams(**given, stop_strings=values.get("stop", ()), seed=values.get("seed", 0))


def _judge(values: dict[str, Any], tokenizer: Tokenizer) -> Judge | None:
    if "reward_model" not in values:
        return None
    from fastllm.training.selection import Judge

    return Judge(values["reward_model"], tokenizer, *arithmetic(values))


def _sample(
    model: Any,
    tokenizer: Tokenizer,
    prompts: Sequence[EncodedPrompt],
    params: SamplingParams,
    values: dict[str, Any],
    on_finished: Callable[[int, list[Completion]], None],
    stats: Stats,
) -> None:
    from fastllm.generation import generate as sample

    sample(
        model,
        [prompt.input_ids for prompt in prompts],
        [_new_tokens(model, prompt, params, values) for prompt in prompts],
        params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty,
        min_new_tokens=params.min_new_tokens,
        num_return_sequences=params.num_return_sequences,
        stop_strings=params.stop_strings,
        seed=params.seed,
        tokenizer=tokenizer,
        on_finished=on_finished,
        stats=stats,
        **_engine_options(values),
    )


def _stream(
    model: Any,
    tokenizer: Tokenizer,
    prompt: EncodedPrompt,
    params: SamplingParams,
    values: dict[str, Any],
) -> Stats:
    from dataclasses import replace

    from fastllm.generation import Engine

    engine = Engine(model, tokenizer, max_batch_size=1, **_engine_options(values))
    params = replace(params, max_new_tokens=_new_tokens(model, prompt, params, values))
    if isinstance(prompt.prompt, str):
        print(prompt.prompt, end="", flush=True)
    for output in engine.stream(prompt.input_ids, params):
        print(output.text, end="", flush=True)
    print()
    return engine.stats


def _new_tokens(
    model: Any, prompt: EncodedPrompt, params: SamplingParams, values: dict[str, Any]
) -> int:
    """What was asked for; by default what the model's positions leave after the prompt."""
    if values.get("max_new_tokens") is not None:
        return params.max_new_tokens
    room = model.config.max_position_embeddings - len(prompt.input_ids)
    return max(1, min(params.max_new_tokens, room))


def _engine_options(values: dict[str, Any]) -> dict[str, Any]:
    gigabytes = values.get("cache_gb")
    return {
        "weights": values.get("weights", "auto"),
        "cache_bytes": None if gigabytes is None else int(gigabytes * 1e9),
    }


def _record(prompt: EncodedPrompt, completion: Completion, score: float | None) -> dict[str, Any]:
    return {
        **prompt.columns,
        "prompt": prompt.prompt,
        "completion": completion.text,
        "logprob": sum(completion.logprobs),
        "finish_reason": completion.finish_reason,
        **({} if score is None else {"score": score}),
    }


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False)


def _show(record: dict[str, Any]) -> None:
    text = isinstance(record["prompt"], str)
    print(f"{record['prompt']}{record['completion']}" if text else record)


def _print_summary(stats: Stats) -> None:
    parts = [
        f"{name} {tokens:,} tokens in {seconds:.2f} s ({tokens / max(seconds, 1e-9):,.0f} tokens/s)"
        for name, tokens, seconds in (
            ("prefill:", stats.prefill_tokens, stats.prefill_seconds),
            ("decoding:", stats.decode_tokens, stats.decode_seconds),
        )
    ]
    print("; ".join(parts), file=sys.stderr)

"""`fastllm generate` and `fastllm score`."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from .folder import check_file
from .log import start_log
from .options import UsageError
from .summary import print_table

if TYPE_CHECKING:
    from fastllm.data.encoding import EncodedPrompt
    from fastllm.data.tokenizer import Tokenizer

DEFAULT_NEW_TOKENS = 128
PROMPTS_AT_ONCE = 256


def generate(values: dict[str, Any]) -> int:
    """Sample completions of --prompt or of the prompts of --data."""
    out = values.get("out")
    if ("prompt" in values) == ("data" in values):
        raise UsageError("generate needs either --prompt or --data")
    check_file(out, overwrite=values.get("overwrite", False))
    from fastllm.data import encode_prompts, prompt_records
    from fastllm.model import Transformer

    model, tokenizer = _load(values, Transformer)
    source = values["prompt"] if "prompt" in values else values["data"]
    prompts, _ = encode_prompts(prompt_records(source, "--prompt"), tokenizer)
    started, tokens = time.perf_counter(), 0
    with _writer(out) as file:
        for record, length in _completions(model, tokenizer, prompts, values):
            tokens += length
            if file is not None:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
            else:
                print(f"{record['prompt']}{record['completion']}" if _is_text(record) else record)
    seconds = time.perf_counter() - started
    print(f"{tokens:,} tokens, {tokens / seconds:,.0f} tokens/s", file=sys.stderr)
    return 0


def _completions(
    model: Any, tokenizer: Tokenizer, prompts: list[EncodedPrompt], values: dict[str, Any]
) -> Iterator[tuple[dict[str, Any], int]]:
    """A record and the number of new tokens for each completion, prompt by prompt."""
    from fastllm.generation import generate as sample

    names = ("temperature", "top_k", "top_p", "num_return_sequences")
    options = {name: values[name] for name in names if name in values}
    options["min_p"] = values.get("min_p") or 0.0
    copies = values.get("num_return_sequences", 1)
    for first in range(0, len(prompts), PROMPTS_AT_ONCE):
        chunk = prompts[first : first + PROMPTS_AT_ONCE]
        new_tokens = values.get("max_new_tokens") or _room(model, chunk)
        drawn = sample(
            model,
            [prompt.input_ids for prompt in chunk],
            new_tokens,
            seed=values.get("seed", 0),
            # A prompt's random numbers follow its place in the file, not its chunk.
            request_ids=range(first, first + len(chunk)),
            **options,
        )
        for index, completion in enumerate(drawn):
            prompt = chunk[index // copies]
            record = {
                **prompt.columns,
                "prompt": prompt.prompt,
                "completion": tokenizer.decode(completion.token_ids),
                "logprob": sum(completion.logprobs),
                "finish_reason": completion.finish_reason,
            }
            yield record, len(completion.token_ids)


def _room(model: Any, prompts: list[EncodedPrompt]) -> int:
    """What the model's positions leave after the longest prompt, within the default."""
    longest = max(len(prompt.input_ids) for prompt in prompts)
    return max(1, min(DEFAULT_NEW_TOKENS, model.config.max_position_embeddings - longest))


def _is_text(record: dict[str, Any]) -> bool:
    return isinstance(record["prompt"], str)


def score(values: dict[str, Any]) -> int:
    """Score the records of --data with a reward model."""
    out, data = values.get("out"), values["data"]
    check_file(out, overwrite=values.get("overwrite", False))
    from fastllm.data import read_records
    from fastllm.model import RewardModel

    from .scoring import score_pairs, score_texts

    records = read_records(data)
    model, tokenizer = _load(values, RewardModel)
    size = values.get("batch_size", 32)
    if size < 1:
        raise UsageError(f"--batch_size: expected at least 1, found {size}")
    paired = any("chosen" in name for name in records[0])
    started = time.perf_counter()
    if paired:
        scores = score_pairs(model, tokenizer, records, size)
    else:
        scores = score_texts(model, tokenizer, records, size)
    seconds = time.perf_counter() - started
    with _writer(out) as file:
        for record, columns in zip(records, scores, strict=True):
            if file is not None:
                file.write(json.dumps({**record, **columns}, ensure_ascii=False) + "\n")
    samples = len(scores) * (2 if paired else 1)
    print_table([*_means(scores), ("samples/s", f"{samples / seconds:,.1f} ({samples:,} samples)")])
    return 0


def _means(scores: list[dict[str, float]]) -> list[tuple[str, str]]:
    """Mean scores and, for pairs, how many are ranked right."""
    rows = [
        (f"mean {name}", f"{sum(row[name] for row in scores) / len(scores):.4f}")
        for name in scores[0]
    ]
    if "chosen_score" in scores[0]:
        right = sum(row["chosen_score"] > row["rejected_score"] for row in scores)
        share = f"{right / len(scores):.4f} ({right:,} of {len(scores):,} pairs)"
        rows.append(("accuracy", share))
    return rows


def _load(values: dict[str, Any], kind: type) -> tuple[Any, Tokenizer]:
    """The model of --model on --device in --dtype, and its tokenizer."""
    from fastllm.data import choose_tokenizer
    from fastllm.model import weights
    from fastllm.training.config import TrainingConfig
    from fastllm.training.devices import pick_device, pick_dtype
    from fastllm.training.start import tokenizer_of

    start_log()
    wanted = {name: values[name] for name in ("device", "dtype") if name in values}
    config = TrainingConfig(**wanted)
    device = pick_device(config)
    path = values["model"]
    model = weights.load_model(path, kind, dtype=pick_dtype(config, device), device=device)
    given = values.get("tokenizer")
    return model, tokenizer_of(path) if given is None else choose_tokenizer(given)


@contextmanager
def _writer(path: Path | None) -> Iterator[TextIO | None]:
    if path is None:
        yield None
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        yield file
    print(f"written to {path}", file=sys.stderr)

"""Models that answer: `fastllm score`, and what it shares with `fastllm generate`."""

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
    import torch

    from fastllm.data.tokenizer import Tokenizer


def score(values: dict[str, Any]) -> int:
    """Score the records of --data with a reward model."""
    out, data = values.get("out"), values["data"]
    check_file(out, overwrite=values.get("overwrite", False))
    from fastllm.data import read_records
    from fastllm.model import RewardModel

    from .scoring import score_pairs, score_texts

    records = read_records(data)
    model, tokenizer = load(values, RewardModel)
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
    with written(out) as file:
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


def load(values: dict[str, Any], kind: type) -> tuple[Any, Tokenizer]:
    """The model of --model on --device in --dtype, and its tokenizer."""
    from fastllm.data import choose_tokenizer
    from fastllm.model import weights
    from fastllm.training.start import tokenizer_of

    start_log()
    device, dtype = arithmetic(values)
    path = values["model"]
    model = weights.load_model(path, kind, dtype=dtype, device=device)
    given = values.get("tokenizer")
    return model, tokenizer_of(path) if given is None else choose_tokenizer(given)


def arithmetic(values: dict[str, Any]) -> tuple[torch.device, torch.dtype]:
    """What --device and --dtype say, or what is best here."""
    from fastllm.training.config import TrainingConfig
    from fastllm.training.devices import pick_device, pick_dtype

    wanted = {name: values[name] for name in ("device", "dtype") if name in values}
    config = TrainingConfig(**wanted)
    device = pick_device(config)
    return device, pick_dtype(config, device)


@contextmanager
def written(path: Path | None) -> Iterator[TextIO | None]:
    """A file that has its name only when it is whole; until then it is a .part file."""
    if path is None:
        yield None
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    with part.open("w", encoding="utf-8") as file:
        yield file
    part.replace(path)
    print(f"written to {path}", file=sys.stderr)

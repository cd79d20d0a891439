"""The reference configuration by itself: 4 layers x 128, 4 heads, 8 pairs of 256 tokens.

`python -m bench.steps.reward_model` prints optimizer steps/s and scored samples/s (median and
range of five blocks) and the peak memory of the process. All sequences are full and share no
beginning, so the packed layout wins nothing here: this is the bare speed of the step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch

from bench import machine
from bench.options import Options
from bench.steps import material
from bench.steps.turns import peak_mb
from fastllm import RewardConfig, RewardModel, RewardTrainer, Tokenizer

PAIRS, LENGTH, BATCH = 8, 256, 32
BLOCKS = 5


def main() -> None:
    """Measure and print a table and one line of JSON."""
    parser = argparse.ArgumentParser(prog="python -m bench.steps.reward_model")
    parser.add_argument("--steps", type=int, default=20, help="steps in a block")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's choice)")
    parser.add_argument("--dtype", default="fp32", choices=("fp32", "bf16"))
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as name:
        model = material.reward_model(
            Path(name) / "model", material.SMALL, Tokenizer.bytes(), LENGTH
        )
        steps = _summary(training_speed(model, f"{name}/run", options.steps, options.dtype))
        samples = _summary(scoring_speed(model))
    record = {
        **machine.describe(Options(threads=torch.get_num_threads(), malloc="as inherited")),
        "dtype": options.dtype,
        "steps_per_s": steps,
        "samples_per_s": samples,
        "peak_rss_mb": peak_mb(),
    }
    print(f"training  {_shown(steps)} steps/s")
    print(f"scoring   {_shown(samples)} samples/s (batch {BATCH})")
    print(f"memory    {record['peak_rss_mb']:.0f} MB at most, PyTorch's own included")
    print(json.dumps(record))


def training_speed(model: str, folder: str, steps: int, dtype: str) -> list[float]:
    """Optimizer steps per second of each block of `steps`, after one block of warm-up."""
    stamps: list[float] = []

    class Clock:
        def on_step_end(self, *_: object, **__: object) -> None:
            stamps.append(time.perf_counter())

    args = RewardConfig(
        output_dir=folder,
        use_cpu=True,
        per_device_train_batch_size=PAIRS,
        max_steps=steps * (BLOCKS + 1),
        save_strategy="no",
        lr_scheduler_type="constant",
        learning_rate=1e-3,
        logging_steps=10_000,
        dtype=dtype,
        disable_tqdm=True,
    )
    records = material.pairs(64, LENGTH)
    RewardTrainer(model, args, train_dataset=records, callbacks=[Clock()]).train()
    marks = stamps[steps - 1 :: steps]
    return [steps / (b - a) for a, b in pairwise(marks)]


def scoring_speed(folder: str) -> list[float]:
    """Scored sequences per second of each block."""
    model = RewardModel.from_pretrained(folder).eval()
    ids = torch.tensor(material.sequences(BATCH, LENGTH))
    with torch.no_grad():
        return [BATCH / _seconds(lambda: model(ids)) for _ in range(BLOCKS + 1)][1:]


def _seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def _summary(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def _shown(summary: dict[str, float]) -> str:
    return f"{summary['median']:8.2f}  [{summary['min']:.2f} to {summary['max']:.2f}]"


if __name__ == "__main__":
    main()

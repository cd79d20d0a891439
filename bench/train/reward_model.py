"""The reference configuration: 4 layers x 128, 4 heads, 8 pairs of 256 tokens, fp32.

`python -m bench.train.reward_model` prints optimizer steps/s and scored samples/s (median and
range of five blocks) and the peak memory of the process. All sequences are full and share no
beginning, so the packed layout wins nothing here: this is the bare speed of the step.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise

import torch

from bench import harness
from fastllm import ModelConfig, RewardConfig, RewardTrainer, Tokenizer

PAIRS, LENGTH, LAYERS, WIDTH, HEADS, KV_HEADS = 8, 256, 4, 128, 4, 2
BLOCKS = 5


def main() -> None:
    """Measure and print a table and one line of JSON."""
    parser = argparse.ArgumentParser(prog="python -m bench.train.reward_model")
    parser.add_argument("--steps", type=int, default=20, help="steps in a block")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's choice)")
    parser.add_argument("--dtype", default="fp32", choices=("fp32", "bf16"))
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    steps = _summary(training_speed(options.steps, options.dtype))
    samples = _summary(scoring_speed())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    record = {
        **harness.environment(torch.device("cpu")),
        "dtype": options.dtype,
        "steps_per_s": steps,
        "samples_per_s": samples,
        "peak_rss_mb": peak,
    }
    print(f"training  {_shown(steps)} steps/s")
    print(f"scoring   {_shown(samples)} samples/s (batch 32)")
    print(f"memory    {peak:.0f} MB at most, PyTorch's own included")
    print(json.dumps(record))


def training_speed(steps: int, dtype: str) -> list[float]:
    """Optimizer steps per second of each block of `steps`, after one block of warm-up."""
    stamps: list[float] = []

    class Clock:
        def on_step_end(self, *_: object, **__: object) -> None:
            stamps.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        args = RewardConfig(
            output_dir=folder,
            per_device_train_batch_size=PAIRS,
            max_steps=steps * (BLOCKS + 1),
            save_strategy="no",
            lr_scheduler_type="constant",
            logging_steps=10_000,
            dtype=dtype,
            disable_tqdm=True,
        )
        config, tokenizer = _model()
        trainer = RewardTrainer(
            config,
            args,
            train_dataset=_pairs(64),
            processing_class=tokenizer,
            callbacks=[Clock()],
        )
        trainer.train()
    marks = stamps[steps - 1 :: steps]
    return [steps / (b - a) for a, b in pairwise(marks)]


def scoring_speed(batch: int = 32) -> list[float]:
    """Scored sequences per second of each block."""
    from fastllm import RewardModel

    model = RewardModel(_model()[0]).eval()
    ids = torch.randint(4, 259, (batch, LENGTH))
    with torch.no_grad():
        return [batch / _seconds(lambda: model(ids)) for _ in range(BLOCKS + 1)][1:]


def _model() -> tuple[ModelConfig, Tokenizer]:
    tokenizer = Tokenizer.bytes()
    config = ModelConfig.scratch(
        vocab_size=tokenizer.vocab_size,
        n_layer=LAYERS,
        n_head=HEADS,
        n_kv_head=KV_HEADS,
        n_embd=WIDTH,
        block_size=LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return config, tokenizer


def _pairs(count: int) -> list[dict[str, list[int]]]:
    """Full sequences whose first tokens differ, so that nothing is shared."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(8, 259, (count, 2, LENGTH), generator=generator)
    ids[:, 0, 0], ids[:, 1, 0] = 4, 5
    return [{"chosen_ids": a, "rejected_ids": b} for a, b in ids.tolist()]


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

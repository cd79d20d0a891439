"""This project's side: a worker that trains, scores or generates with fastllm.

`python -m bench.steps.ours FOLDER SETTINGS` reads the case from the folder (see `material`); the
settings, JSON, say which of the project's ways to take.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from bench import roofline
from bench.steps import completions, group_pass
from bench.steps.job import Job, letters
from bench.steps.turns import Block, Ended, Line, Result, Turns, serve
from fastllm import (
    GRPOConfig,
    GRPOTrainer,
    RewardConfig,
    RewardModel,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
    Transformer,
)
from fastllm.data.packing import pack_pairs


def main() -> None:
    """Run the job until the parent has enough."""
    line, job = Line(), Job.read(Path(sys.argv[1]), json.loads(sys.argv[2]))
    torch.set_num_threads(job.threads)
    try:
        if job.kind in TRAINERS:
            with tempfile.TemporaryDirectory() as scratch:
                TRAINERS[job.kind](line, job, scratch).train()
        else:
            with torch.set_grad_enabled(job.kind == "group_pass"):
                serve(line, BLOCKS[job.kind](job))
    except Ended:
        pass


def reward_trainer(line: Line, job: Job, scratch: str) -> RewardTrainer:
    return RewardTrainer(
        job.model,
        RewardConfig(**_arguments(job, scratch), max_length=job.max_length),
        train_dataset=job.records,
        callbacks=[Turns(line)],
    )


def sft_trainer(line: Line, job: Job, scratch: str) -> SFTTrainer:
    return SFTTrainer(
        job.model,
        SFTConfig(**_arguments(job, scratch), max_length=job.max_length),
        train_dataset=job.records,
        callbacks=[Turns(line)],
    )


def grpo_trainer(line: Line, job: Job, scratch: str) -> GRPOTrainer:
    return GRPOTrainer(
        job.model,
        job.reward_model or letters,
        GRPOConfig(
            **_arguments(job, scratch),
            num_generations=job.group,
            max_completion_length=job.new_tokens,
            shuffle_dataset=False,
        ),
        train_dataset=job.records,
        callbacks=[Turns(line, ("reward", "completions/mean_length"), _logged_parts)],
    )


def score(job: Job) -> Block:
    """Sequences of one length, as a batch."""
    model = RewardModel.from_pretrained(job.model).eval()
    _compute_in(model, job)
    ids = torch.tensor([record["ids"] for record in job.records])

    def block(count: int) -> list[float]:
        for _ in range(count):
            scores = model(ids)
        return scores.tolist()

    return block


def score_pairs(job: Job) -> Block:
    """Pairs of real lengths, as `fastllm score` reads them: packed, what two share once."""
    model = RewardModel.from_pretrained(job.model).eval()
    _compute_in(model, job)
    pad = model.config.pad_token_id

    def scores(pairs: Sequence[dict[str, list[int]]]) -> list[float]:
        sides = [(pair["chosen_ids"], pair["rejected_ids"]) for pair in pairs]
        batch = pack_pairs(sides, pad_token_id=pad)
        found = model.score_rows(batch.input_ids, batch.layout, batch.rows)
        return torch.cat([found[batch.chosen], found[batch.rejected]]).tolist()

    batches = job.batches(job.records)

    def block(count: int) -> list[float]:
        found = [scores(next(batches)) for _ in range(count)]
        return found[-1]

    return block


def generate(job: Job) -> Block:
    """Greedy completions, or a read of what their token steps have to read."""
    if "read" in job.settings:
        return reading(job)
    model = Transformer.from_pretrained(job.model).eval()
    _compute_in(model, job)
    return completions.generate(job, model)


def reading(job: Job) -> Block:
    """The memory limit in turns with the contenders: its rate changes from minute to minute."""
    pool = ThreadPoolExecutor(job.threads)
    read = roofline.reading(job.settings["read"], job.threads, pool)

    def block(count: int) -> Result:
        started = time.perf_counter()
        for _ in range(count * job.settings["times"]):
            read()
        seconds = time.perf_counter() - started
        return Result([0.0], seconds, {"decoding": seconds})

    return block


# The parts of a GRPO step, and what the trainer calls them.
PARTS = {"prefill": "prefill", "decoding": "decode", "scoring": "reward", "training": "train"}

TRAINERS: dict[str, Any] = {"rm": reward_trainer, "sft": sft_trainer, "grpo": grpo_trainer}
BLOCKS = {
    "score": score,
    "score_pairs": score_pairs,
    "generate": generate,
    "group_pass": group_pass.group_pass,
}


def _arguments(job: Job, scratch: str) -> dict[str, Any]:
    return {
        "output_dir": scratch,
        "use_cpu": True,
        "per_device_train_batch_size": job.batch // job.passes,
        "gradient_accumulation_steps": job.passes,
        "max_steps": job.endless,
        "learning_rate": job.learning_rate,
        "lr_scheduler_type": "constant",
        "logging_steps": job.endless,
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": job.seed,
        **job.settings,
    }


def _logged_parts(log: dict[str, Any], steps: int, seconds: float) -> dict[str, float]:
    """The parts of GRPO steps, of which the trainer logs the mean over the steps."""
    found = {part: log[f"time/{name}"] * steps for part, name in PARTS.items()}
    return found | {"rest": seconds - sum(found.values())}


def _compute_in(model: Any, job: Job) -> None:
    dtype = job.settings.get("dtype", "fp32")
    model.model.compute_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]


if __name__ == "__main__":
    main()

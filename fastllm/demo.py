"""The main job on generated tasks: SFT, a reward model, and GRPO with a verifier and without.

The demonstrations are those of a careless teacher: most of them take a short cut that is often
wrong. SFT learns to imitate the mixture. A verifier (or a reward model that learned from
preferences which of two answers is right) then lets GRPO find what the teacher did not teach.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .data.tasks import (
    Task,
    check,
    demonstrations,
    exact_match,
    generate_tasks,
    grpo_prompts,
    preference_pairs,
)
from .data.tokenizer import Tokenizer
from .generation import generate
from .model.transformer import Transformer
from .training.grpo import train_grpo
from .training.logging import read_metrics
from .training.rm import train_rm
from .training.sft import train_sft

# Sums are left out: to check them, a model this small needs more than these minutes.
KINDS = ("max", "copy", "rev", "sort")
LEVELS = (1, 2)
CARELESS = 0.6
HELDOUT = 500
SLIPS = 5  # wrong answers to each practice task
MAX_ANSWER = 12  # tokens


@dataclass(frozen=True)
class Budget:
    """How much of everything."""

    demonstrations: int = 16_000
    prompts: int = 30_000
    sft_steps: int = 600
    rm_steps: int = 3000
    grpo_steps: int = 100


QUICK = Budget(demonstrations=400, prompts=400, sft_steps=30, rm_steps=20, grpo_steps=4)


@dataclass(frozen=True)
class Stage:
    """One line of the table."""

    name: str
    figure: str
    value: float
    seconds: float
    tokens_per_second: float


def run_demo(out_dir: str | Path, seed: int = 0, quick: bool = False) -> dict[str, Any]:
    """Train all stages under `out_dir`, print the table and return its figures.

    Args:
        out_dir: run folders `sft`, `rm`, `grpo_verifier` and `grpo_reward_model` go here.
        seed: of the data, the models and the sampling.
        quick: a few steps of each stage, to see that everything runs.

    Returns:
        The figures, also written to `out_dir/demo.json`.
    """
    out, budget = Path(out_dir), QUICK if quick else Budget()
    stages = _train(out, seed, budget)
    figures = _figures(stages, seed)
    (out / "demo.json").write_text(json.dumps(figures, indent=2) + "\n")
    _print_table(stages, figures, out)
    return figures


def _train(out: Path, seed: int, budget: Budget) -> list[Stage]:
    teach = generate_tasks(budget.demonstrations, seed, LEVELS, KINDS)
    practice = generate_tasks(budget.prompts, seed + 1, LEVELS, KINDS)
    held = generate_tasks(HELDOUT, seed + 2, LEVELS, KINDS, split="heldout")
    common: dict[str, Any] = {"seed": seed, "save_strategy": "no", "overwrite_output_dir": True}

    def sft() -> float:
        policy = train_sft(
            demonstrations(teach, CARELESS, seed),
            out / "sft",
            tokenizer="bytes",
            block_size=64,
            steps=budget.sft_steps,
            batch_size=128,
            lr=3e-3,
            lr_scheduler_type="cosine",
            warmup_steps=0.05,
            logging_steps=100,
            **common,
        )
        return held_out_exact_match(policy, held)

    def reward_model() -> float:
        train_rm(
            preference_pairs(practice * SLIPS, seed, CARELESS),
            out / "rm",
            model=out / "sft",
            eval_pairs=preference_pairs(held, seed, CARELESS),
            steps=budget.rm_steps,
            batch_size=64,
            lr=1e-3,
            lr_scheduler_type="cosine",
            warmup_steps=0.05,
            logging_steps=100,
            per_device_eval_batch_size=128,
            **common,
        )
        return read_metrics(out / "rm")[-1]["eval_accuracy"]

    def grpo(folder: Path, **settings: Any) -> float:
        policy = train_grpo(
            out / "sft",
            out_dir=folder,
            prompts=grpo_prompts(practice),
            steps=budget.grpo_steps,
            batch_size=256,
            lr=2e-4,
            lr_scheduler_type="constant",
            max_completion_length=MAX_ANSWER,
            logging_steps=20,
            **settings,
            **common,
        )
        return held_out_exact_match(policy, held)

    def with_verifier() -> float:
        return grpo(out / "grpo_verifier", reward_funcs=exact_match)

    def with_reward_model() -> float:
        # The reward model is only right near what it was trained on: the KL term keeps the
        # policy from answers that please it and are wrong.
        return grpo(out / "grpo_reward_model", reward_ckpt=out / "rm", beta=0.5)

    match, accuracy = "held-out exact match", "held-out accuracy"
    return [
        _timed("SFT", match, out / "sft", sft),
        _timed("reward model", accuracy, out / "rm", reward_model),
        _timed("GRPO, verifier", match, out / "grpo_verifier", with_verifier),
        _timed("GRPO, reward model", match, out / "grpo_reward_model", with_reward_model),
    ]


def held_out_exact_match(policy: Transformer, tasks: Sequence[Task]) -> float:
    """Share of tasks that greedy decoding answers exactly."""
    tokenizer = Tokenizer.bytes()
    prompts = [tokenizer.encode(task.prompt) for task in tasks]
    completions = generate(policy, prompts, MAX_ANSWER, temperature=0.0)
    texts = tokenizer.decode_batch([c.token_ids for c in completions])
    return sum(map(check, tasks, texts)) / len(tasks)


def _timed(name: str, figure: str, folder: Path, run: Callable[[], float]) -> Stage:
    started = time.perf_counter()
    value = run()
    seconds = time.perf_counter() - started
    tokens = max(line.get("num_tokens", 0) for line in read_metrics(folder))
    return Stage(name, figure, value, seconds, tokens / seconds)


def _figures(stages: Sequence[Stage], seed: int) -> dict[str, Any]:
    sft, reward_model, verifier, learned = stages
    return {
        "seed": seed,
        "exact_match_sft": sft.value,
        "accuracy_reward_model": reward_model.value,
        "exact_match_grpo_verifier": verifier.value,
        "exact_match_grpo_reward_model": learned.value,
        "training_seconds": sum(stage.seconds for stage in stages),
        "stages": [vars(stage) for stage in stages],
    }


def _print_table(stages: Sequence[Stage], figures: dict[str, Any], out: Path) -> None:
    before = figures["exact_match_sft"]
    print(f"\n{'stage':<20} {'figure':<22} {'value':>7} {'over SFT':>9} {'s':>6} {'tokens/s':>9}")
    for stage in stages:
        compares = stage.name.startswith("GRPO")
        gain = f"{100 * (stage.value - before):+.1f}" if compares else ""
        print(
            f"{stage.name:<20} {stage.figure:<22} {100 * stage.value:>6.1f}% {gain:>9} "
            f"{stage.seconds:>6.0f} {stage.tokens_per_second:>9,.0f}"
        )
    print(
        f"\n{HELDOUT} held-out tasks ({', '.join(KINDS)}), greedy answers; "
        f"training took {figures['training_seconds']:.0f} s; everything is in {out}"
    )

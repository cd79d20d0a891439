"""SFT, then a reward model, then GRPO: the three stages on one kind of task, in a minute or two."""

from __future__ import annotations

import argparse
from pathlib import Path

import fastllm
from fastllm.data import Tokenizer
from fastllm.data.tasks import (
    Task,
    check,
    demonstrations,
    exact_match,
    generate_tasks,
    grpo_prompts,
    preference_pairs,
)


def held_out_accuracy(folder: Path, tasks: list[Task]) -> float:
    """The part of the tasks whose greedy answer is exactly right."""
    model = fastllm.Transformer.from_pretrained(folder)
    tokenizer = Tokenizer.from_pretrained(folder)
    prompts = [tokenizer.encode(task.prompt) for task in tasks]
    answers = fastllm.generate(model, prompts, max_new_tokens=12, temperature=0.0)
    right = [
        check(task, tokenizer.decode(answer.token_ids))
        for task, answer in zip(tasks, answers, strict=True)
    ]
    return sum(right) / len(right)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sft-steps", type=int, default=300)
    parser.add_argument("--rm-steps", type=int, default=150)
    parser.add_argument("--grpo-steps", type=int, default=80)
    parser.add_argument("--out", type=Path, default=Path("runs/examples/full_pipeline"))
    options = parser.parse_args()
    out = options.out

    kinds = {"levels": (1, 2), "kinds": ("sort", "rev")}
    train = generate_tasks(6000, seed=0, **kinds)
    held = generate_tasks(200, seed=0, split="heldout", **kinds)
    shared = {
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.05,  # below 1: a part of all steps
        "save_strategy": "no",
        "overwrite_output_dir": True,
    }

    # The teacher is careless: half of the demonstrations take a short cut that is often wrong.
    fastllm.train_sft(
        demonstrations(train, careless=0.5, seed=0),
        out / "sft",
        steps=options.sft_steps,
        batch_size=64,
        block_size=64,
        lr=3e-3,
        **shared,
    )
    after_sft = held_out_accuracy(out / "sft", held)

    fastllm.train_rm(
        preference_pairs(train, seed=0),
        out / "rm",
        model=out / "sft",
        steps=options.rm_steps,
        batch_size=64,
        lr=1e-3,
        **shared,
    )

    # GRPO takes reward models and Python functions, alone or mixed.
    fastllm.train_grpo(
        out / "sft",
        reward_ckpt=out / "rm",
        reward_funcs=[exact_match],
        reward_weights=[0.1, 1.0],
        out_dir=out / "grpo",
        prompts=grpo_prompts(train),
        steps=options.grpo_steps,
        batch_size=256,
        num_generations=8,
        max_completion_length=8,
        lr=2e-4,
        **shared | {"lr_scheduler_type": "constant"},
    )
    after_grpo = held_out_accuracy(out / "grpo", held)
    print(f"held-out exact match: {after_sft:.1%} after SFT, {after_grpo:.1%} after GRPO")


if __name__ == "__main__":
    main()

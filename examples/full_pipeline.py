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
    parser.add_argument("--sft-steps", type=int, default=150)
    parser.add_argument("--rm-steps", type=int, default=150)
    parser.add_argument("--grpo-steps", type=int, default=60)
    parser.add_argument("--out", type=Path, default=Path("runs/examples/full_pipeline"))
    options = parser.parse_args()
    out = options.out

    kinds = {"levels": (1, 2), "kinds": ("copy", "rev", "sort")}
    train = generate_tasks(2000, seed=0, **kinds)
    held = generate_tasks(200, seed=0, split="heldout", **kinds)
    shared = {"overwrite_output_dir": True, "save_strategy": "no"}

    fastllm.train_sft(
        demonstrations(train), out / "sft", steps=options.sft_steps, batch_size=32,
        block_size=64, **shared,
    )  # fmt: skip
    fastllm.train_rm(
        preference_pairs(train, seed=0), out / "rm", steps=options.rm_steps, batch_size=32,
        block_size=64, **shared,
    )  # fmt: skip
    after_sft = held_out_accuracy(out / "sft", held)

    # GRPO takes reward models and Python functions, alone or mixed.
    fastllm.train_grpo(
        out / "sft",
        reward_ckpt=out / "rm",
        reward_funcs=[exact_match],
        reward_weights=[0.1, 1.0],
        out_dir=out / "grpo",
        prompts=grpo_prompts(train),
        steps=options.grpo_steps,
        batch_size=128,
        num_generations=8,
        max_completion_length=12,
        lr=5e-4,
        **shared,
    )
    after_grpo = held_out_accuracy(out / "grpo", held)
    print(f"held-out exact match: {after_sft:.1%} after SFT, {after_grpo:.1%} after GRPO")


if __name__ == "__main__":
    main()

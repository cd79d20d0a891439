"""A reward model step by step: records, a held-out part, training, a folder to load again."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from fastllm import RewardModel, train_rm
from fastllm.data import RewardDataCollator, Tokenizer, read_records
from fastllm.data.tasks import generate_tasks, preference_pairs

KINDS = ("sort", "copy", "count")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", help="preference pairs (.jsonl); default: generated ones")
    parser.add_argument("--pairs", type=int, default=4000, help="how many to generate")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--out", default="runs/examples/reward_model")
    options = parser.parse_args()

    # Records are dicts with `chosen` and `rejected`, and `prompt` where both continue one text.
    if options.data:
        pairs = read_records(options.data)
    else:
        pairs = preference_pairs(generate_tasks(options.pairs, seed=0, kinds=KINDS), seed=0)
    print(f"{len(pairs):,} pairs, for example {json.dumps(pairs[0])}")

    train_rm(
        pairs,
        options.out,
        steps=options.steps,
        batch_size=32,
        block_size=256,
        lr=2e-3,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,  # below 1: a part of all steps
        eval_fraction=0.1,  # split by prompt: no held-out prompt is trained on
        overwrite_output_dir=True,
    )

    lines = (Path(options.out) / "metrics.jsonl").read_text().splitlines()
    last = [line for line in map(json.loads, lines) if "eval_accuracy" in line][-1]
    print(f"held-out accuracy {last['eval_accuracy']:.1%}, margin {last['eval_margin']:.2f}")

    # The run folder is a Hugging Face folder; transformers' AutoModelForSequenceClassification
    # reads it too, with the same scores.
    model = RewardModel.from_pretrained(options.out)
    collator = RewardDataCollator(block_size=256, tokenizer=Tokenizer.from_pretrained(options.out))
    batch = collator(pairs[:8])
    with torch.no_grad():
        chosen = model(batch["chosen_ids"], batch["chosen_lengths"])
        rejected = model(batch["rejected_ids"], batch["rejected_lengths"])
    for pair, good, bad in zip(pairs, chosen.tolist(), rejected.tolist(), strict=False):
        print(
            f"{good:+.2f} {bad:+.2f}  {str(pair['chosen'])[:30]!r} {str(pair['rejected'])[:30]!r}"
        )


if __name__ == "__main__":
    main()

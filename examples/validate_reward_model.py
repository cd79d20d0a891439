"""Is a reward model any good? Accuracy on held-out pairs by kind, scores, and reloading."""

from __future__ import annotations

import argparse
import random
import tempfile
from collections import defaultdict
from pathlib import Path

import torch

from fastllm import RewardModel, train_rm
from fastllm.data import RewardDataCollator, Tokenizer
from fastllm.data.tasks import Task, generate_tasks, preference_pairs, wrong_answer

KINDS = ("sort", "copy", "count")


def scores(
    model: RewardModel, collator: RewardDataCollator, pairs: list[dict[str, str]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores of the chosen and of the rejected sides [P]."""
    batch = collator(pairs)
    with torch.no_grad():
        chosen = model(batch["chosen_ids"], batch["chosen_lengths"])
        return chosen, model(batch["rejected_ids"], batch["rejected_lengths"])


def report(tasks: list[Task], chosen: torch.Tensor, rejected: torch.Tensor) -> None:
    """Accuracy by kind of task, and how far apart the scores are."""
    by_kind: dict[str, list[bool]] = defaultdict(list)
    for task, right in zip(tasks, (chosen > rejected).tolist(), strict=True):
        by_kind[task.kind].append(right)
    for kind, results in sorted(by_kind.items()):
        print(f"  {kind:6} {sum(results) / len(results):6.1%} of {len(results)} pairs")
    accuracy = (chosen > rejected).float().mean().item()
    margin = (chosen - rejected).mean().item()
    print(f"  all    {accuracy:6.1%}, mean margin {margin:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a reward model; default: one is trained on the tasks")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--pairs", type=int, default=400, help="held-out pairs to check")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(options.model or scratch)
        if options.model is None:
            train = preference_pairs(generate_tasks(4000, seed=0, kinds=KINDS), seed=0)
            train_rm(
                train,
                folder,
                steps=options.steps,
                batch_size=32,
                block_size=64,
                lr=2e-3,
                lr_scheduler_type="cosine",
                warmup_steps=0.05,
            )
        model = RewardModel.from_pretrained(folder)
        collator = RewardDataCollator(block_size=64, tokenizer=Tokenizer.from_pretrained(folder))

        tasks = generate_tasks(options.pairs, seed=1, kinds=KINDS, split="heldout")
        pairs = preference_pairs(tasks, seed=1)
        chosen, rejected = scores(model, collator, pairs)
        print("held-out pairs, the right answer against a nearly right one:")
        report(tasks, chosen, rejected)

        rng = random.Random(0)
        both_wrong = [
            {"prompt": t.prompt, "chosen": wrong_answer(t, rng), "rejected": wrong_answer(t, rng)}
            for t in tasks
        ]
        first, second = scores(model, collator, both_wrong)
        print("both sides wrong, where there is nothing to prefer:")
        print(f"  mean margin {(first - second).mean().item():+.2f}, expected near 0")

        alone = torch.cat([scores(model, collator, [pair])[0] for pair in pairs[:32]])
        print(
            f"one pair at a time: scores differ by at most {(alone - chosen[:32]).abs().max():.1e}"
        )
        model.save_pretrained(Path(scratch) / "again")
        again = RewardModel.from_pretrained(Path(scratch) / "again")
        reloaded, _ = scores(again, collator, pairs)
        print(f"saved and loaded:   scores differ by at most {(reloaded - chosen).abs().max():.1e}")


if __name__ == "__main__":
    main()

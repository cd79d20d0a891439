"""A reward model in a few lines: train it on generated pairs, then ask it about two answers."""

from __future__ import annotations

import argparse

import torch

from fastllm.training.rm import (
    RewardDataCollator,
    create_dummy_preference_data,
    load_reward_model,
    train_rm,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", default="runs/examples/quick_rm")
    options = parser.parse_args()

    pairs = create_dummy_preference_data(n_pairs=2000)
    train_rm(
        pairs=pairs,
        out_dir=options.out,
        steps=options.steps,
        batch_size=32,
        block_size=64,
        overwrite_output_dir=True,
    )

    model = load_reward_model(f"{options.out}/model_final.pt")
    collator = RewardDataCollator(block_size=64)
    for prompt, right, wrong in (
        ("2+2=", "4", "5"),
        ("copy abc>", "abc", "abd"),
        ("rev abc>", "cba", "bca"),
    ):
        good_ids, bad_ids = collator.collate_pair(prompt, right, wrong)
        with torch.no_grad():
            good, bad = model(good_ids.unsqueeze(0)).item(), model(bad_ids.unsqueeze(0)).item()
        verdict = "right" if good > bad else "wrong"
        print(f"{prompt:12} {right!r}: {good:+.2f}   {wrong!r}: {bad:+.2f}   {verdict}")


if __name__ == "__main__":
    main()

"""A reward model in a few lines: train it on 100 generated pairs, load it, ask it for scores."""

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

    pairs = create_dummy_preference_data(n_pairs=100)
    train_rm(
        pairs=pairs,
        out_dir=options.out,
        steps=options.steps,
        batch_size=8,
        overwrite_output_dir=True,
    )

    model = load_reward_model(f"{options.out}/model_final.pt")
    collator = RewardDataCollator(block_size=256)
    right = 0
    for number, pair in enumerate(pairs):
        good_ids, bad_ids = collator.collate_pair(pair["prompt"], pair["chosen"], pair["rejected"])
        with torch.no_grad():
            good, bad = model(good_ids.unsqueeze(0)).item(), model(bad_ids.unsqueeze(0)).item()
        right += good > bad
        if number < 5:
            print(f"{pair['prompt']} {pair['chosen']}: {good:+.2f}, {pair['rejected']}: {bad:+.2f}")
    print(f"{right} of the {len(pairs)} pairs that it was trained on are ranked right.")
    print("examples/validate_reward_model.py asks what matters: pairs that it has not seen.")


if __name__ == "__main__":
    main()

"""A small reward model learns a preference that it can only know by having understood it."""

from __future__ import annotations

import pytest
import torch

from fastllm import train_rm
from fastllm.data.tasks import generate_tasks, preference_pairs
from fastllm.training.rm import RewardDataCollator


@pytest.mark.parametrize("seed", [1, 2])
def test_it_ranks_pairs_that_it_has_not_seen(tmp_path, metrics, seed):
    """Letters in order against letters nearly in order: chance is 50 %."""
    kinds = {"levels": (1,), "kinds": ["sort"]}
    seen = preference_pairs(generate_tasks(2000, seed, **kinds), seed)
    held = preference_pairs(generate_tasks(200, seed, split="heldout", **kinds), seed)
    assert not {p["prompt"] for p in seen} & {p["prompt"] for p in held}
    model = train_rm(
        seen, tmp_path / "run", steps=200, batch_size=32, lr=3e-3, n_layer=2, n_head=4, n_kv_head=2,
        n_embd=48, block_size=32, eval_pairs=held, device="cpu", save_strategy="no", seed=seed,
    )  # fmt: skip
    assert metrics(tmp_path / "run")[-1]["eval_accuracy"] > 0.8

    # The same through the collator and the padded forward pass, pair by pair as a user does it.
    collator = RewardDataCollator(block_size=32)
    batch = collator(held)
    with torch.no_grad():
        good = model(batch["chosen_ids"], batch["chosen_lengths"])
        bad = model(batch["rejected_ids"], batch["rejected_lengths"])
        first = collator.collate_pair(**held[0])
        alone = [model(ids[None])[0] for ids in first]
    accuracy = float((good > bad).float().mean())
    assert accuracy == pytest.approx(metrics(tmp_path / "run")[-1]["eval_accuracy"], abs=1e-6)
    torch.testing.assert_close(torch.stack(alone), torch.stack((good[0], bad[0])))

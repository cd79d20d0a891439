"""Two processes train as one does: the same step, cut into ranks with unlike token counts."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import fastllm

ROOT = Path(fastllm.__file__).parents[1]

# What each process runs: every kind of training, then a stop and a resumption, then a bad number
# on one rank alone.
WORKER = """
import json, os, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from fastllm import *
from fastllm.training import distributed
from fastllm.training.checkpoint import checkpoints
from fastllm.training.loop import NumericError

world = int(os.environ.get("WORLD_SIZE", "1"))
out = Path(sys.argv[1])
tokenizer = Tokenizer.bytes()
config = ModelConfig(
    vocab_size=260, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64, eos_token_id=2,
    pad_token_id=0, initializer_range=0.1,
)
items = [("q" * (i % 3), "yes" * (1 + i * i % 7)) for i in range(9)]  # the last step: one record
pairs = [("q" * (i % 3), str(i) * (1 + i % 4), "abcdefghi"[i]) for i in range(9)]
prompts = [{"prompt": str(i)} for i in range(5)]

def reward(completions, **_):  # some completions have none
    return [None if "e" in c else sum(x < "A" for x in c) / len(c or "x") for c in completions]

def build(kind, run, **options):
    common = dict(
        output_dir=str(out / run), use_cpu=True, learning_rate=0.01, max_steps=6, logging_steps=1,
        per_device_train_batch_size=8 // world, save_strategy="steps", save_steps=4,
    )
    if kind == "sft":
        return SFTTrainer(config, SFTConfig(**common | options), items, items[:3], tokenizer)
    if kind == "rm":
        return RewardTrainer(config, RewardConfig(**common | options), pairs, pairs[:3], tokenizer)
    sampling = dict(num_generations=2, max_completion_length=5)
    args = GRPOConfig(**common | sampling | options)
    return GRPOTrainer(config, reward, args, prompts, prompts[:1], tokenizer)

for kind in ("sft", "rm", "grpo"):
    build(kind, kind).train()
build("grpo", "masked", mask_truncated_completions=True, max_steps=2).train()
build("grpo", "grpo-buffer", scale_rewards="batch", num_iterations=2).train()
build("grpo", "grpo-tokens", max_tokens_per_pass=14, num_iterations=2, loss_type="bnpo").train()

def right_on_one_rank(completions, **_):  # the other has nothing to compute
    return [float(distributed.rank() == 0 and i % 2) for i in range(len(completions))]

some = build("grpo", "some", max_steps=3, per_device_train_batch_size=4, reward_batch_size=2)
some.rewards = type(some.rewards)([right_on_one_rank], None, tokenizer, some.device, some.dtype)
some.train()

replaced = build("grpo", "replaced", max_steps=2, dynamic_sampling_rounds=2)
replaced.rewards = type(some.rewards)([lambda completions, **_: [1.0] * len(completions)], None,
                                      tokenizer, some.device, some.dtype)
replaced.train()

class Kill:
    def on_step_begin(self, args, state, control, **_):
        if state.global_step == 5:
            raise KeyboardInterrupt

slow = dict(lr_scheduler_type="constant", logging_steps=3)
build("rm", "whole", **slow).train()
killed = build("rm", "killed", **slow)
killed.add_callback(Kill)
try:
    killed.train()
except KeyboardInterrupt:
    build("rm", "killed", **slow).train("auto")
build("sft", "twice").train()
build("sft", "twice", overwrite_output_dir=True, max_steps=1).train()

trainer = build("sft", "bad", save_steps=1)
original = trainer.loss
def loss(model, batch):
    value, metrics = original(model, batch)
    bad = trainer.state.global_step == 2 and distributed.rank() == world - 1
    return (value * float("nan") if bad else value), metrics
trainer.loss = loss
try:
    trainer.train()
    error = None
except NumericError as raised:
    error = str(raised)
weights = [float(p.double().sum()) for p in trainer.model.parameters()]
found = {"error": error, "weights": weights,
         "saved": [p.name for p in checkpoints(out / "bad")]}
(out / f"bad-{distributed.rank()}.json").write_text(json.dumps(found))
distributed.stop()
"""


def launch(out: Path, world: int) -> None:
    """Run the worker in `world` processes, as torchrun would."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    if world > 1:
        common |= {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(out)],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} if world > 1 else common,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        for process in processes:
            _, errors = process.communicate(timeout=240)
            assert process.returncode == 0, errors[-3000:]
    finally:
        for process in processes:
            process.kill()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The folders of one process and of two."""
    folders = {world: tmp_path_factory.mktemp(f"world-{world}") for world in (1, 2)}
    for world, folder in folders.items():
        launch(folder, world)
    return folders


def lines(folder: Path) -> list[dict[str, float]]:
    text = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in text]


# Averages of extremes depend on how a step is cut; a clock depends on everything.
CUT = ("tokens_per_second", "time/", "min_", "max_", "/max", "/std", "reward_std", "entropy")


@pytest.mark.parametrize("run", ["sft", "rm", "grpo", "grpo-buffer", "grpo-tokens"])
def test_two_processes_are_one(runs, run):
    one, two = lines(runs[1] / run), lines(runs[2] / run)
    assert [line["step"] for line in one] == [line["step"] for line in two]
    for expected, found in zip(one, two, strict=True):
        if run.startswith("grpo"):
            expected = {k: v for k, v in expected.items() if k in found}
        for name in expected:
            if not any(part in name for part in CUT):
                rel = 2e-6 if name in ("loss", "eval_loss") else 2e-5
                assert found[name] == pytest.approx(expected[name], rel=rel, abs=2e-6), name
    norms = [line["grad_norm"] for line in one if "grad_norm" in line]
    assert len(set(norms)) == len(norms) == 6


def test_a_step_without_any_token_changes_nothing_and_stops_nothing(runs):
    """A random model never ends an answer, so every completion is cut off, on every rank."""
    for world in (1, 2):
        found = lines(runs[world] / "masked")
        assert [line["loss"] for line in found if "loss" in line] == [0, 0]


def test_a_rank_without_a_gradient_goes_along(runs):
    """Half of its groups are skipped on one rank, all of them on the other."""
    (line, *_), (other, *_) = lines(runs[1] / "some"), lines(runs[2] / "some")
    assert line["frac_groups_skipped"] == 0 and other["frac_groups_skipped"] == 0.5
    assert all(one["grad_norm"] > 0 for one in lines(runs[2] / "some") if "grad_norm" in one)


def test_ranks_replace_their_own_groups(runs):
    """Of five prompts four are in a rollout: the fifth is left, for one of the ranks."""
    for world in (1, 2):
        first, second, *_ = lines(runs[world] / "replaced")
        for line in (first, second):
            assert line["dynamic_sampling/rounds"] == 1 / world
            assert line["dynamic_sampling/sampled_groups"] == 5 / world
            assert line["frac_groups_skipped"] == 1 and line["grad_norm"] == 0


def test_a_run_that_is_killed_and_resumed_is_the_run_that_was_not(runs):
    """Its windows too: each rank has its own half of a mean."""
    for world in (1, 2):
        whole, killed = lines(runs[world] / "whole"), lines(runs[world] / "killed")
        for line in (*whole, *killed):
            line.pop("tokens_per_second", None)
        assert killed == whole
        assert [line["step"] for line in whole if "loss" in line] == [3, 6]


def test_a_bad_number_on_one_rank_stops_both(runs):
    for world in (1, 2):
        found = [json.loads((runs[world] / f"bad-{r}.json").read_text()) for r in range(world)]
        assert all("step 3" in one["error"] for one in found)
        assert all(one["saved"] == ["checkpoint-2", "checkpoint-1"] for one in found)
        assert all(one["weights"] == found[0]["weights"] for one in found)


def test_overwriting_is_one_processs_work(runs):
    for world in (1, 2):
        names = [path.name for path in (runs[world] / "twice").glob("checkpoint-*")]
        assert names == ["checkpoint-1"]

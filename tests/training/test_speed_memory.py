"""Bounds that only a blunder breaks: memory of a run, and speed against this machine's own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import fastllm
from fastllm import ModelConfig, RewardModel
from fastllm.data.packing import pack_pairs
from fastllm.training.rewards import score_completions

ROOT = Path(fastllm.__file__).parents[1]

# The reference system's configuration: 4 layers, 128 wide, blocks of 256, 8 pairs.
MEMORY = """
import re, sys
import torch
torch.set_num_threads(1)
from fastllm import train_rm

def peak():  # not getrusage: that remembers the process which started this one
    status = open("/proc/self/status").read()
    return int(re.search(r"VmHWM:\\s*(\\d+) kB", status)[1]) / 1024

def run(steps, out):
    pairs = [("p" * 120, "c" * 120, "r" * 120)] * 16
    train_rm(pairs, out, steps=steps, batch_size=8, device="cpu", save_strategy="no")

run(2, sys.argv[1] + "/first")
first = peak()
run(20, sys.argv[1] + "/second")
print(first, peak())
"""


@pytest.fixture
def config() -> ModelConfig:
    return ModelConfig.scratch(
        vocab_size=260, n_layer=4, n_head=4, n_kv_head=2, n_embd=128, block_size=256, pad_token_id=0
    )


def seconds(work: Callable[[], object], repeats: int = 5) -> float:
    """The fastest of a few runs: noise only ever adds."""
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return min(times)


def matmul_rate() -> float:
    """Floating-point operations per second of this process's own matrix product, now."""
    a = torch.randn(512, 512)
    return 2 * 512**3 / seconds(lambda: a @ a, 20)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_memory_of_the_reference_configuration(tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    first, second = map(float, result.stdout.split())
    assert second < 700, "MiB of a whole process, of which torch itself is about 250"
    assert second - first < 60, "more steps must not need more memory"


def test_a_step_needs_no_more_than_its_activations(config):
    """Fewer than 40 numbers of the model's width for each token and layer, and no logits."""
    model = RewardModel(config)
    batch = pack_pairs([([5] * 240, [5] * 120 + [6] * 120) for _ in range(8)], share_prefix=False)
    kept = 0

    def count(tensor):
        nonlocal kept
        kept += tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        model.score_rows(batch.input_ids, batch.layout, batch.rows)
    weights = sum(p.nbytes for p in model.parameters())
    tokens, layers = batch.input_ids.numel(), config.num_hidden_layers
    assert kept < 40 * 4 * config.hidden_size * tokens * layers + 2 * weights


def test_scoring_keeps_up_with_the_machine(config):
    """At least a thirtieth of the speed of a large matrix product, measured beside it."""
    model = RewardModel(config).eval()
    prompts, answers = [[5] * 100] * 16, [[6] * 100] * 16
    tokens = 100 + 16 * 100
    work = 2 * tokens * sum(p.numel() for n, p in model.named_parameters() if "embed" not in n)
    rates = []
    for _ in range(3):  # a neighbour may take the processor away for a moment
        took = seconds(lambda: score_completions(model, prompts, answers, torch.device("cpu")))
        rates.append(work / took / matmul_rate())
        if rates[-1] > 1 / 30:
            return
    pytest.fail(f"scoring reaches {max(rates):.1%} of the speed of a matrix product")


def test_a_shared_prompt_is_computed_once(config):
    """Not a matter of noise: the tokens are not there."""
    pairs = [([5] * 200 + [6] * 20, [5] * 200 + [7] * 20)]
    shared, whole = pack_pairs(pairs), pack_pairs(pairs, share_prefix=False)
    assert shared.input_ids.numel() == 240 and whole.input_ids.numel() == 440
    model = RewardModel(config).eval()

    @torch.no_grad()
    def score(batch):
        return model.score_rows(batch.input_ids, batch.layout, batch.rows)

    torch.testing.assert_close(score(shared), score(whole), rtol=1e-4, atol=1e-6)
    for _ in range(3):
        if seconds(lambda: score(shared)) < seconds(lambda: score(whole)):
            return
    pytest.fail("sharing a long prompt is not faster than computing it twice")

"""One tiny trainer of each kind, and its loss and gradients however a step is cut."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastllm import (
    GRPOConfig,
    GRPOTrainer,
    ModelConfig,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)
from fastllm.data.tokenizer import Tokenizer
from fastllm.training.grpo_passes import PassPlan, Sample
from fastllm.training.loop import Pass

VOCAB = 260
Loss = tuple[Tensor, dict[str, Tensor]]


@pytest.fixture
def config() -> ModelConfig:
    """Grouped queries, and a head size that is no power of two."""
    return ModelConfig(
        vocab_size=VOCAB,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
        eos_token_id=258,
        pad_token_id=256,
    )


@pytest.fixture
def ids() -> Callable[[int], list[int]]:
    """Random token ids of a length."""
    generator = torch.Generator().manual_seed(5)
    return lambda length: torch.randint(0, 256, (length,), generator=generator).tolist()


@pytest.fixture
def options(device: torch.device, tmp_path: Path) -> dict[str, Any]:
    return {"output_dir": str(tmp_path / "run"), "device": str(device), "dtype": "fp32"}


@pytest.fixture(params=["sft", "rm", "grpo"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def trainer(
    kind: str,
    config: ModelConfig,
    options: dict[str, Any],
    ids: Callable[[int], list[int]],
) -> Any:
    """A trainer whose step has six sequences, three pairs or six completions."""
    tokenizer = Tokenizer.bytes()
    if kind == "sft":
        records = [{"input_ids": ids(n)} for n in (5, 12, 2, 9, 7, 4)]
        return SFTTrainer(config, SFTConfig(**options), records, processing_class=tokenizer)
    if kind == "rm":
        # What a pair shares: a prompt, nothing at all, and one side whole.
        both, prompt = ids(6), ids(5)
        sides = [(prompt + ids(3), prompt + ids(6)), (ids(4), ids(7)), (both, both + ids(2))]
        pairs = [{"chosen_ids": a, "rejected_ids": b, "margin": 0.1 * len(a)} for a, b in sides]
        args = RewardConfig(center_rewards_coefficient=0.05, **options)
        return RewardTrainer(config, args, pairs, processing_class=tokenizer)
    args = GRPOConfig(
        num_generations=3,
        per_device_train_batch_size=6,
        max_completion_length=8,
        beta=0.1,
        num_iterations=2,
        **options,
    )
    rewards = [lambda completions, **_: [0.0] * len(completions)]
    grpo = GRPOTrainer(config, rewards, args, [{"prompt": "x"}], processing_class=tokenizer)
    with torch.no_grad():  # a policy that has moved away from its reference
        for parameter in grpo.model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape).to(parameter.device)
    return grpo


@pytest.fixture
def examples(kind: str, trainer: Any, ids: Callable[[int], list[int]]) -> list[Any]:
    """What one step trains on."""
    if kind != "grpo":
        return trainer._train
    samples = []
    for prompt, lengths in ((ids(6), (4, 1, 7)), (ids(1), (3, 5, 2))):
        for length in lengths:
            completion = ids(length)
            old = (-5 + torch.randn(length)).tolist()
            advantage = float(torch.randn(()))
            samples.append(Sample(prompt, completion, old, advantage, old_logp=old))
    return samples


@pytest.fixture
def step(trainer: Any) -> Callable[..., Loss]:
    """`step(passes, **changes)`: loss and gradients of a step, its examples in these passes,
    with some fields of the config changed."""

    def run(passes: Sequence[Sequence[Any]], **changes: Any) -> Loss:
        original = trainer.args
        trainer.args = original.replaced(**changes)
        plan = trainer.source()._plan if hasattr(trainer, "rewards") else None
        total, normaliser = torch.zeros((), device=trainer.device), 0.0
        trainer.model.zero_grad()
        for chosen in passes:
            if plan is not None:
                one = grpo_pass(plan, chosen)
                batch, weight = one.batch, one.weight
            else:
                batch, weight, _ = trainer._collate(chosen)
                batch = batch.to(trainer.device)
            loss, _ = trainer.loss(trainer.model, batch)
            total, normaliser = total + loss, normaliser + weight
        (total / normaliser).backward()
        trainer.args = original
        return (total / normaliser).detach(), gradients(trainer.model)

    return run


@pytest.fixture
def assert_same() -> Callable[[Loss, Loss], None]:
    """Losses within 1e-6, gradients within 1e-5 of their largest element."""

    def check(found: Loss, expected: Loss) -> None:
        torch.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=0)
        assert found[1].keys() == expected[1].keys()
        for name, gradient in expected[1].items():
            error = (found[1][name] - gradient).abs().max()
            assert error <= 1e-5 * gradient.abs().max(), name

    return check


def grpo_pass(plan: PassPlan, samples: Sequence[Sample]) -> Pass:
    """Samples as one pass, with what they add to the normaliser of a step."""
    (one,) = plan.step(samples, sum(s.loss_tokens for s in samples))
    return one


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

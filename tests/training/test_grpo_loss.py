"""Every GRPO loss, its gradients and the advantages, against TRL's own code."""

from __future__ import annotations

import pytest
import torch

from fastllm import GRPOConfig
from fastllm.training.grpo_loss import (
    Tokens,
    group_advantages,
    grpo_loss,
    normaliser,
    token_weights,
)

LENGTHS = [4, 1, 6, 3]
ADVANTAGES = [1.3, -0.7, 0.4, -1.1]
LONGEST, LIMIT = max(LENGTHS), 8


@pytest.fixture
def logps():
    """Log-probabilities [B, T] of the policy that is trained, of the one that sampled, and of the
    reference: far enough apart for every clip."""
    current = -3 + torch.randn(len(LENGTHS), LONGEST)
    return {
        "logp": current,
        "old": current + 0.5 * torch.randn(current.shape),
        "reference": current + 0.3 * torch.randn(current.shape),
    }


def real(masked=()):
    """Which of the padded tokens carry loss [B, T]."""
    kept = [0 if i in masked else n for i, n in enumerate(LENGTHS)]
    return torch.arange(LONGEST) < torch.tensor(kept)[:, None]


def ours(config, logps, masked=(), on_policy=False):
    mask, kept = real(masked), [i for i in range(len(LENGTHS)) if i not in masked]
    logp = logps["logp"].clone().requires_grad_()
    weights = token_weights(config, [0 if i in masked else n for i, n in enumerate(LENGTHS)])
    tokens = Tokens(
        logp=logp[mask],
        old=None if on_policy else logps["old"][mask],
        reference=logps["reference"][mask] if config.beta else None,
        sequence=torch.repeat_interleave(
            torch.arange(len(kept)), torch.tensor([LENGTHS[i] for i in kept])
        ),
        lengths=torch.tensor([LENGTHS[i] for i in kept]),
        advantages=torch.tensor([ADVANTAGES[i] for i in kept]),
        weights=torch.tensor([weights[i] for i in kept]),
    )
    total, metrics = grpo_loss(tokens, config)
    loss = total / normaliser(config, len(LENGTHS), int(mask.sum()))
    (gradient,) = torch.autograd.grad(loss, logp)
    return loss.detach(), gradient, metrics


def theirs(trl_trainer, config, logps, masked=(), on_policy=False):
    """TRL's `_compute_loss` on a trainer with nothing but what it reads."""
    logp, mask = logps["logp"].clone().requires_grad_(), real(masked)
    trainer = trl_trainer(config, lambda *_, **__: (logp, torch.zeros_like(logp), None))
    inputs = {
        "prompt_ids": torch.zeros(len(LENGTHS), 1, dtype=torch.long),
        "prompt_mask": torch.ones(len(LENGTHS), 1, dtype=torch.long),
        "completion_ids": torch.zeros_like(mask, dtype=torch.long),
        "completion_mask": mask.long(),
        "advantages": torch.tensor(ADVANTAGES),
        "num_items_in_batch": mask.sum(),
        "ref_per_token_logps": logps["reference"],
    }
    if not on_policy:
        inputs["old_per_token_logps"] = logps["old"]
    loss = trainer._compute_loss(None, inputs)
    (gradient,) = torch.autograd.grad(loss, logp)
    return loss.detach(), gradient, trainer._metrics["train"]


def loss_config(**options):
    """All completions are one micro-batch."""
    return GRPOConfig(
        max_completion_length=LIMIT,
        per_device_train_batch_size=len(LENGTHS),
        num_generations=2,
        **options,
    )


LOSSES = {
    "grpo": {"loss_type": "grpo"},
    "bnpo": {"loss_type": "bnpo"},
    "dr_grpo": {"loss_type": "dr_grpo"},
    "dapo": {"loss_type": "dapo"},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.2},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    "gspo-dapo": {"loss_type": "dapo", "importance_sampling_level": "sequence"},
}
OPTIONS = {
    "plain": {},
    "clip-higher": {"epsilon": 0.1, "epsilon_high": 0.28},
    "delta": {"delta": 1.5},
    "kl": {"beta": 0.3},
    "all": {"epsilon": 0.1, "epsilon_high": 0.4, "delta": 1.6, "beta": 0.1},
}


@pytest.mark.parametrize("masked", [(), (1, 2)], ids=["", "truncated"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", LOSSES)
def test_value_and_gradient_are_those_of_trl(trl_trainer, logps, name, options, masked):
    config = loss_config(**OPTIONS[options] | LOSSES[name])
    loss, gradient, metrics = ours(config, logps, masked)
    expected, expected_gradient, expected_metrics = theirs(trl_trainer, config, logps, masked)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-7)
    for metric in ("clip_ratio/low_mean", "clip_ratio/high_mean", "cispo_clip_ratio"):
        if metric in metrics and config.importance_sampling_level == "token":
            total, count = metrics[metric]
            assert float(total) / count == pytest.approx(expected_metrics[metric][0], abs=1e-6)


def test_the_kl_metric_is_the_k3_estimate(logps):
    _, _, metrics = ours(loss_config(beta=0.3), logps)
    gap = (logps["reference"] - logps["logp"])[real()]
    total, count = metrics["kl"]
    assert float(total) / count == pytest.approx(float((gap.exp() - gap - 1).mean()), rel=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_on_policy_the_ratio_is_one_and_has_a_gradient(trl_trainer, logps, name):
    config = loss_config(beta=0.2, **LOSSES[name])
    loss, gradient, _ = ours(config, logps, on_policy=True)
    expected, expected_gradient, _ = theirs(trl_trainer, config, logps, on_policy=True)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-7)


def test_lengths_weigh_as_each_paper_says():
    """Two completions of advantage 1, of 1 and of 3 tokens: the gradient of each token."""
    expected = {
        "grpo": [1 / 2, 1 / 6, 1 / 6, 1 / 6],  # each completion counts the same
        "bnpo": [1 / 4] * 4,  # each token of the pass
        "dapo": [1 / 4] * 4,  # each token of the step
        "dr_grpo": [1 / 16] * 4,  # each token, by a constant that knows no lengths
    }
    for loss_type, gradients in expected.items():
        config = GRPOConfig(loss_type=loss_type, max_completion_length=8)
        logp, sequence = torch.full((4,), -2.0, requires_grad=True), torch.tensor([0, 1, 1, 1])
        weights = torch.tensor(token_weights(config, [1, 3]))
        tokens = Tokens(logp, None, None, sequence, torch.tensor([1, 3]), torch.ones(2), weights)
        (grpo_loss(tokens, config)[0] / normaliser(config, 2, 4)).backward()
        assert (-logp.grad).tolist() == pytest.approx(gradients), loss_type


def test_a_pass_without_tokens_has_no_loss():
    empty = torch.empty(0, requires_grad=True)
    index = torch.empty(0, dtype=torch.int64)
    for name in LOSSES.values():
        config = GRPOConfig(beta=0.1, **name)
        total, _ = grpo_loss(Tokens(empty, None, empty, index, empty, empty, empty), config)
        assert total == 0


# -- advantages -------------------------------------------------------------------------------


def trl_advantages(rewards, group, scale):
    """The lines of TRL's `_generate_and_score_completions`, with its own `nanstd`."""
    nanstd = pytest.importorskip("trl.trainer.utils").nanstd
    mean = torch.nanmean(rewards.view(-1, group), dim=1).repeat_interleave(group, dim=0)
    if scale == "batch":
        std = nanstd(rewards).expand_as(rewards)
    else:
        std = nanstd(rewards.view(-1, group), dim=1).repeat_interleave(group, dim=0)
    advantages = rewards - mean
    if scale != "none":
        advantages = advantages / (std + 1e-4)
    return torch.nan_to_num(advantages, nan=0.0)


def batch_std(rewards):
    known = rewards[~rewards.isnan()]
    return float(known.std()) if known.numel() > 1 else 0.0


@pytest.mark.parametrize("missing", [(), (2,), (4, 5, 6, 7), (0, 1, 2)])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_are_those_of_trl(scale, missing):
    rewards = torch.rand(12)
    rewards[list(missing)] = torch.nan
    found, std = group_advantages(rewards, 4, scale, batch_std(rewards))
    torch.testing.assert_close(found, trl_advantages(rewards, 4, scale), rtol=1e-5, atol=1e-6)
    assert found[list(missing)].eq(0).all() and std.shape == (3,) and std.isfinite().all()


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_equal_rewards_teach_nothing(scale):
    """Not even the rounding of their mean, which 1e-4 would enlarge."""
    for reward, size in ((0.3, 4), (0.1, 7), (1e7 / 3, 3)):
        found, std = group_advantages(torch.full((2 * size,), reward), size, scale, 0.0)
        assert found.eq(0).all() and std.eq(0).all()


def test_true_and_false_are_trls_older_spellings():
    assert GRPOConfig(scale_rewards=True).scale_rewards == "group"
    assert GRPOConfig(scale_rewards=False).scale_rewards == "none"

"""A whole optimizer step of GRPO against TRL's own loss on the same rollout: the gradient of every
parameter, however the step is packed, shared and cut into passes."""

from __future__ import annotations

import pytest
import torch

from fastllm import Transformer
from fastllm.training.grpo_passes import Sample

LIMIT = 8
PROMPTS = [[5, 9, 14, 7], [8, 3], [30, 31, 32, 33, 34, 35], [11]]
LENGTHS = [[3, 5, 1, 8], [2, 2, 7, 4], [6, 1, 3, 5], [8, 8, 2, 1]]
# A group that says nothing, and a completion that does not.
ADVANTAGES = [[1.2, -0.4, -1.1, 0.3], [0.0] * 4, [0.7, 0.0, -1.3, 0.6], [-0.9, 0.8, 1.0, -0.9]]
MASKED = {0: (1, 3), 2: (0,)}
"""Truncated completions of groups, where truncated ones are masked."""

# Two micro-batches of two groups each: one optimizer step, or half of a rollout of two steps.
COMMON = {
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 2,
    "num_generations": 4,
    "max_completion_length": LIMIT,
    "temperature": 0.7,
}

LOSSES = {
    "grpo": {"loss_type": "grpo"},
    "bnpo": {"loss_type": "bnpo"},
    "dr_grpo": {"loss_type": "dr_grpo"},
    "dapo": {"loss_type": "dapo"},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.1},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    "gspo-bnpo": {"loss_type": "bnpo", "importance_sampling_level": "sequence"},
}
OPTIONS = {
    "off-policy": {},
    "masked": {"mask_truncated_completions": True},
    "kl": {"beta": 0.2},
    "all": {
        "beta": 0.1, "epsilon": 0.1, "epsilon_high": 0.3, "delta": 1.4,
        "mask_truncated_completions": True,
    },
    "on-policy": {"delta": 1.4},
    "on-policy-kl": {"beta": 0.2},
    "two-steps": {"gradient_accumulation_steps": 1, "steps_per_generation": 2},
}  # fmt: skip
LAYOUTS = {
    "shared": {},
    "unshared": {"share_prefix": False},
    "padded": {"packing": False},
    "by-tokens": {"max_tokens_per_pass": 20},
    "by-tokens-unshared": {"max_tokens_per_pass": 17, "share_prefix": False},
    "by-tokens-padded": {"max_tokens_per_pass": 30, "packing": False},
    "one-pass": {"max_tokens_per_pass": 10_000},
}


@pytest.fixture
def theirs(base):
    """The model of `base` as Hugging Face's class."""
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


@pytest.fixture
def samples():
    """The completions of four groups; old log-probabilities far enough off for every clip."""
    generator = torch.Generator().manual_seed(5)

    def build(config, on_policy):
        made = []
        for g, (prompt, lengths, advantages) in enumerate(
            zip(PROMPTS, LENGTHS, ADVANTAGES, strict=True)
        ):
            for i, (length, advantage) in enumerate(zip(lengths, advantages, strict=True)):
                ids = torch.randint(3, 250, (length,), generator=generator).tolist()
                masked = config.mask_truncated_completions and i in MASKED.get(g, ())
                off = torch.randn(length, generator=generator).tolist()
                old = None if on_policy else off
                made.append(Sample(prompt, ids, off, advantage, masked, old))
        return made

    return build


@pytest.fixture
def reference(base):
    """Another model, for the KL term."""
    model = Transformer.from_pretrained(base)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape)
    return model


def padded(samples, values, width, left=False):
    """Rows of different lengths as [B, width], zeros elsewhere."""
    table = torch.zeros(len(samples), width, dtype=torch.tensor(values[0]).dtype)
    for row, own in enumerate(values):
        table[row, width - len(own) if left else 0 :][: len(own)] = torch.tensor(own)
    return table


def logps_of(model, input_ids, attention_mask, logits_to_keep, temperature):
    """Log-probabilities of the last tokens by a model of transformers."""
    logits = model(input_ids=input_ids, attention_mask=attention_mask).logits / temperature
    logp = logits[:, :-1].log_softmax(-1).gather(2, input_ids[:, 1:, None]).squeeze(2)
    return logp[:, -logits_to_keep:]


def trl_inputs(samples, all_tokens):
    prompts, completions = [s.prompt_ids for s in samples], [s.completion_ids for s in samples]
    longest = max(map(len, prompts)), max(map(len, completions))
    mask = padded(samples, [[1] * len(c) for c in completions], longest[1])
    mask *= torch.tensor([not s.masked for s in samples])[:, None]
    inputs = {
        "prompt_ids": padded(samples, prompts, longest[0], left=True),
        "prompt_mask": padded(samples, [[1] * len(p) for p in prompts], longest[0], left=True),
        "completion_ids": padded(samples, completions, longest[1]),
        "completion_mask": mask,
        "advantages": torch.tensor([s.advantage for s in samples]),
        "num_items_in_batch": torch.tensor(all_tokens),
    }
    if samples[0].old_logp is not None:
        old = padded(samples, [s.old_logp for s in samples], longest[1])
        inputs["old_per_token_logps"] = old
    return inputs


def step_of_trl(trainer, model, reference, config, rollout):
    """Loss and gradients of the first optimizer step of a rollout, micro-batch by micro-batch."""
    total, size = 0.0, config.per_device_train_batch_size
    tokens = sum(s.loss_tokens for s in rollout)
    for micro_batch in range(config.gradient_accumulation_steps):
        inputs = trl_inputs(rollout[micro_batch * size : (micro_batch + 1) * size], tokens)
        if config.beta:
            ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
            mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
            width = inputs["completion_ids"].shape[1]
            with torch.no_grad():
                logp = logps_of(reference, ids, mask, width, config.temperature)
            inputs["ref_per_token_logps"] = logp
        loss = trainer._compute_loss(model, inputs)
        loss.backward()
        total += float(loss.detach())
    return total, {name: p.grad for name, p in model.named_parameters()}


def own_step(trainer, rollout):
    """The same, as the loop does it."""
    source = trainer.source()
    source._samples = rollout
    source._roll_out = lambda _: rollout
    passes = source.passes(0)
    normaliser, total = sum(one.weight for one in passes), 0.0
    for one in passes:
        loss = trainer.loss(trainer.model, one.batch)[0] / normaliser
        loss.backward()
        total += float(loss.detach())
    gradients = {name: p.grad for name, p in trainer.model.named_parameters()}
    trainer.model.zero_grad()
    return total, gradients, passes


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradients_are_those_of_trl(
    make, base, theirs, reference, trl_trainer, samples, to_transformers, name, options
):
    settings = COMMON | OPTIONS[options] | LOSSES[name]
    trainer = make("grpo", base, **settings)
    rollout = samples(trainer.args, options.startswith("on-policy"))
    model_of_trl = trl_trainer(
        trainer.args,
        lambda model, ids, mask, keep, **_: (
            logp := logps_of(model, ids, mask, keep, trainer.args.temperature),
            torch.zeros_like(logp),
            None,
        ),
    )
    expected, expected_gradients = step_of_trl(
        model_of_trl, theirs, to_transformers(reference), trainer.args, rollout
    )
    largest = max(float(g.abs().max()) for g in expected_gradients.values())
    for layout, packing in LAYOUTS.items():
        trainer.args = trainer.args.replaced(**settings | packing)
        trainer._reference = reference if trainer.args.beta else None
        loss, gradients, passes = own_step(trainer, rollout)
        assert loss == pytest.approx(expected, rel=1e-5, abs=1e-6), layout
        for parameter, gradient in expected_gradients.items():
            torch.testing.assert_close(
                gradients[parameter], gradient, rtol=1e-5, atol=1e-5 * largest,
                msg=lambda text, p=parameter, where=layout: f"{where}: {p}: {text}",
            )  # fmt: skip
        limit = packing.get("max_tokens_per_pass")
        assert all(one.batch.tokens.input_ids.numel() <= (limit or 10**6) for one in passes)


@pytest.fixture
def to_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")

    def convert(model):
        from fastllm.model.weights import save_model

        folder = tmp_path / "converted"
        save_model(model, folder)
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    return convert

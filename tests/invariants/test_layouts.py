"""However a step is laid out, it has the same loss and the same gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fastllm.model.transformer import PackedAttend


@pytest.fixture
def plain(step, examples):
    """One pass, packed, prefixes shared."""
    return step([examples])


@pytest.mark.large
def test_the_gradient_reaches_every_parameter(plain, trainer):
    loss, gradients = plain
    assert loss.isfinite() and loss != 0
    assert gradients.keys() == {name for name, _ in trainer.model.named_parameters()}
    assert all(gradient.abs().max() > 0 for gradient in gradients.values())


def test_the_layout_does_not_matter(step, examples, plain, assert_same):
    assert_same(step([examples[:0:-1], examples[:1]]), plain)  # another order, another cut
    assert_same(step([examples], packing=False), plain)
    assert_same(step([examples], share_prefix=False), plain)


@pytest.mark.large
def test_the_order_of_packing_does_not_matter(step, examples, plain, assert_same):
    assert_same(step([examples[::-1]]), plain)
    assert_same(step([[*examples[1::2], *examples[::2]]]), plain)


@pytest.mark.large
def test_the_cut_into_passes_does_not_matter(step, examples, plain, assert_same):
    """Passes with very different token counts weigh by their tokens, not one each."""
    assert_same(step([examples[:1], examples[1:]]), plain)
    assert_same(step([[example] for example in examples]), plain)


@pytest.mark.large
def test_recomputing_activations_does_not_matter(step, examples, plain, trainer, assert_same):
    trainer.model.model.gradient_checkpointing = True
    assert_same(step([examples]), plain)


@pytest.mark.large
@pytest.mark.parametrize("kind", ["grpo"], indirect=True)
@pytest.mark.parametrize(
    "changes",
    [
        {"loss_type": "grpo"},
        {"loss_type": "dr_grpo"},
        {"loss_type": "cispo", "epsilon_high": 3.0},
        {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_every_normaliser_is_that_of_the_step(step, examples, assert_same, changes):
    whole = step([examples], **changes)
    assert_same(step([examples[:1], examples[1:]], **changes), whole)
    assert_same(step([examples], packing=False, **changes), whole)


@pytest.mark.large
@pytest.mark.parametrize("kind", ["grpo"], indirect=True)
def test_a_masked_completion_is_as_good_as_absent(step, examples, assert_same):
    masked = [replace(s, masked=i in (1, 3)) for i, s in enumerate(examples)]
    present = [s for s in masked if not s.masked]
    assert_same(step([masked]), step([present]))
    assert_same(step([masked[:1], masked[1:2], masked[2:]]), step([present]))


@pytest.mark.large
def test_the_last_layer_may_skip_rows_that_nobody_reads(trainer, examples, kind):
    if kind == "grpo":
        batch = trainer.source()._plan.pack(examples)
    else:
        batch = trainer._collate(examples)[0].to(trainer.device)
    trunk, direction = trainer.model.model, None
    found = []
    for rows in (batch.rows, None):
        trainer.model.zero_grad()
        hidden = trunk(batch.input_ids, PackedAttend(batch.layout, rows), rows)
        hidden = hidden if rows is not None else hidden[batch.rows]
        direction = torch.randn_like(hidden) if direction is None else direction
        (hidden * direction).sum().backward()
        found.append((hidden.detach(), [p.grad.clone() for p in trunk.parameters()]))
    (few, few_gradients), (every, every_gradients) = found
    torch.testing.assert_close(few, every, rtol=1e-5, atol=1e-6)
    for one, other in zip(few_gradients, every_gradients, strict=True):
        assert (one - other).abs().max() <= 1e-5 * other.abs().max()

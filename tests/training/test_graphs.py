"""Passes of rounded sizes: the same loss, metrics and gradients as without what was added."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from fastllm.data.packing import pack_groups
from fastllm.ops.working import copy_of, keep_copies
from fastllm.training import buckets, trainer
from fastllm.training.graphs import GraphedPasses
from fastllm.training.loop import Pass
from fastllm.training.optimizer import Optimizer
from fastllm.training.passes import OpByOp


def test_rounded_sizes_are_few_and_near():
    for least in (1, 16, 64):
        sizes = [buckets.rounded(n, least) for n in range(1, 5000)]
        assert sizes == sorted(sizes) and all(size % least == 0 for size in sizes)
        for number, size in enumerate(sizes, 1):
            assert number <= size <= max(number + least - 1, number * 9 / 8)
    assert len({buckets.rounded(n, 64) for n in range(64, 65537)}) <= 8 * 10 + 8


@pytest.fixture
def passes(make):
    """`passes(kind)`: a trainer, its passes of one step as they are, and with rounded sizes."""

    def build(kind, **config):
        built = make(kind, per_device_train_batch_size=3, gradient_accumulation_steps=3, **config)
        plain = built.source().passes(0)
        step = built.source()._sampler.indices(0)
        padded = []
        for first in range(0, len(step), 3):
            examples = [built._train[i] for i in step[first : first + 3]]
            batch, weight, tokens = built._collate(examples)
            parcel = built.placement.send_parcel(buckets.padded(batch))()
            padded.append(Pass(parcel, weight, tokens))
        return built, plain, padded

    return build


def computed(built, compute, passes):
    """Losses, metrics and gradients of a step."""
    normaliser = float(sum(one.weight for one in passes))
    for parameter in built.model.parameters():
        parameter.grad = None
    compute.begin()
    found = [compute(one, normaliser) for one in passes]
    numbers = [
        {"loss": float(loss), **{n: (float(a), float(b)) for n, (a, b) in metrics.items()}}
        for loss, metrics in found
    ]
    return numbers, [p.grad.clone() for p in built.model.parameters()]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["sft", "rm"])
def test_a_rounded_pass_is_the_pass(passes, kind, dtype):
    built, plain, padded = passes(kind, dtype=dtype)
    optimizer = Optimizer(built.model, built.args, False)
    expected = computed(built, OpByOp(built.model, built.loss, optimizer), plain)
    graphed = GraphedPasses(built.model, built.loss, optimizer, capture=False)
    for _ in range(2):  # the second step finds the gradients of the first, and clears them
        found = computed(built, graphed, padded)
        near = {"rel": 1e-5, "abs": 1e-6} if dtype == "fp32" else {"rel": 2e-2, "abs": 1e-3}
        for ours, theirs in zip(found[0], expected[0], strict=True):
            assert ours.keys() == theirs.keys()
            for name in ours:
                assert ours[name] == pytest.approx(theirs[name], **near), name
        for ours, theirs in zip(found[1], expected[1], strict=True):
            scale = float(theirs.abs().max())
            bound = (1e-5 if dtype == "fp32" else 3e-2) * scale + 1e-7
            assert float((ours - theirs).abs().max()) <= bound


@pytest.mark.parametrize("kind", ["sft", "rm"])
def test_sizes_are_rounded_and_targets_kept(passes, kind):
    _, plain, padded = passes(kind)
    for before, after in zip(plain, padded, strict=True):
        small, large = before.batch, after.batch.batch
        tokens = small.input_ids.numel()
        assert large.input_ids.numel() == buckets.rounded(tokens, 64) == large.layout.total_tokens
        assert torch.equal(large.input_ids[:tokens], small.input_ids)
        assert large.layout.lengths[: small.layout.num_segments] == small.layout.lengths
        assert (large.rows[1:] > large.rows[:-1]).all()
        if kind == "sft":
            real = large.token_weights > 0
            assert torch.equal(large.rows[real], small.rows)
            assert torch.equal(large.targets[real], small.targets)
        else:
            assert torch.equal(large.rows, small.rows)


def test_batches_of_a_bucket_have_tables_of_equal_shapes(make):
    """What a graph was captured for is told apart by the bytes of its buffer alone."""
    texts = [{"text": "ab" * 20 + "c" * n} for n in (1, 2, 3, 4, 5, 6, 7, 8)]
    built = make("sft", data=texts, per_device_train_batch_size=2)
    parcels = [
        built.placement.send_parcel(buckets.padded(built._collate(built._train[i : i + 2])[0]))()
        for i in range(0, 8, 2)
    ]
    assert len({parcel.bytes for parcel in parcels}) == 1


@pytest.mark.parametrize("kind", ["sft", "rm"])
def test_a_run_of_rounded_passes_is_the_run(make, kind, metrics, tmp_path, monkeypatch):
    make(kind, run="plain", max_steps=6).train()
    monkeypatch.setattr(trainer, "check_graphs", lambda model, device: None)
    monkeypatch.setattr(trainer, "GraphedPasses", partial(GraphedPasses, capture=False))
    make(kind, run="rounded", max_steps=6, cuda_graphs=True).train()
    plain, rounded = metrics(tmp_path / "plain"), metrics(tmp_path / "rounded")
    for before, after in zip(plain, rounded, strict=True):
        assert after == pytest.approx(before, rel=1e-4, abs=1e-6)


def test_sizes_are_captured_when_they_come_again(passes, monkeypatch, caplog):
    """And only so many graphs are kept, those used last."""
    from fastllm.training import graphs

    texts = [{"text": "a" * n} for n in (1, 2, 3, 4, 5, 60, 60, 60, 60)]
    built, _, padded = passes("sft", data=texts, seed=1)
    made = []

    class Fake:
        def __init__(self, parcel, compute, pool, kept):
            made.append(parcel.bytes)
            self.compute = compute

        def replay(self, parcel, normaliser):
            return self.compute(parcel.batch, torch.tensor(normaliser))

    monkeypatch.setattr(graphs, "_Graph", Fake)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    optimizer = Optimizer(built.model, built.args, False)
    graphed = GraphedPasses(built.model, built.loss, optimizer, most=1)
    graphed.begin()
    sizes = {one.batch.bytes: one for one in padded}
    first, other = list(sizes.values())[:2]
    with caplog.at_level("INFO", "fastllm"):
        for one in (first, first, first, other, other, first):
            graphed(one, 1.0)
    assert made == [first.batch.bytes, other.batch.bytes, first.batch.bytes]
    assert caplog.text.count("used longest ago goes") == 2


def test_weights_that_a_callback_wrote_are_copied_where_a_graph_reads_them(make):
    built = make("sft")
    weight = next(p for p in built.model.parameters() if p.dim() == 2)
    keep_copies([weight], torch.bfloat16)
    kept = copy_of(weight)
    with torch.no_grad():
        weight.add_(1)
    optimizer = Optimizer(built.model, built.args, scale_loss=False)
    GraphedPasses(built.model, built.loss, optimizer, capture=False).begin()
    assert torch.equal(kept, weight.detach().to(torch.bfloat16))


def test_what_has_no_graphs_is_refused_by_name(make):
    with pytest.raises(ValueError, match="cuda_graphs: expected a CUDA device, found cpu"):
        make("sft", cuda_graphs=True).train()
    with pytest.raises(ValueError, match="cuda_graphs: expected False for GRPO"):
        make("grpo", cuda_graphs=True)
    with pytest.raises(ValueError, match="no graphs for passes of int"):
        buckets.padded(3)
    with pytest.raises(ValueError, match="one target for each row"):
        buckets.padded(pack_groups([[1]], [[2], [3]], [0, 0]))


@pytest.mark.cuda
@pytest.mark.parametrize("kind", ["sft", "rm"])
def test_a_run_from_graphs_is_the_run(make, kind, metrics, tmp_path, wide_config):
    options = {"use_cpu": False, "dtype": "bf16", "model": wide_config, "max_steps": 12}
    options["gradient_accumulation_steps"] = 2
    make(kind, run="plain", **options).train()
    make(kind, run="graphs", cuda_graphs=True, **options).train()
    plain, graphs = metrics(tmp_path / "plain"), metrics(tmp_path / "graphs")
    for before, after in zip(plain, graphs, strict=True):
        assert after == pytest.approx(before, rel=2e-2, abs=1e-3)

"""Nothing in a step waits for the device: its code runs on tensors that have no values at all.

On meta tensors every read of a value raises, which on a GPU would be a wait: `.item()`,
`.tolist()`, `if tensor`, boolean masks, `nonzero`, `unique`. Kernels are not launched, but all that
is around them runs as on a GPU.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastllm.data.packing import pack_pairs, pack_sequences
from fastllm.model.lora import add_lora
from fastllm.model.lora_config import LoraConfig
from fastllm.ops import backend
from fastllm.training import loop, outcomes
from fastllm.training.buckets import padded
from fastllm.training.graphs import _tables as tables_of
from fastllm.training.grpo_passes import Sample
from fastllm.training.optimizer import Optimizer
from fastllm.training.passes import OpByOp
from fastllm.training.prefetch import Placement, unpack

triton = pytest.importorskip("triton")
META = torch.device("meta")


class AbsentGPU:
    """What launches ask Triton about the GPU."""

    def get_current_device(self):
        return 0

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


class Launches(Counter):
    """How often each kernel was launched, and everything that a graph would keep of it."""

    def __init__(self):
        super().__init__()
        self.kept = []

    def note(self, kernel, grid, args, constants):
        self[kernel.__name__] += 1
        shapes = [(a.shape, a.stride(), a.dtype) if torch.is_tensor(a) else a for a in args]
        self.kept.append((kernel.__name__, grid, shapes, constants))


@pytest.fixture
def launched(monkeypatch):
    """Triton serves meta tensors; the launches are noted."""
    from fastllm.kernels import launch

    counts, choose = Launches(), backend._choose

    def count(self, kernel, grid, *args, **constants):
        counts.note(kernel, grid, args, constants)

    def chosen(name, device, dtype):
        return "triton" if device == "meta" else choose(name, device, dtype)

    monkeypatch.setattr(launch.Launcher, "__call__", count)
    monkeypatch.setattr(triton.runtime.driver, "_active", AbsentGPU())
    monkeypatch.setattr(backend, "_choose", chosen)
    return counts


@pytest.fixture
def on_meta(make, wide_config):
    """`on_meta(kind, family, ...)`: a trainer and the passes of a step, without values."""

    def build(kind, family="llama", lora=False, **config):
        model = replace(wide_config, model_type=family)
        trainer = make(kind, model=model, gradient_accumulation_steps=2, **config)
        if lora:
            add_lora(trainer.model, LoraConfig(r=8, lora_dropout=0.1))
        passes = [
            loop.Pass(without_values(one.batch), one.weight, one.tokens)
            for one in trainer.source().passes(0)
        ]
        trainer.model.to(META)
        trainer.model.train()
        trainer.model.model.compute_dtype = torch.bfloat16
        return trainer, passes

    return build


def without_values(batch, *prepare):
    parcel = Placement("cpu", *prepare).send_parcel(batch)()
    return unpack(batch, parcel.bytes, parcel.buffer.to(META))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("kind", ["sft", "rm", "grpo"])
def test_a_step_reads_no_value(on_meta, launched, kind, family):
    trainer, passes = on_meta(kind, family)
    optimizer = Optimizer(trainer.model, trainer.args, False)
    compute = OpByOp(trainer.model, trainer.loss, optimizer)
    compute.begin()
    losses = [compute(one, 7.0)[0] for one in passes]
    norm = optimizer.step(1e-3, sum(losses))
    assert norm.device == META
    # Every layer went through the kernels, there and back.
    assert launched["attention_forward_kernel"] == 3 * len(passes)
    assert launched["swiglu_backward_kernel"] == 3 * len(passes)


@pytest.mark.parametrize("kind", ["sft", "rm", "grpo"])
def test_a_step_of_adapters_reads_no_value(on_meta, launched, kind):
    trainer, passes = on_meta(kind, lora=True)
    compute = OpByOp(trainer.model, trainer.loss, Optimizer(trainer.model, trainer.args, False))
    for one in passes:
        compute(one, 7.0)
    assert launched["attention_forward_kernel"] == 3 * len(passes)


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "cispo"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_no_loss_of_grpo_reads_a_value(on_meta, launched, loss_type, level):
    high = {"epsilon_high": 5.0} if loss_type == "cispo" else {}
    options = {"loss_type": loss_type, "importance_sampling_level": level, "beta": 0.1, **high}
    trainer, passes = on_meta("grpo", num_iterations=2, **options)
    trainer._reference.to(META)
    for one in passes:
        assert one.batch.old_logp is not None
        trainer.loss(trainer.model, one.batch)[0].backward()
    assert trainer._agreement.take()


def test_the_loop_reads_no_value_between_its_lines(on_meta, launched, monkeypatch):
    """Three steps of the loop itself; only the numbers of the steps before are looked at."""
    trainer, passes = on_meta("sft", logging_steps=100, max_steps=9)
    looked_at = []

    class Unread(outcomes.Numbers):
        def __init__(self, scalars):
            assert {scalar.device for scalar in scalars} == {META}
            self.made = len(looked_at)

        def read(self):
            looked_at.append(self)
            return [1.0, 2.0]

    monkeypatch.setattr(outcomes, "Numbers", Unread)
    monkeypatch.setattr(loop, "lag_of", lambda optimizer: 1)
    source = trainer.source()
    monkeypatch.setattr(source, "passes", lambda step: passes)
    optimizer = Optimizer(trainer.model, trainer.args, False)
    compute = OpByOp(trainer.model, trainer.loss, optimizer)
    hooks = loop.Hooks(None, print, trainer.callbacks, trainer.state)
    running = loop._Loop(trainer.model, source, compute, optimizer, trainer.args, hooks, 1e-3)
    running.progress, running.metrics_log = None, None
    running.request = SimpleNamespace(made=0)
    for step in range(3):
        running._step()
        running._after_step()
        assert len(looked_at) == step  # one behind
    assert trainer.state.global_step == 3 and running.outcomes.loss_sum == 4.0


@pytest.mark.parametrize("kind", ["sft", "rm"])
def test_batches_of_a_bucket_are_launched_alike(on_meta, launched, kind):
    """Same kernels, grids, numbers and shapes: what a CUDA graph of one keeps serves the other."""
    trainer, _ = on_meta(kind)
    trainer.device, trainer.dtype = META, torch.bfloat16
    model, longest = trainer.model, trainer.model.config.max_position_embeddings
    place = Placement("cpu", trainer._prepare_layouts)
    if kind == "sft":
        sizes = ((20, 3, 9, 25), (12, 13, 14, 15), (2, 60, 1, 1))
        batches = [
            pack_sequences([[5] * n for n in row], [[False] + [True] * (n - 1) for n in row])
            for row in sizes
        ]
    else:
        sides = (((30, 2), (4, 5)), ((12, 10), (12, 13)), ((1, 1), (30, 20)))
        batches = [
            pack_pairs([([5] * n + [6, 7], [5] * n + [8] * m) for n, m in row]) for row in sides
        ]
    seen = []
    for batch in (batches[0], *batches):  # the first pass of all makes the table of angles
        parcel = place.send_parcel(padded(batch))()
        there = unpack(parcel.batch, parcel.bytes, parcel.buffer.to(META))
        there.layout.max_position = longest
        launched.kept.clear()
        with ProductsAndCopies() as others:
            trainer.loss(model, there)[0].backward()
        seen.append((parcel.bytes, list(launched.kept), others.kept))
    assert len(seen[0][1]) > 20
    assert seen[1] == seen[2] == seen[3]


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("kind", ["sft", "rm", "grpo"])
def test_every_table_comes_with_the_batch(on_meta, launched, kind, rounded):
    """A pass makes none of its own: that would be a copy while the device waits."""
    if kind == "grpo" and rounded:
        pytest.skip("its passes have no rounded sizes")
    trainer, _ = on_meta(kind)
    trainer.device, trainer.dtype = META, torch.bfloat16
    if kind == "grpo":
        batch = trainer.source()._plan._batch([Sample([1, 2], [3, 4], [-1.0, -2.0], 0.5)], [1.0], 0)
    else:
        batch, _, _ = trainer._collate(trainer._train[:3])
    batch = padded(batch) if rounded else batch
    there = without_values(batch, trainer._prepare_layouts)
    tokens = there.tokens if kind == "grpo" else there
    before = tables_of(tokens)
    trainer.loss(trainer.model, there)[0].backward()
    assert tables_of(tokens) == before


class ProductsAndCopies(TorchDispatchMode):
    """What PyTorch itself computes."""

    def __init__(self):
        super().__init__()
        self.kept = []

    def __torch_dispatch__(self, function, types, args=(), keywords=None):
        self.kept.append((str(function), [tuple(a.shape) for a in args if torch.is_tensor(a)]))
        return function(*args, **(keywords or {}))

"""Memory predicted before a run: what a pass keeps is counted, the rest is arithmetic."""

from __future__ import annotations

import itertools
import logging
from types import SimpleNamespace

import pytest
import torch

from fastllm import ModelConfig, RewardModel, Transformer
from fastllm.data.packing import pack_pairs, pack_sequences
from fastllm.model.lora import add_lora
from fastllm.model.lora_config import LoraConfig
from fastllm.training import activations, memory
from fastllm.training.activations import PassSize
from fastllm.training.config import RewardConfig, SFTConfig

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
KINDS = ("llama", "qwen2", "qwen3", "lora", "lora with dropout")


def build(kind, reward=False, dtype=torch.float32):
    family = kind if kind.startswith(("llama", "qwen")) else "llama"
    config = ModelConfig(model_type=family, pad_token_id=0, **SHAPE)
    model = (RewardModel if reward else Transformer)(config)
    model.model.compute_dtype = dtype
    if kind.startswith("lora"):
        dropout = 0.1 if "dropout" in kind else 0.0
        add_lora(model, LoraConfig(r=8, lora_dropout=dropout))
    return model


def batch_of(reward):
    if reward:
        pairs = [([5] * 90 + [6] * 30, [5] * 90 + [7] * 40) for _ in range(4)]
        return pack_pairs(pairs)
    return pack_sequences([[1] * 150] * 4, [[False] * 60 + [True] * 90] * 4)


def size_of(batch):
    return PassSize(batch.input_ids.numel(), batch.rows.numel(), batch.rows.numel())


def kept(model, batch):
    """Bytes that autograd holds after a forward pass up to the head; weights do not count."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    weights |= {t.untyped_storage().data_ptr() for pair in _angles(model) for t in pair}
    held = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            held[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        if isinstance(model, RewardModel):
            model.score_rows(batch.input_ids, batch.layout, batch.rows)
        else:
            model.lm_head(model.hidden(batch.input_ids, batch.layout, batch.rows))
    return sum(storage.nbytes() for storage in held.values())


def _angles(model):
    model.model.rotary(256, torch.device("cpu"))
    return model.model.rotary._tables.values()


def predicted(model, size):
    layers = range(model.config.num_hidden_layers)
    own = sum(activations.of_layer(model, i, size, model.model.recomputes(i)) for i in layers)
    return own + activations.of_embedding(model, size) + activations.of_end(model, size)


@pytest.mark.parametrize("recomputed", [0, 2, None])
@pytest.mark.parametrize("reward", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_what_a_pass_keeps_is_predicted(kind, reward, recomputed):
    model, batch = build(kind, reward), batch_of(reward)
    model.model.gradient_checkpointing = recomputed != 0
    model.model.recomputed_layers = recomputed
    found, expected = kept(model, batch), predicted(model, size_of(batch))
    assert expected == pytest.approx(found, rel=0.03)


def largest_account(work):
    """The most bytes that PyTorch's allocator has given out at a time during `work`."""
    with torch.autograd.profiler.profile(profile_memory=True, use_kineto=True) as profile:
        work()
    records = [e for e in profile.kineto_results.events() if e.name() == "[memory]"]
    account = itertools.accumulate(e.nbytes() for e in sorted(records, key=lambda e: e.start_ns()))
    return max(account)


@pytest.mark.parametrize("recomputed", [0, 2, None])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "lora"])
def test_the_peak_of_a_pass_is_predicted(kind, recomputed):
    """Of a reward model, whose head needs no memory: activations and gradients."""
    pairs = [([5] * 900 + [6] * 300, [5] * 900 + [7] * 400) for _ in range(2)]
    model, batch = build(kind, reward=True), pack_pairs(pairs)
    model.model.gradient_checkpointing = recomputed != 0
    model.model.recomputed_layers = recomputed

    def work():
        model.score_rows(batch.input_ids, batch.layout, batch.rows).sum().backward()

    work()  # tables that stay
    model.zero_grad(set_to_none=True)
    parts = memory.predict(
        model, size_of(batch), RewardConfig(), recomputed=5 if recomputed is None else recomputed
    ).parts
    expected = parts["activations"] + parts["gradients"] + parts["head"]
    assert expected == pytest.approx(largest_account(work), rel=0.12)


@pytest.mark.parametrize("reward", [False, True])
def test_half_of_the_bytes_in_bf16(reward):
    """The fused halves read the weights where they are: only activations are kept."""
    model, batch = build("llama", reward, torch.bfloat16), batch_of(reward)
    if not reward:
        model.lm_head.weight.data = model.lm_head.weight.data.bfloat16()
    assert predicted(model, size_of(batch)) == pytest.approx(kept(model, batch), rel=0.03)


def test_the_parts_are_what_they_are_called():
    model = build("llama", dtype=torch.bfloat16)
    numbers = sum(p.numel() for p in model.parameters())
    found = memory.predict(model, PassSize(600, 360, 360), SFTConfig())
    assert found.parts["weights"] == 4 * numbers
    assert found.parts["copies"] == 2 * numbers
    assert found.parts["optimizer"] == 8 * numbers
    assert found.parts["gradients"] <= 4 * numbers
    assert found.peak == sum(found.parts.values())
    more = memory.predict(model, PassSize(600, 360, 360), SFTConfig(gradient_accumulation_steps=2))
    assert more.parts["gradients"] >= 4 * numbers
    beside = memory.predict(model, PassSize(600, 360, 360), SFTConfig(), others=[build("llama")])
    assert beside.peak - found.peak == 4 * numbers


def test_a_step_without_activations_peaks_with_its_gradients():
    """A pass of a few tokens: what is largest is at the end of the backward pass."""
    model = build("llama")
    found = memory.predict(model, PassSize(2, 1, 1), SFTConfig())
    assert found.parts["gradients"] == 4 * sum(p.numel() for p in model.parameters())


def test_adapters_have_small_states():
    whole, adapted = build("llama"), build("lora")
    size = PassSize(600, 360, 360)
    found = memory.predict(adapted, size, SFTConfig())
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert (
        found.parts["optimizer"]
        == 8 * trained
        < 0.5 * 8 * sum(p.numel() for p in whole.parameters())
    )


def test_each_recomputed_layer_saves_memory_until_others_are_the_peak():
    model, size = build("llama"), PassSize(100_000, 60_000, 60_000)
    on = SFTConfig(gradient_checkpointing=True)
    peaks = [memory.predict(model, size, on, recomputed=n).peak for n in range(6)]
    assert peaks == sorted(peaks, reverse=True) and peaks[4] < 0.7 * peaks[0]
    assert memory.predict(model, size, on).peak == peaks[5]
    assert memory.predict(model, size, SFTConfig()).peak == peaks[0]
    some = SFTConfig(gradient_checkpointing=True, gradient_checkpointing_layers=2)
    assert memory.predict(model, size, some).peak == peaks[2]


def test_as_few_layers_as_fit_are_recomputed():
    model, size = build("llama"), PassSize(100_000, 60_000, 60_000)
    config = SFTConfig(gradient_checkpointing=True, gradient_checkpointing_layers=-1)
    peaks = [memory.predict(model, size, config, recomputed=n).peak for n in range(6)]
    for layers in range(5):
        room = int(peaks[layers] / 0.95) + 1
        assert memory.fewest_recomputed(model, size, config, room).recomputed == layers
    assert memory.fewest_recomputed(model, size, config, 0).recomputed == 5


@pytest.mark.parametrize(
    ("config", "first"),
    [
        (SFTConfig(), "gradient_checkpointing=True"),
        (
            SFTConfig(gradient_checkpointing=True, gradient_checkpointing_layers=1),
            "gradient_checkpointing_layers=None",
        ),
        (RewardConfig(gradient_checkpointing=True), "a smaller per_device_train_batch_size"),
    ],
)
def test_advice_names_what_to_change(config, first):
    model = build("llama")
    large = memory.predict(model, PassSize(100_000, 60_000, 60_000), config)
    text = memory.advice(large, config, 1 << 20)
    assert f"the device has 1.0 MB; try {first}" in text and "max_length" in text
    small = memory.predict(model, PassSize(2, 1, 1), config)
    assert "try a peft_config (LoRA)" in memory.advice(small, config, 1)
    assert memory.advice(large, config, 1 << 50) is None


def test_sampling_may_be_the_largest_moment(make):
    trainer = make("grpo", max_completion_length=40)
    beside, size = trainer._memory_beside(), trainer.largest_pass(trainer.source())
    tokens = 4 * (40 + 64) + 2 * (1 + 64)
    assert beside == {"others": [], "cache": tokens * 2 * 2 * 8 * 4}  # layers, head size, bytes
    found = memory.predict(trainer.model, size, trainer.args, others=[], cache=1 << 40)
    assert found.parts["rollouts"] > 1 << 40 > found.parts["activations"] > 0
    assert "try generation_kwargs with cache_bytes" in memory.advice(found, trainer.args, 1 << 30)
    limited = make("grpo", max_completion_length=40, generation_kwargs={"cache_bytes": 999})
    assert limited._memory_beside()["cache"] == 999


def test_the_largest_pass_of_the_data_is_found(make):
    texts = [{"text": "a" * n} for n in (3, 30, 4, 50, 5, 6, 7, 8)]
    trainer = make("sft", data=texts, per_device_train_batch_size=2, max_steps=40)
    found = trainer.largest_pass(trainer.source())
    passes = [trainer.source().passes(step)[0].batch for step in range(40)]
    assert found.tokens == max(batch.input_ids.numel() for batch in passes)
    assert make("rm").largest_pass(make("rm").source()).targets == 0
    grpo = make("grpo", max_completion_length=6)
    assert grpo.largest_pass(grpo.source()) == PassSize(24 + 2, 24, 24)


def test_before_and_after_a_run_in_the_log(make, monkeypatch, caplog):
    """As on a GPU of 1 GB, of which a run needs very little."""
    trainer = make("sft")
    monkeypatch.setattr(trainer, "device", SimpleNamespace(type="cuda"))
    watch = memory.Watch(trainer.model, trainer.args, trainer.device)
    monkeypatch.setattr(memory, "_room", lambda device: 10**9)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 2 * 10**8)
    with caplog.at_level(logging.INFO, "fastllm"):
        watch.begin(lambda: PassSize(100, 60, 60))
        output = watch.end()
    assert "predicted peak 0.1 GB of 1.0 GB: weights" in caplog.text
    assert "measured peak 0.2 GB (predicted 0.1 GB)" in caplog.text
    assert output["peak_memory"] == 2 * 10**8 < 2 * output["predicted_peak_memory"]


def test_on_the_cpu_nothing_is_claimed(make, caplog):
    with caplog.at_level(logging.INFO, "fastllm"):
        output = make("sft").train()
    assert "peak" not in caplog.text and not any("memory" in name for name in output.metrics)
    open_ended = {"gradient_checkpointing": True, "gradient_checkpointing_layers": -1}
    with pytest.raises(ValueError, match="gradient_checkpointing_layers is -1: expected a CUDA"):
        make("sft", run="open", **open_ended).train()


@pytest.mark.cuda
@pytest.mark.parametrize("kind", ["sft", "rm"])
def test_the_prediction_holds_on_a_gpu(make, kind, tokenizer):
    """Large enough that the workspace is nothing beside it."""
    config = ModelConfig(
        vocab_size=8192,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=8,
        max_position_embeddings=512,
        pad_token_id=tokenizer.pad_token_id,
    )
    long = "x" * 400
    record = {"text": long} if kind == "sft" else {"chosen": long, "rejected": "y" + long}
    options = {"use_cpu": False, "dtype": "bf16", "per_device_train_batch_size": 32}
    output = make(kind, model=config, data=[record] * 64, max_steps=3, **options).train()
    found = output.metrics["peak_memory"]
    assert output.metrics["predicted_peak_memory"] == pytest.approx(found, rel=0.15)

"""Supervised fine-tuning, as a function and as a class, from and to every kind of place."""

from __future__ import annotations

import json
import logging

import pytest
import torch

from fastllm import Example, SFTConfig, SFTTrainer, Transformer, generate, train_sft
from fastllm.data.errors import DataError
from fastllm.model.lora import LoraConfig
from fastllm.training.sft import _prompt_key
from fastllm.training.trainer import split_by_prompt

TINY = {
    "n_layer": 2, "n_head": 2, "n_kv_head": 1, "n_embd": 16, "block_size": 48,
    "device": "cpu", "save_strategy": "no", "logging_steps": 1,
}  # fmt: skip


@pytest.fixture
def train(tmp_path):
    """`train(items, run="run", **options)`: a tiny run of `train_sft`."""
    return lambda items, run="run", **options: train_sft(items, tmp_path / run, **TINY | options)


@pytest.fixture
def learnt(metrics, tmp_path):
    """Loss at the beginning and at the end of a run."""

    def read(run="run"):
        losses = [line["loss"] for line in metrics(tmp_path / run) if "loss" in line]
        return losses[0], losses[-1]

    return read


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_it_learns(train, learnt, items, dtype):
    train(items, steps=40, batch_size=10, lr=0.02, dtype=dtype)
    first, last = learnt()
    assert first == pytest.approx(5.56, abs=0.1)  # log(260): it knew nothing
    assert last < 0.5


def test_it_says_what_it_was_taught(train, tokenizer):
    model = train([("abc>", "cba")] * 4, steps=40, batch_size=4, lr=0.02)
    (answer,) = generate(model, [tokenizer.encode("abc>")], 8, temperature=0)
    assert tokenizer.decode(answer.token_ids) == "cba" and answer.finish_reason == "stop"


@pytest.mark.parametrize(
    "records",
    [
        [{"prompt": "a", "completion": "b"}],
        [{"question": "a", "answer": "b"}],
        [("a", "b")],
        [Example("a", "b")],
        (Example("a", "b") for _ in range(1)),
    ],
    ids=["dict", "other names", "tuple", "Example", "generator"],
)
def test_the_forms_of_a_record_are_one(train, learnt, records):
    train(records, steps=2)
    train([{"prompt": "a", "completion": "b"}], run="other", steps=2)
    assert learnt() == learnt("other")


def test_a_file_and_its_records_are_one(train, learnt, items, tmp_path):
    path = tmp_path / "items.jsonl"
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    train(items, steps=2)
    train(str(path), run="file", steps=2)
    assert learnt() == learnt("file")


def test_function_and_class_are_one(train, items, base, tmp_path, fingerprint):
    options = {"logging_steps": 1, "save_strategy": "no", "use_cpu": True}
    function = train(items, model=base, steps=3, batch_size=4, lr=1e-3, **options | {"seed": 5})
    args = SFTConfig(
        output_dir=str(tmp_path / "class"), max_steps=3, per_device_train_batch_size=4,
        learning_rate=1e-3, seed=5, **options,
    )  # fmt: skip
    trainer = SFTTrainer(base, args, items)
    trainer.train()
    assert fingerprint(trainer.model) == fingerprint(function)


def test_a_seed_is_a_run(train, items, fingerprint):
    runs = [train(items, run=str(i), steps=3, seed=seed) for i, seed in enumerate((1, 1, 2))]
    prints = [fingerprint(model) for model in runs]
    assert prints[0] == prints[1] != prints[2]


def test_every_place_gives_the_same_start(train, items, fingerprint, tmp_path):
    """Run folder, checkpoint folder, .pt files: the next run is the same."""
    first = train(items, steps=2, save_strategy="steps")
    run = tmp_path / "run"
    assert (run / "model_final.pt").read_bytes() == (run / "model_last.pt").read_bytes()
    places = [run, run / "checkpoint-2", run / "model_final.pt", run / "model_last.pt"]
    results = set()
    for i, place in enumerate(places):
        assert fingerprint(Transformer.from_pretrained(place)) == fingerprint(first)
        results.add(fingerprint(train(items, run=f"next-{i}", model=str(place), steps=2, lr=1e-3)))
    assert len(results) == 1


def test_a_transformers_folder_is_a_start(items, train, tmp_path, tokenizer):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=260, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
    )  # fmt: skip
    theirs = transformers.LlamaForCausalLM(config)
    theirs.save_pretrained(tmp_path / "hf")
    tokenizer.save_pretrained(tmp_path / "hf")
    model = train(items, model=tmp_path / "hf", steps=2, lr=0.01)
    assert not (tmp_path / "run" / "model_final.pt").exists()
    tokens = torch.arange(5, 12)[None]
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    torch.testing.assert_close(back(tokens).logits, model(tokens), atol=1e-5, rtol=1e-5)
    trainer = SFTTrainer(theirs, SFTConfig(use_cpu=True), items, processing_class=tokenizer)
    assert trainer.learning_rate == 2e-5 and not trainer.from_scratch


# -- LoRA -------------------------------------------------------------------------------------


def test_lora_trains_adapters_only_and_reloads(train, learnt, items, base, fingerprint, tmp_path):
    model = train(items, model=base, steps=30, lr=0.05, peft_config=LoraConfig(r=4))
    first, last = learnt()
    assert last < first - 0.5
    before, after = Transformer.from_pretrained(base).state_dict(), model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert (tmp_path / "run" / "adapter_config.json").is_file()
    assert not (tmp_path / "run" / "model.safetensors").exists()
    assert fingerprint(Transformer.from_pretrained(tmp_path / "run")) == fingerprint(model)


def test_an_adapter_is_a_start_and_its_training_is_not_lost(train, items, base, tmp_path):
    """A second adapter on a first one, and full training from one: both reload as trained."""
    tokens = torch.arange(5, 12)[None]
    train(items, run="one", model=base, steps=5, lr=0.05, peft_config=LoraConfig(r=2))
    one = Transformer.from_pretrained(tmp_path / "one")(tokens)
    for run, peft_config in (("two", LoraConfig(r=3)), ("full", None)):
        options = {"model": tmp_path / "one", "peft_config": peft_config}
        start = train(items, run=f"{run}-start", steps=1, lr=0, **options)
        torch.testing.assert_close(start(tokens), one, atol=1e-5, rtol=1e-5)
        trained = train(items, run=run, steps=3, lr=0.01, **options)
        assert not torch.allclose(trained(tokens), one, atol=1e-3)
        found = Transformer.from_pretrained(tmp_path / run)(tokens)
        torch.testing.assert_close(found, trained(tokens), atol=1e-5, rtol=1e-5)


def test_a_pt_file_holds_what_the_adapter_learnt(train, items, tmp_path):
    train(items, run="scratch", steps=1)
    start = tmp_path / "scratch" / "model_last.pt"
    model = train(items, model=start, steps=5, lr=0.05, peft_config=LoraConfig(r=2))
    tokens = torch.arange(5, 12)[None]
    found = Transformer.from_pretrained(tmp_path / "run" / "model_final.pt")(tokens)
    torch.testing.assert_close(found, model(tokens), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found, Transformer.from_pretrained(start)(tokens), atol=1e-3)


def test_an_adapter_is_not_written_beside_a_whole_model(train, items, base):
    with pytest.raises(ValueError, match=r"holds a whole model.*another output_dir"):
        train(items, run="base", model=base, steps=1, peft_config=LoraConfig(r=2))


def test_lora_needs_a_model_that_can_be_named(train, items):
    with pytest.raises(ValueError, match="LoRA adapts a pretrained model"):
        train(items, steps=1, peft_config=LoraConfig(r=2))


# -- evaluation data and bad input ------------------------------------------------------------


def test_held_out_data_is_split_by_prompt(items):
    from fastllm.data.records import sft_records

    records = sft_records([{**item, "completion": c} for item in items for c in ("x", "y", "z")])
    train_part, held = split_by_prompt(records, 0.3, 1, _prompt_key)
    assert len(held) == 9 and len(train_part) == 21
    assert not {r.prompt for r in held} & {r.prompt for r in train_part}
    assert split_by_prompt(records, 0.3, 1, _prompt_key) == (train_part, held)
    assert split_by_prompt(records, 0.3, 2, _prompt_key) != (train_part, held)
    assert {r.prompt for r in split_by_prompt(records, 1e-9, 1, _prompt_key)[1]} != set()
    with pytest.raises(DataError, match="share one prompt"):
        split_by_prompt(records[:3], 0.3, 1, _prompt_key)


def test_eval_fraction_reports_loss_and_accuracy(train, items, metrics, tmp_path):
    train(items, steps=2, eval_fraction=0.2)
    (line,) = [line for line in metrics(tmp_path / "run") if "eval_loss" in line]
    assert 0 <= line["eval_mean_token_accuracy"] <= 1 and line["eval_entropy"] > 0


def test_bad_settings_name_their_field(train, items, caplog):
    with pytest.raises(TypeError, match="no field 'loging_steps'; did you mean 'logging_steps'"):
        train(items, loging_steps=3)
    with pytest.raises(ValueError, match=r"lr_scheduler_type: expected one of linear.*'sinus'"):
        train(items, lr_scheduler_type="sinus")
    with pytest.raises(DataError, match=r"items\[1\]: missing 'completion'"):
        train([items[0], {"prompt": "x"}])
    with caplog.at_level(logging.INFO, "fastllm"):
        train([("a", "b" * 90)], steps=1)
    assert "cut to 48 tokens" in caplog.text


def test_bad_input_leaves_no_folder(train, tmp_path):
    for broken in ([], [{"prompt": "x"}], str(tmp_path / "none.jsonl")):
        with pytest.raises(DataError):
            train(broken)
    assert not (tmp_path / "run").exists()

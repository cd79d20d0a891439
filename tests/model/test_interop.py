"""The same numbers as `transformers` and `peft`, both ways, on the same files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastllm import ModelConfig, RewardModel, Transformer
from fastllm.model.adapters import save_adapter
from fastllm.model.lora import LoraConfig, add_lora, disable_lora, merge_lora
from fastllm.model.rotary import RotaryTable
from fastllm.model.weights import load_model, save_model

transformers = pytest.importorskip("transformers")

VOCAB = 96
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}

# Settings of a transformers config by what they are there for; `_type` is the family.
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-tied": {"tie_word_embeddings": True},
    "llama-biases": {"attention_bias": True, "mlp_bias": True},
    "llama-no-gqa": {"num_key_value_heads": 6},
    "llama-head-dim": {"head_dim": 24},
    "llama-llama3": {"rope_parameters": {**LLAMA3, "rope_theta": 50000.0}},
    "llama-linear": {
        "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    },
    "qwen2": {"_type": "qwen2"},
    "qwen2-tied": {"_type": "qwen2", "tie_word_embeddings": True},
    "qwen2-sliding": {
        "_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 5,
        "max_window_layers": 1,
    },
    "qwen2-window-switched-off": {"_type": "qwen2", "sliding_window": 5},
    "qwen3": {"_type": "qwen3", "head_dim": 16},
    "qwen3-sliding": {
        "_type": "qwen3",
        "head_dim": 16,
        "use_sliding_window": True,
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "mistral-sliding": {"_type": "mistral", "sliding_window": 6},
    "mistral-full": {"_type": "mistral", "sliding_window": None},
}


def make_theirs(settings: dict[str, Any], auto: str = "AutoModelForCausalLM") -> nn.Module:
    """A random model of transformers whose every parameter matters to the output."""
    settings = SIZES | settings
    config = transformers.AutoConfig.for_model(settings.pop("_type", "llama"), **settings)
    model = getattr(transformers, auto).from_config(config)
    _randomise(model)
    return model.eval()


def _randomise(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.normal_(std=0.3).add_(0.6)
            else:
                parameter.normal_(std=0.15)


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(3, VOCAB, (2, 21))


@pytest.fixture
def same_logits(tokens: Tensor) -> Callable[[nn.Module, nn.Module], None]:
    """Both models give the same logits, to 1e-5."""

    @torch.no_grad()
    def check(theirs: nn.Module, ours: nn.Module) -> None:
        expected, found = theirs(tokens).logits, ours(tokens)
        assert expected.std() > 0.1, "the test's model says too little"
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)

    return check


def reload_theirs(folder: Path, auto: str = "AutoModelForCausalLM") -> nn.Module:
    model, info = getattr(transformers, auto).from_pretrained(folder, output_loading_info=True)
    for kind, names in info.items():
        assert not names, f"{kind}: {names}"
    return model.eval()


@pytest.mark.parametrize("name", MODELS)
def test_language_model_both_ways(
    name: str, tmp_path: Path, same_logits: Callable[[nn.Module, nn.Module], None]
) -> None:
    theirs = make_theirs(MODELS[name])
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_model(tmp_path / "theirs", Transformer)
    same_logits(theirs, ours)
    ours.save_pretrained(tmp_path / "ours")
    same_logits(reload_theirs(tmp_path / "ours"), ours)
    again = load_model(tmp_path / "ours", Transformer)
    for key, value in ours.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key


@pytest.mark.parametrize("name", ["llama", "llama-llama3", "qwen2", "qwen3", "mistral-sliding"])
def test_a_new_model_of_ours_loads_in_transformers(
    name: str, tmp_path: Path, same_logits: Callable[[nn.Module, nn.Module], None]
) -> None:
    settings = SIZES | MODELS[name]
    rope = dict(settings.pop("rope_parameters", {}))
    settings["rope_theta"] = rope.pop("rope_theta", 10000.0)
    family = settings.pop("_type", "llama")
    ours = Transformer(ModelConfig(model_type=family, rope_scaling=rope or None, **settings))
    _randomise(ours)
    ours.save_pretrained(tmp_path)
    same_logits(reload_theirs(tmp_path), ours)


@pytest.mark.parametrize("tied", [False, True])
def test_shards_both_ways(
    tied: bool, tmp_path: Path, same_logits: Callable[[nn.Module, nn.Module], None]
) -> None:
    theirs = make_theirs({"tie_word_embeddings": tied})
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="40KB")
    assert (tmp_path / "theirs/model.safetensors.index.json").exists()
    ours = load_model(tmp_path / "theirs", Transformer)
    same_logits(theirs, ours)
    save_model(ours, tmp_path / "ours", max_shard_size=40_000)
    assert len(list((tmp_path / "ours").glob("model-*-of-*.safetensors"))) > 2
    same_logits(reload_theirs(tmp_path / "ours"), load_model(tmp_path / "ours", Transformer))


@pytest.mark.parametrize("name", ["llama", "llama-llama3", "llama-linear", "qwen3"])
def test_config_of_transformers_4(
    name: str, tmp_path: Path, same_logits: Callable[[nn.Module, nn.Module], None]
) -> None:
    theirs = make_theirs({"rope_parameters": {"rope_theta": 777.0}} | MODELS[name])
    theirs.save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    rope = raw.pop("rope_parameters")
    raw |= {"rope_theta": rope.pop("rope_theta"), "torch_dtype": raw.pop("dtype")}
    raw["rope_scaling"] = rope if rope["rope_type"] != "default" else None
    if name == "llama-linear":  # the spelling before 4.43
        raw["rope_scaling"] = {"type": "linear", "factor": 4.0}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    same_logits(theirs, load_model(tmp_path, Transformer))


def test_ours_is_written_in_both_spellings(tmp_path: Path) -> None:
    config = ModelConfig(**SIZES, rope_theta=777.0, rope_scaling=dict(LLAMA3))
    Transformer(config).save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    assert raw["rope_theta"] == raw["rope_parameters"]["rope_theta"] == 777.0
    assert raw["rope_scaling"]["factor"] == raw["rope_parameters"]["factor"] == 8.0
    assert raw["dtype"] == raw["torch_dtype"] == "float32"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_files(dtype: torch.dtype, tmp_path: Path, tokens: Tensor) -> None:
    make_theirs({}).to(dtype).save_pretrained(tmp_path / "theirs")
    theirs = reload_theirs(tmp_path / "theirs")
    ours = load_model(tmp_path / "theirs", Transformer)
    assert {p.dtype for p in ours.parameters()} == {dtype}
    ours.save_pretrained(tmp_path / "ours")
    again = reload_theirs(tmp_path / "ours")
    assert again.dtype == dtype
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, theirs(tokens).logits)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize(
    "given", [{}, {"sliding_window": 8}, {"use_sliding_window": True}], ids=str
)
def test_keys_that_are_left_out(family: str, given: dict[str, Any]) -> None:
    """What a config.json does not say means the same in both."""
    raw = {"model_type": family, "num_attention_heads": 64} | given
    raw |= {key: SIZES[key] for key in ("vocab_size", "intermediate_size")}
    raw |= {"hidden_size": 64 * 128, "num_hidden_layers": 30}
    theirs = transformers.AutoConfig.for_model(**raw)
    ours = ModelConfig.from_dict(raw)
    for key in ("num_key_value_heads", "rms_norm_eps", "tie_word_embeddings", "eos_token_id"):
        assert getattr(ours, key) == getattr(theirs, key), key
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or 128)
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    # Llama has no windows, whatever its config.json says.
    window = None if family == "llama" else theirs.sliding_window
    default = ["full_attention" if window is None else "sliding_attention"] * 30
    kinds = getattr(theirs, "layer_types", None) or default
    expected = [window if kind == "sliding_attention" else None for kind in kinds]
    assert [ours.window(layer) for layer in range(30)] == expected


# -- reward models ---------------------------------------------------------------------------------


def padded_batch(pad: int) -> tuple[Tensor, Tensor]:
    """Rows of 9, 4, 1 and 7 tokens; the last one has its pad token in the middle too."""
    batch = torch.full((4, 9), pad)
    for row, length in enumerate([9, 4, 1, 7]):
        batch[row, :length] = torch.randint(3, VOCAB, (length,))
    batch[3, 2] = pad
    return batch, torch.tensor([9, 4, 1, 7])


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
@pytest.mark.parametrize("pad_is_eos", [False, True])
def test_reward_model_both_ways(family: str, pad_is_eos: bool, tmp_path: Path) -> None:
    settings = {"_type": family, "pad_token_id": 2 if pad_is_eos else 0, "eos_token_id": 2}
    theirs = make_theirs(settings | {"num_labels": 1}, "AutoModelForSequenceClassification")
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_model(tmp_path / "theirs", RewardModel)
    batch, lengths = padded_batch(settings["pad_token_id"])
    batch[1, 3] = 2  # an EOS at the end of an answer; read only where it is not the pad token
    with torch.no_grad():
        expected = theirs(batch, attention_mask=(batch != settings["pad_token_id"]).long())
        plain = theirs(batch[:1]).logits[:, 0]
        torch.testing.assert_close(ours(batch[:1]), plain, atol=1e-5, rtol=1e-5)
        # Their mask hides the pad token in the middle of the last row from attention, ours not.
        found = ours(batch)
        torch.testing.assert_close(found[:3], expected.logits[:3, 0], atol=1e-5, rtol=1e-5)
        ours.save_pretrained(tmp_path / "ours")
        again = reload_theirs(tmp_path / "ours", "AutoModelForSequenceClassification")
        assert again.config.num_labels == 1
        theirs_on_ours = again(batch).logits[:, 0]
    torch.testing.assert_close(found, theirs_on_ours, atol=1e-5, rtol=1e-5)
    if not pad_is_eos:
        torch.testing.assert_close(ours(batch, lengths), found)


def test_reward_config_says_what_others_need(tmp_path: Path) -> None:
    RewardModel(ModelConfig(**SIZES, pad_token_id=0)).save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    assert raw["architectures"] == ["LlamaForSequenceClassification"]
    assert (raw["num_labels"], raw["id2label"], raw["pad_token_id"]) == (1, {"0": "LABEL_0"}, 0)
    assert raw["sbert_ce_default_activation_function"].endswith("Identity")
    assert not (tmp_path / "generation_config.json").exists()


# -- adapters --------------------------------------------------------------------------------------

TARGETS = ["q_proj", "v_proj", "down_proj"]


def _randomise_adapters(model: nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "score" in name:
                parameter.normal_(std=0.2)


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_our_adapter_loads_in_peft(
    use_rslora: bool,
    tied: bool,
    tmp_path: Path,
    same_logits: Callable[[nn.Module, nn.Module], None],
) -> None:
    peft = pytest.importorskip("peft")
    make_theirs({"tie_word_embeddings": tied}).save_pretrained(tmp_path / "base")
    ours = load_model(tmp_path / "base", Transformer)
    add_lora(ours, LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, use_rslora=use_rslora))
    _randomise_adapters(ours)
    save_adapter(ours, tmp_path / "adapter", tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    same_logits(peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval(), ours)
    same_logits(peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval(), ours)
    same_logits(
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "adapter").eval(), ours
    )
    same_logits(
        peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval(),
        load_model(tmp_path / "adapter", Transformer),
    )


@pytest.mark.parametrize("targets", [TARGETS, "all-linear"])
def test_pefts_adapter_loads_in_ours(
    targets: list[str] | str,
    tmp_path: Path,
    tokens: Tensor,
    same_logits: Callable[[nn.Module, nn.Module], None],
) -> None:
    peft = pytest.importorskip("peft")
    base = make_theirs({"_type": "qwen2"})
    base.save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    plain = base(tokens).logits.detach()
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets, task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(base, config).eval()
    _randomise_adapters(theirs)
    theirs.save_pretrained(tmp_path / "adapter")
    ours = load_model(tmp_path / "adapter", Transformer)
    same_logits(theirs, ours)
    with torch.no_grad(), disable_lora(ours):
        torch.testing.assert_close(ours(tokens), plain, atol=1e-5, rtol=1e-5)
    merge_lora(ours)
    same_logits(theirs, ours)


def test_reward_adapter_both_ways(tmp_path: Path) -> None:
    """The base is a language model without a pad token; the head travels with the adapter."""
    peft = pytest.importorskip("peft")
    make_theirs({}).save_pretrained(tmp_path / "base")
    ours = load_model(tmp_path / "base", RewardModel, new_head=True)
    ours.config.pad_token_id = 0
    add_lora(ours, LoraConfig(r=4, target_modules=TARGETS))
    _randomise_adapters(ours)
    save_adapter(ours, tmp_path / "ours", tmp_path / "base")
    base = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "base", num_labels=1, pad_token_id=0
    )
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "ours").eval()
    batch, _ = padded_batch(0)
    batch = batch[:3]
    with torch.no_grad():
        found = ours(batch)
        assert found.std() > 0.1
        torch.testing.assert_close(found, theirs(batch).logits[:, 0], atol=1e-5, rtol=1e-5)
        reloaded = load_model(tmp_path / "ours", RewardModel)
        assert torch.equal(reloaded(batch), found)
        assert torch.equal(reloaded.score.weight, ours.score.weight)
        theirs.save_pretrained(tmp_path / "theirs")
        again = load_model(tmp_path / "theirs", RewardModel)
        torch.testing.assert_close(again(batch, torch.tensor([9, 4, 1])), found)
        merge_lora(reloaded)
        reloaded.save_pretrained(tmp_path / "merged")
        merged = reload_theirs(tmp_path / "merged", "AutoModelForSequenceClassification")
        torch.testing.assert_close(merged(batch).logits[:, 0], found, atol=1e-5, rtol=1e-5)
        assert torch.equal(merged.score.weight, ours.score.weight)


# -- rotary tables ---------------------------------------------------------------------------------

ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "large theta": {"rope_type": "default", "rope_theta": 1e6},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 8.0},
    "llama3": {
        **LLAMA3,
        "rope_theta": 500000.0,
        "factor": 32.0,
        "original_max_position_embeddings": 8192,
    },
}


@pytest.mark.parametrize("name", ROPES)
def test_rotary_tables_at_long_positions(name: str) -> None:
    settings = SIZES | {"head_dim": 128, "max_position_embeddings": 131072}
    config = transformers.AutoConfig.for_model("llama", **settings, rope_parameters=ROPES[name])
    ours = ModelConfig.from_dict(config.to_dict())
    positions = torch.tensor([[0, 1, 1000, 8000, 131000]])
    rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
    expected_cos, expected_sin = rotary(torch.zeros(1), positions)
    cos, sin = RotaryTable(ours)(131001, torch.device("cpu"))
    half = ours.head_dim // 2
    for found, expected in ((cos, expected_cos), (sin, expected_sin)):
        assert torch.equal(expected[0, :, :half], expected[0, :, half:])
        torch.testing.assert_close(found[positions[0]], expected[0, :, :half], atol=1e-6, rtol=0)

"""The token step in C++: the same text as op by op, and the trainer's numbers to the last bit."""

from __future__ import annotations

import pytest
import torch

from fastllm.generation import generate
from fastllm.generation.native_step import why_not
from fastllm.layout import PackedLayout
from fastllm.model.lora import add_lora
from fastllm.model.lora_config import LoraConfig
from fastllm.ops import cpp, linear_logprob, same_order, use_backend

pytestmark = pytest.mark.skipif(not cpp.available(), reason=cpp.reason())

NEW = 70  # more than a block of the cache


def logprobs(completions):
    return torch.tensor([c.logprobs for c in completions])


def recomputed(model, prompt, completions):
    """Log-probabilities of one prompt's completions as a trainer computes them [B, NEW]."""
    tokens = torch.tensor([c.token_ids for c in completions])
    copies, length = tokens.shape
    layout = PackedLayout([len(prompt), *[length] * copies], [-1, *[0] * copies])
    row = torch.cat([torch.tensor(prompt), tokens.flatten()])
    reads = len(prompt) + torch.arange(copies * length).view(copies, length) - 1
    reads[:, 0] = len(prompt) - 1
    rows, back = torch.unique(reads, return_inverse=True)
    with torch.no_grad():
        hidden = model.hidden(row, layout, rows)[back.flatten()]
        return linear_logprob(hidden, model.lm_head.weight, tokens.flatten()).view(copies, length)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_same_text_as_op_by_op(build, family, prompts, temperature):
    model = build(family)
    settings = {"temperature": temperature, "num_return_sequences": 3, "seed": 5}
    with use_backend("cpp"):
        native = generate(model, prompts, NEW, stop_token_ids=(7,), **settings)
    with use_backend("torch"):
        ops = generate(model, prompts, NEW, stop_token_ids=(7,), **settings)
    for a, b in zip(native, ops, strict=True):
        assert a.token_ids == b.token_ids and a.finish_reason == b.finish_reason
        assert torch.allclose(torch.tensor(a.logprobs), torch.tensor(b.logprobs), atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("width", [32, 336])
def test_ratio_of_sampler_and_trainer_is_exactly_one(build, family, width):
    """No difference at all, for prompts and batches of any length (without a window)."""
    heads = {"hidden_size": width, "intermediate_size": 2 * width, "vocab_size": 1300}
    model = build(family, **heads, max_position_embeddings=512)
    generator = torch.Generator().manual_seed(1)
    for length, copies in ((1, 1), (63, 3), (64, 2), (130, 5)):
        prompt = torch.randint(0, 1300, (length,), generator=generator).tolist()
        settings = {"num_return_sequences": copies, "stop_token_ids": (), "seed": length}
        with same_order():
            drawn = generate(model, [prompt], NEW, **settings)
            again = recomputed(model, prompt, drawn)
        assert torch.equal(logprobs(drawn), again)


def test_text_does_not_depend_on_threads_or_on_company(build, prompts):
    model = build("qwen3")
    settings = {"num_return_sequences": 4, "seed": 2, "stop_token_ids": ()}
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            with same_order():
                found.append(generate(model, prompts, NEW, **settings))
    finally:
        torch.set_num_threads(threads)
    assert found[0] == found[1] == found[2]
    with same_order():
        alone = generate(model, prompts[2:3], NEW, request_ids=[2], **settings)
    assert alone == found[0][8:12]


def test_bf16_is_as_near_to_fp32_as_op_by_op(build, family, prompts):
    model = build(family)
    settings = {"temperature": 0.0, "stop_token_ids": ()}
    model.model.compute_dtype = torch.bfloat16
    with use_backend("cpp"):
        native = generate(model, prompts, NEW, **settings)
    with use_backend("torch"):
        ops = generate(model, prompts, NEW, **settings)
    model.model.compute_dtype = None

    def error(completions):
        pairs = zip(prompts, completions, strict=True)
        exact = torch.cat([recomputed(model, prompt, [c]) for prompt, c in pairs])
        return (logprobs(completions) - exact).abs().mean()

    assert 0 < error(native) < 1.3 * error(ops)


def test_adapters_are_merged(build, prompts):
    model = build("llama")
    add_lora(model, LoraConfig(r=4, lora_alpha=8, target_modules=("q_proj", "down_proj")))
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    with use_backend("cpp"):
        native = generate(model, prompts, NEW, temperature=0.0, stop_token_ids=())
    with use_backend("torch"):
        ops = generate(model, prompts, NEW, temperature=0.0, stop_token_ids=())
    assert [c.token_ids for c in native] == [c.token_ids for c in ops]
    assert torch.allclose(logprobs(native), logprobs(ops), atol=1e-5)


def test_int8_is_near_and_says_how_near(build, prompts):
    from fastllm.generation import Engine

    model = build("llama", hidden_size=128, intermediate_size=256)
    engine = Engine(model, weights="int8")
    assert "int8 weights" in engine.description and "weights off by" in engine.description
    with use_backend("cpp"):
        exact = generate(model, prompts, 8, temperature=0.0, stop_token_ids=())
        near = generate(model, prompts, 8, temperature=0.0, stop_token_ids=(), weights="int8")
    # The first token comes from the prefill, which reads the weights as they are.
    assert [c.token_ids[0] for c in near] == [c.token_ids[0] for c in exact]
    same = [a for a, b in zip(near, exact, strict=True) if a.token_ids == b.token_ids]
    assert len(same) >= 3
    for a, b in zip(near, exact, strict=True):
        assert abs(a.logprobs[1] - b.logprobs[1]) < 0.2
    with use_backend("torch"), pytest.raises(ValueError, match="int8"):
        Engine(model, weights="int8")


def test_says_why_it_cannot_serve(build):
    model = build("llama")
    assert why_not(model) is None
    with use_backend("torch"):
        assert why_not(model) == "the torch backend was requested"
    model.model.compute_dtype = torch.float16
    assert "float16" in why_not(model)
    assert "odd" in why_not(build("llama", intermediate_size=47))


def test_logits_that_are_not_finite_are_an_error(build, prompts):
    model = build("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[3, 3] = torch.inf
    with use_backend("cpp"), pytest.raises(RuntimeError, match="not finite"):
        generate(model, prompts, 8)

"""Section `decode`: attention over a cache, and whole generations by a model of half a billion."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastllm import Transformer, ops
from fastllm.generation import Engine, SamplingParams

from ..harness import in_turns
from ..records import OURS, Record
from . import flops, loops, material
from .case import Case, Context
from .contest import Contender, Op, Work, ours
from .device import first_line
from .exact import Inputs, by_autograd
from .goals import Share, judged

NAME = "decode"
BLOCK = 64


def cases(context: Context) -> list[Case]:
    """The size with a goal, groups on a shared prompt, the sizes of a small model; then a model."""
    sizes: list[tuple[int, ...]] = context.pick(
        [
            (64, 1, 3968, 128, 32, 8, 128),
            (8, 8, 3968, 128, 32, 8, 128),
            (32, 8, 512, 256, 14, 2, 64),
            (256, 1, 512, 256, 14, 2, 64),
            (1, 1, 16256, 128, 32, 8, 128),
        ],
        [(64, 1, 3968, 128, 32, 8, 128)],
        [(3, 1, 70, 20, 4, 2, 16), (2, 2, 70, 20, 4, 2, 16)],
    )
    found = [attention(*size).case() for size in sizes]
    batch, prompt, new = _generation(context)
    label = f"0.5B, batch {batch}, {prompt} + {new}"
    return [
        *found[:2],
        Case(NAME, "generation", label, _generate, seconds=8.0),
        *found[2:],
    ]


def attention(
    prompts: int, group: int, prompt: int, tail: int, heads: int, key_heads: int, head_dim: int
) -> Op:
    """One token of each sequence; each key and value that some sequence sees is read once."""
    size = prompts * group
    prompt_blocks, tail_blocks = -(-prompt // BLOCK), -(-tail // BLOCK)
    used = prompts * prompt_blocks

    def inputs(device: torch.device, generator: torch.Generator) -> Inputs:
        def normal(*shape: int) -> Tensor:
            found = torch.randn(shape, generator=generator, device=device, dtype=torch.float32)
            return found.to(torch.bfloat16)

        def full(count: int, value: int) -> Tensor:
            return torch.full((count,), value, dtype=torch.int32, device=device)

        count = used + size * tail_blocks
        blocks = torch.randperm(count, generator=generator, device=device).int()
        groups = torch.arange(prompts, dtype=torch.int32, device=device)
        return {
            "q": normal(size, heads, head_dim),
            "keys": normal(count, key_heads, head_dim, BLOCK),
            "values": normal(count, key_heads, BLOCK, head_dim),
            "prefix_blocks": blocks[:used].view(prompts, prompt_blocks),
            "prefix_lengths": full(prompts, prompt),
            "group": groups.repeat_interleave(group),
            "tail_blocks": blocks[used:].view(size, tail_blocks),
            "tail_lengths": full(size, tail),
        }

    def contenders() -> list[Contender]:
        return [
            ours(ops.decode_attention),
            Contender("SDPA", sdpa, prepare=whole_cache),
            Contender("grouped products", grouped_products, prepare=whole_cache),
            Contender("compile", grouped_products, prepare=whole_cache, compile=True),
        ]

    cached = prompts * prompt + size * tail
    amount = 2.0 * (2 * cached * key_heads * head_dim + 2 * size * heads * head_dim)
    goal = Share(0.85) if (size, prompt + tail, group) == (64, 4096, 1) else None
    return Op(
        NAME,
        "decode attention",
        f"{prompts}x{group} {prompt}+{tail} {heads}/{key_heads}x{head_dim}",
        inputs,
        contenders,
        by_autograd(ops.decode_attention_reference),
        Work(amount, goal=goal),
    )


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's op on a cache [B, K, L, D], which has the prompt once for each sequence."""
    return F.scaled_dot_product_attention(q[:, :, None], k, v, enable_gqa=True)[:, :, 0]


def grouped_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The heads that share a key head as the rows of one product."""
    size, key_heads, _, head_dim = k.shape
    grouped = q.view(size, key_heads, -1, head_dim)
    weights = (grouped @ k.transpose(2, 3) * head_dim**-0.5).float().softmax(-1)
    return (weights.to(q.dtype) @ v).view_as(q)


def whole_cache(inputs: Inputs) -> Inputs:
    """The cache that a generating program keeps: [B, K, L, D], prompt and tail in one piece."""
    group = inputs["group"].long()
    runs = [
        (inputs["prefix_blocks"][group].long(), int(inputs["prefix_lengths"][0])),
        (inputs["tail_blocks"].long(), int(inputs["tail_lengths"][0])),
    ]

    def gathered(pool: Tensor) -> Tensor:
        parts = [pool[at].transpose(1, 2).flatten(2, 3)[:, :, :count] for at, count in runs]
        return torch.cat(parts, dim=2).contiguous()

    keys = inputs["keys"].transpose(2, 3)
    return {"q": inputs["q"], "k": gathered(keys), "v": gathered(inputs["values"])}


# -- whole generations -----------------------------------------------------------------------------

Draw = Callable[[int], list[list[int]]]
"""Greedy completions of so many tokens."""


def _generation(context: Context) -> tuple[int, int, int]:
    """Batch, tokens of a prompt, new tokens."""
    return context.pick((256, 512, 256), (256, 512, 64), (2, 4, 200))


def _generate(context: Context) -> Iterator[Record]:
    batch, prompt, new = _generation(context)
    config = material.config(material.QWEN_HALF_B, context)
    model = material.model(Transformer, material.QWEN_HALF_B, context).eval()
    model.to(torch.bfloat16)
    generator = torch.Generator().manual_seed(context.seed)
    ids = torch.randint(*material.IDS, (batch, prompt), generator=generator)
    blank = Record(NAME, "generation", f"0.5B, batch {batch}, {prompt} + {new}", "bfloat16", OURS)
    draws: dict[str, Callable[[], Draw]] = {
        OURS: lambda: _engine(model, ids, "graphs" if _on_gpu(context) else "auto"),
        f"{OURS}, without graphs": lambda: _engine(model, ids, "ops"),
        "transformers, static cache": lambda: loops.generation(
            context, config, model.state_dict(), ids
        ),
    }
    amount = (new - 1) * flops.decoding_bytes(config, batch, prompt + new / 2)
    for name, make in draws.items():
        context.progress(f"generation: {name}")
        own = replace(blank, contender=name)
        if name != OURS and context.left < 15:
            yield replace(own, note="left out: the section's time is over")
            continue
        try:
            draw = make()
            yield from _decoded(own, draw, new, amount, batch, model, ids, context)
        except Exception as error:
            if name == OURS or not context.device.alive():
                raise
            kind = "not here" if isinstance(error, ImportError) else "failed"
            yield replace(own, note=f"{kind}: {first_line(error)}")
        context.device.forget()


def _on_gpu(context: Context) -> bool:
    return context.device.place.type == "cuda"


def _decoded(
    blank: Record,
    draw: Draw,
    new: int,
    amount: float,
    batch: int,
    model: Any,
    ids: Tensor,
    context: Context,
) -> Iterator[Record]:
    """What is decoded after the first token, which is prefill: the whole less that."""
    completions = draw(new)
    wrong = _regret(completions, model, ids) if blank.contender.startswith(OURS) else ""
    if wrong:
        yield replace(blank, note=wrong)
        return

    def timed(count: int) -> float:
        context.device.synchronize()
        begun = time.perf_counter()
        draw(count)
        context.device.synchronize()
        return time.perf_counter() - begun

    # The least of some, since what disturbs it only adds: the difference is never too small.
    prefill = min(timed(1) for _ in range(3))

    def block() -> float:
        return max(timed(new) - prefill, 1e-9)

    taken = in_turns({blank.contender: block}, min(3, context.rounds), sample=lambda: None).rounds
    record = replace(blank, rounds=taken[blank.contender], work=amount, unit="B")
    rate = context.rates.get("copy", 0.0)
    share = (record.rate or 0.0) / rate if rate else None
    tokens = batch * (new - 1) / (record.seconds or 1.0)
    record = replace(record, roofline=share, note=f"{tokens:,.0f} tokens/s")
    yield replace(record, **judged(record, Share(0.60) if record.contender == OURS else None))


def _engine(model: Any, ids: Tensor, step: Any) -> Draw:
    engine = Engine(model, step=step, max_batch_size=len(ids), prefill_tokens=32768)
    prompts = ids.tolist()

    def draw(new: int) -> list[list[int]]:
        params = SamplingParams(max_new_tokens=new, temperature=0.0, stop_token_ids=())
        places = {engine.add_request(prompt, params): at for at, prompt in enumerate(prompts)}
        drawn: list[list[int]] = [[] for _ in prompts]
        while engine.has_unfinished_requests():
            for sequence in engine.advance(64):
                assert sequence.tokens is not None
                drawn[places[sequence.request.id]] = sequence.tokens.since(0)[0]
        return drawn

    return draw


# How far behind the best token a drawn one may be, in log-probability, by rounding in bf16.
REGRET = 0.15


def _regret(completions: list[list[int]], model: Any, ids: Tensor) -> str:
    """Whether each token of a few completions is as likely as the best, by PyTorch in fp32."""
    for row in (0, len(completions) // 2, len(completions) - 1):
        drawn = torch.tensor(completions[row])
        whole = torch.cat([ids[row], drawn])[None].to(next(model.parameters()).device)
        with torch.no_grad(), ops.use_backend("torch"):
            logits = model(whole)
        logits = logits[0] if logits.dim() == 3 else logits
        logp = logits[len(ids[row]) - 1 : -1].float().log_softmax(-1)
        behind = logp.max(-1).values - logp.gather(1, whole[0, len(ids[row]) :, None]).squeeze(1)
        if not float(behind.max()) <= REGRET:
            return f"WRONG, not timed: a token is {float(behind.max()):.2g} behind the best"
    return ""

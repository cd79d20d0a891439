"""`generate`: completions of prompts, with the log-probability of every token."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ..model import ModelConfig, Transformer
from .rollout import Rollout
from .sampling import Draw, SamplingParams, random_keys


@dataclass(frozen=True, slots=True)
class Completion:
    """What the model wrote after a prompt."""

    token_ids: list[int]
    """The tokens, with the stop token where there is one."""
    logprobs: list[float]
    """Log-probability of each token under temperature alone: log_softmax(logits / temperature),
    at temperature 1 when greedy. This is what a trainer computes again."""
    sampling_logprobs: list[float]
    """Log-probability of each token under the distribution that it was drawn from, that is with
    the filters and the repetition penalty; 0 when greedy."""
    finish_reason: Literal["stop", "length"]
    """"stop" after a stop token, "length" after `max_new_tokens`."""


def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float = 1.0,
    *,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    num_return_sequences: int = 1,
    stop_token_ids: Sequence[int] | None = None,
    seed: int | None = None,
    request_ids: Sequence[int] | None = None,
    max_batch_size: int | None = 256,
    prefill_tokens: int = 8192,
) -> list[Completion]:
    """Complete token prompts.

    A prompt is computed and stored once however many sequences continue it, and a sequence
    leaves the batch with its last token. What a sequence says depends on `seed`, its request id
    and its number among the completions of its prompt, and not on what else is in the batch (up
    to the rounding of matrix products, whose order of summation may follow the batch size).

    Args:
        model: the language model; no gradients are recorded.
        prompts: token ids of each prompt.
        max_new_tokens: longest completion, in tokens.
        temperature, top_k, top_p, min_p, repetition_penalty: see `SamplingParams`; 0 is greedy.
        num_return_sequences: completions of each prompt.
        stop_token_ids: tokens that end a completion; None for the config's `eos_token_id`.
        seed: None draws one from PyTorch's default generator.
        request_ids: 64-bit integer that names each prompt's random stream; None for 0, 1, 2, ...
        max_batch_size: sequences that run at a time, the others wait for a free row; None for all.
        prefill_tokens: prompt tokens computed in one pass, unless one prompt alone is longer.

    Returns:
        Completions, all those of the first prompt first.

    Raises:
        ValueError: an option out of its range, or a prompt that is empty, too long for the model
            with its completion, or has a token outside the vocabulary.
        RuntimeError: the model's logits are not finite.
    """
    params = SamplingParams(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
    )
    counts = {
        "max_new_tokens": max_new_tokens,
        "num_return_sequences": num_return_sequences,
        "max_batch_size": max_batch_size,
        "prefill_tokens": prefill_tokens,
    }
    for name, count in counts.items():
        if count is not None and count < 1:
            raise ValueError(f"{name}: expected at least 1, found {count}")
    _check_prompts(prompts, max_new_tokens, model.config)
    stops = _stops(stop_token_ids, model.config)
    keys = _keys(seed, request_ids, len(prompts), num_return_sequences)
    if not prompts:
        return []
    # Not inference_mode: what is cached here, such as the rotary tables, serves training too.
    with torch.no_grad(), _evaluating(model):
        drawn = Rollout(
            model,
            prompts,
            keys.to(model.lm_head.weight.device),
            copies=num_return_sequences,
            params=params,
            max_new_tokens=max_new_tokens,
            stop_token_ids=stops,
            max_batch_size=max_batch_size,
            prefill_tokens=prefill_tokens,
        ).run()
    return _completions(drawn, keys.numel(), set(stops))


def _check_prompts(
    prompts: Sequence[Sequence[int]], max_new_tokens: int, config: ModelConfig
) -> None:
    for number, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ValueError(f"prompt {number} is empty; it needs at least one token")
        if len(prompt) + max_new_tokens > config.max_position_embeddings:
            raise ValueError(
                f"prompt {number} has {len(prompt)} tokens; with max_new_tokens {max_new_tokens} "
                f"that passes the model's max_position_embeddings {config.max_position_embeddings}"
            )
        low, high = min(prompt), max(prompt)
        if low < 0 or high >= config.vocab_size:
            raise ValueError(
                f"prompt {number} has token {low if low < 0 else high}; the model's vocabulary is "
                f"0..{config.vocab_size - 1}"
            )


def _stops(stop_token_ids: Sequence[int] | None, config: ModelConfig) -> list[int]:
    if stop_token_ids is None:
        return config.eos_token_ids
    for token in stop_token_ids:
        if not 0 <= token < config.vocab_size:
            raise ValueError(
                f"stop_token_ids: expected ids in 0..{config.vocab_size - 1}, found {token}"
            )
    return list(stop_token_ids)


def _keys(seed: int | None, request_ids: Sequence[int] | None, prompts: int, copies: int) -> Tensor:
    if request_ids is None:
        request_ids = range(prompts)
    if len(request_ids) != prompts:
        raise ValueError(f"request_ids: expected {prompts} (prompts), found {len(request_ids)}")
    if seed is None:
        seed = int(torch.randint(1 << 62, ()))
    ids = torch.tensor(list(request_ids), dtype=torch.int64).repeat_interleave(copies)
    return random_keys(seed, ids, torch.arange(copies).repeat(prompts))


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode; afterwards every module is in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _completions(
    drawn: list[tuple[Tensor, Draw]], sequences: int, stops: set[int]
) -> list[Completion]:
    """Sort what was drawn step by step into one completion per sequence."""
    index = torch.cat([index for index, _ in drawn]).cpu()
    order = index.argsort(stable=True)
    columns = [
        torch.cat(column).cpu()[order] for column in zip(*(d for _, d in drawn), strict=True)
    ]
    if not columns[1].isfinite().all():
        bad = int(index[order][~columns[1].isfinite()][0])
        raise RuntimeError(f"the model's logits are not finite (sequence {bad} of {sequences})")
    lengths = index.bincount(minlength=sequences).tolist()
    pieces = zip(*([p.tolist() for p in column.split(lengths)] for column in columns), strict=True)
    return [
        Completion(tokens, logp, sampling_logp, "stop" if tokens[-1] in stops else "length")
        for tokens, logp, sampling_logp in pieces
    ]

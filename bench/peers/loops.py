"""What one writes with transformers and no trainer: model, loss, backward, clip, AdamW."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from bench.steps.job import Job
from bench.steps.turns import Block


def reward_loop(job: Job) -> Block:
    """Pairs of one length: no padding, and no mask to look at."""
    model = _model(AutoModelForSequenceClassification, job, num_labels=1).train()

    def loss(ids: Tensor) -> Tensor:
        with _autocast(job):
            scores = model(input_ids=ids, use_cache=False).logits.squeeze(-1)
        chosen, rejected = scores.float().chunk(2)
        return -F.logsigmoid(chosen - rejected).mean()

    def ids(pairs: list[dict[str, list[int]]]) -> Tensor:
        sides = [p["chosen_ids"] for p in pairs] + [p["rejected_ids"] for p in pairs]
        return torch.tensor(sides)

    return _training(job, model, loss, ids)


def sft_loop(job: Job) -> Block:
    """Sequences of one length, every token a target."""
    model = _model(AutoModelForCausalLM, job).train()

    def loss(ids: Tensor) -> Tensor:
        with _autocast(job):
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        return F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())

    return _training(job, model, loss, lambda rows: torch.tensor([r["input_ids"] for r in rows]))


def score(job: Job) -> Block:
    """Sequences of one length, as a batch."""
    run = _scorer(job)
    ids = torch.tensor([record["ids"] for record in job.records])

    def block(count: int) -> list[float]:
        for _ in range(count):
            scores = run(ids, None)
        return scores.tolist()

    return block


def score_pairs(job: Job) -> Block:
    """Sequences of real lengths, padded to the longest of their batch."""
    run = _scorer(job)
    pad = AutoConfig.from_pretrained(job.model).pad_token_id
    batches = job.batches(job.records)

    def scores(pairs: list[dict[str, list[int]]]) -> Tensor:
        sides = [p["chosen_ids"] for p in pairs] + [p["rejected_ids"] for p in pairs]
        order = torch.arange(len(sides))
        if job.settings.get("sort"):
            order = torch.tensor([len(ids) for ids in sides]).argsort()
        found = torch.empty(len(sides))
        for part in order.chunk(4 if job.settings.get("sort") else 1):
            found[part] = run(*_padded([sides[i] for i in part], pad))
        return found

    def block(count: int) -> list[float]:
        found = [scores(next(batches)) for _ in range(count)]
        return found[-1].tolist()

    return block


def group_pass(job: Job) -> Block:
    """A GRPO group as TRL computes it: every completion behind its own copy of the prompt."""
    from trl.trainer.utils import entropy_from_logits, selective_log_softmax

    model = _model(AutoModelForCausalLM, job).train()
    parameters = list(model.parameters())
    (record,) = job.records
    ids = torch.tensor([record["ids"] + completion for completion in record["completions"]])
    mask, new = torch.ones_like(ids), len(record["completions"][0])
    advantages = torch.tensor(record["advantages"])[:, None]

    def step() -> tuple[float, float]:
        logits = model(
            input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=new + 1
        ).logits[:, :-1]
        logp = selective_log_softmax(logits, ids[:, -new:])
        with torch.no_grad():
            entropy_from_logits(logits)
        loss = -(advantages * logp).mean()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(parameters, 1.0)
        for parameter in parameters:
            parameter.grad = None
        return float(loss.detach()), float(norm)

    def block(count: int) -> list[float]:
        for _ in range(count):
            found = step()
        return list(found)

    return block


BLOCKS = {
    "rm": reward_loop,
    "sft": sft_loop,
    "score": score,
    "score_pairs": score_pairs,
    "group_pass": group_pass,
}


def _training(
    job: Job, model: nn.Module, loss: Callable[[Tensor], Tensor], ids: Callable[[Any], Tensor]
) -> Block:
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=job.learning_rate, weight_decay=0.0, fused=True)
    batches = job.batches(job.in_order)
    forward = torch.compile(loss) if job.settings.get("compile") else loss

    def step() -> Tensor:
        value = forward(ids(next(batches)))
        value.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return value.detach()

    def block(count: int) -> list[float]:
        return [float(torch.stack([step() for _ in range(count)]).float().mean())]

    return block


def _scorer(job: Job) -> Callable[[Tensor, Tensor | None], Tensor]:
    model = _model(AutoModelForSequenceClassification, job, num_labels=1).eval()

    def scores(ids: Tensor, mask: Tensor | None) -> Tensor:
        with _autocast(job):
            found = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        return found.squeeze(-1).float()

    forward = torch.compile(scores) if job.settings.get("compile") else scores

    def run(ids: Tensor, mask: Tensor | None) -> Tensor:
        with torch.no_grad():
            return forward(ids, mask)

    return run


def _padded(rows: list[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    lengths = torch.tensor([len(row) for row in rows])
    longest = int(lengths.max())
    ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows])
    return ids, (torch.arange(longest) < lengths[:, None]).long()


def _model(kind: Any, job: Job, **options: Any) -> Any:
    dtype = torch.bfloat16 if job.settings["dtype"] == "bf16" else torch.float32
    return kind.from_pretrained(job.model, dtype=dtype, attn_implementation="sdpa", **options)


def _autocast(job: Job) -> Any:
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=job.settings["dtype"] == "amp")

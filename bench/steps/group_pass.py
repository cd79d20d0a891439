"""Forward and backward of one GRPO group, by itself: the prompt once, or once for each completion.

The loss is the policy gradient's, mean(-advantage * logp): on policy, GRPO's gradients are these.
"""

from __future__ import annotations

import torch

from bench.steps.job import Job
from bench.steps.turns import Block
from fastllm import Transformer, ops
from fastllm.data.packing import pack_groups


def group_pass(job: Job) -> Block:
    """Settings: `share_prefix` and `packing`, as in GRPOConfig. Compared: loss, gradients' norm."""
    model = Transformer.from_pretrained(job.model).train()
    parameters = list(model.parameters())
    (record,) = job.records
    prompt, completions = record["ids"], record["completions"]
    padded = len(prompt) + max(map(len, completions))
    advantages = torch.tensor(record["advantages"])

    def step() -> tuple[float, float]:
        batch = pack_groups(
            [prompt],
            completions,
            [0] * len(completions),
            share_prefix=job.settings.get("share_prefix", True),
            pad_to=None if job.settings.get("packing", True) else padded,
        )
        hidden = model.hidden(batch.input_ids, batch.layout, batch.rows)
        logp, _ = ops.linear_logprob(
            hidden[batch.source], model.lm_head.weight, batch.targets, entropy=True
        )
        loss = -(advantages[batch.sequence] * logp).mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for parameter in parameters:
            parameter.grad = None
        return float(loss.detach()), float(norm)

    def block(count: int) -> list[float]:
        for _ in range(count):
            found = step()
        return list(found)

    return block

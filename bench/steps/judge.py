"""Whether what somebody drew greedily is what the model says, whatever the precision.

Of two nearly even tokens, rounding chooses, and all that follows is another text: completions
cannot be compared token by token. A token is right if the model, in fp32 on PyTorch's own
operations, thinks it as good as the best one in its place after the very tokens that were drawn
before it. So transformers' tokens are judged as ours are.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from fastllm import PackedLayout, Transformer
from fastllm.ops.backend import use_backend

from .job import Job

# Of a large batch, so many tokens are looked at, of completions spread over it.
TOKENS = 4096


def regrets(folder: Path, found: list[float]) -> list[float]:
    """Log-probability that each token of the completions falls behind the best one by.

    Args:
        folder: of the job.
        found: all tokens of all completions, once for each block.
    """
    job = Job.read(folder, {})
    lengths, whole = job.lengths, sum(job.lengths)
    if not found or len(found) % whole:
        return [float("inf")]
    prompts = [record["ids"] for record in job.records for _ in range(job.group)]
    count = TOKENS // (max(map(len, prompts)) + max(lengths))
    count = min(len(prompts), max(2, count))
    chosen = torch.linspace(0, len(prompts) - 1, count).round().long().tolist()
    blocks = torch.tensor(found).long().view(-1, whole).unique(dim=0)
    return [
        regret
        for completions in (block.split(lengths) for block in blocks)
        for i in chosen
        for regret in _regrets(job.model, prompts[i], completions[i])
    ]


def _regrets(model: str, prompt: list[int], drawn: Tensor) -> list[float]:
    policy = _model(model)
    if not ((drawn >= 0) & (drawn < policy.config.vocab_size)).all():
        return [float("inf")] * len(drawn)
    ids = torch.cat([torch.tensor(prompt), drawn])[:-1]
    rows = torch.arange(len(prompt) - 1, len(ids))
    with torch.no_grad(), use_backend("torch"):
        logits = policy.lm_head(policy.hidden(ids, PackedLayout([len(ids)]), rows))
    logp = logits.log_softmax(-1)
    return (logp.amax(-1) - logp.gather(1, drawn[:, None])[:, 0]).tolist()


@lru_cache(maxsize=1)
def _model(folder: str) -> Transformer:
    return Transformer.from_pretrained(folder).eval()

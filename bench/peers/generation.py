"""`transformers.generate`, greedy, to the full length."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM

from bench.steps.job import Job
from bench.steps.turns import Block


def generate(job: Job) -> Block:
    settings = job.settings
    dtype = torch.bfloat16 if settings["dtype"] == "bf16" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=dtype).eval()
    if settings.get("compile"):
        model.forward = torch.compile(model.forward)
    ids = torch.tensor([record["ids"] for record in job.records])
    options = {
        "attention_mask": torch.ones_like(ids),
        "do_sample": False,
        "min_new_tokens": job.new_tokens,
        "max_new_tokens": job.new_tokens,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    if settings.get("cache") == "static":
        options["cache_implementation"] = "static"

    def block(count: int) -> list[float]:
        with torch.no_grad():
            for _ in range(count):
                drawn = model.generate(ids, **options)
        return drawn[:, ids.shape[1] : ids.shape[1] + 8].flatten().float().tolist()

    return block

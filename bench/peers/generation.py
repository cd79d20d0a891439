"""`transformers.generate`, greedy, to the full length."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM

from bench.steps.drawing import Drawn, in_parts
from bench.steps.job import Job
from bench.steps.turns import Block


def generate(job: Job) -> Block:
    settings = job.settings
    dtype = torch.bfloat16 if settings["dtype"] == "bf16" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=dtype).eval()
    if settings.get("compile"):
        model.forward = torch.compile(model.forward)
    ids = torch.tensor([record["ids"] for record in job.records]).repeat_interleave(job.group, 0)
    new = max(job.lengths)
    options = {
        "attention_mask": torch.ones_like(ids),
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 0,
        "return_dict_in_generate": True,
    }
    if settings.get("cache") == "static":
        options["cache_implementation"] = "static"

    def draw(whole: bool) -> Drawn:
        count = new if whole else 1
        with torch.no_grad():
            found = model.generate(ids, min_new_tokens=count, max_new_tokens=count, **options)
        layers = found.past_key_values.layers
        held = sum(t.nbytes for layer in layers for t in (layer.keys, layer.values))
        return Drawn(found.sequences[:, ids.shape[1] :].tolist(), held)

    return in_parts(draw, job.lengths, [new] * len(ids))

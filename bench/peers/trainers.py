"""TRL's trainers, as they come and tuned for a CPU.

Tuned is fp32 (bf16 is slower for PyTorch on processors without AMX), activations kept instead of
recomputed, AdamW fused. The records come in the order in which fastllm's trainers draw them.
"""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)
from trl import GRPOConfig, GRPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from bench.peers.stopwatch import Stopwatch
from bench.steps.job import Job, letters
from bench.steps.turns import Line, Turns


class Ending:
    """A tokenizer that puts EOS after every text.

    Reward models are trained on texts that end so, in TRL too; its GRPO leaves EOS out when it asks
    them for rewards. fastllm scores what the model was trained on, so here both do.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, text: list[str], **options: Any) -> Any:
        return self._tokenizer([row + self._tokenizer.eos_token for row in text], **options)


class Clock(Turns, TrainerCallback):
    """Our callback, and nothing at the other events."""


def reward_trainer(line: Line, job: Job, scratch: str) -> RewardTrainer:
    return RewardTrainer(
        model=_reward_model(job.model),
        args=RewardConfig(**_in_order(job, scratch), max_length=job.max_length),
        train_dataset=Dataset.from_list(job.in_order),
        processing_class=AutoTokenizer.from_pretrained(job.model),
        callbacks=[Clock(line)],
    )


def sft_trainer(line: Line, job: Job, scratch: str) -> SFTTrainer:
    packing = job.settings.get("packing", False)
    arguments = _in_order(job, scratch)
    if packing:
        # It packs the longest first: in order, no batch would be like the next.
        arguments = _arguments(job, scratch)
        arguments["per_device_train_batch_size"] = job.settings["rows"]
    return SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32),
        args=SFTConfig(**arguments, max_length=job.max_length, packing=packing),
        train_dataset=Dataset.from_list(job.in_order),
        processing_class=AutoTokenizer.from_pretrained(job.model),
        callbacks=[Clock(line)],
    )


def grpo_trainer(line: Line, job: Job, scratch: str) -> GRPOTrainer:
    tokenizer = AutoTokenizer.from_pretrained(job.model, padding_side="left")
    reward: Any = _reward_model(job.reward_model) if job.reward_model else letters
    reader: Any = Ending(tokenizer) if job.reward_model else None
    watch = Stopwatch()
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32),
        reward_funcs=reward,
        args=GRPOConfig(
            **_arguments(job, scratch),
            num_generations=job.group,
            max_completion_length=job.new_tokens,
            shuffle_dataset=False,
            # Completions of full length, as fastllm draws them from a model without an EOS.
            generation_kwargs={"min_new_tokens": job.new_tokens, "max_new_tokens": job.new_tokens},
        ),
        train_dataset=Dataset.from_list(job.records),
        processing_class=tokenizer,
        reward_processing_classes=reader,
        callbacks=[Clock(line, ("reward", "completions/mean_length"), watch.parts)],
    )
    watch.follow(trainer)
    return trainer


TRAINERS: dict[str, Any] = {"rm": reward_trainer, "sft": sft_trainer, "grpo": grpo_trainer}


def _in_order(job: Job, scratch: str) -> dict[str, Any]:
    return _arguments(job, scratch) | {"train_sampling_strategy": "sequential"}


def _arguments(job: Job, scratch: str) -> dict[str, Any]:
    common = {
        "output_dir": scratch,
        "use_cpu": True,
        "per_device_train_batch_size": job.batch // job.passes,
        "gradient_accumulation_steps": job.passes,
        "max_steps": job.endless,
        "learning_rate": job.learning_rate,
        "lr_scheduler_type": "constant",
        "logging_steps": job.endless,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": job.seed,
    }
    if job.settings.get("defaults"):
        return common
    return common | {
        "bf16": job.settings["dtype"] == "amp",
        "gradient_checkpointing": False,
        "optim": "adamw_torch_fused",
        "torch_compile": job.settings.get("compile", False),
    }


def _reward_model(folder: str) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=torch.float32, num_labels=1
    )

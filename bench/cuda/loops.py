"""What one writes with transformers and no trainer: model, loss, backward, clip, AdamW.

Weights and arithmetic in bf16 and AdamW's state with them, which is less work than ours does with
its fp32 master weights.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastllm import ModelConfig, Tokenizer

from . import liger as liger_kernel
from . import material
from .case import Context

WARM, MEASURED = 2, 6
LEARNING_RATE = 1e-5

Steps = Callable[[], tuple[float, float]]
Start = dict[str, Tensor]


def has_liger() -> bool:
    """Whether Liger-Kernel is installed."""
    return liger_kernel.installed()


def sft(context: Context, sizes: ModelConfig, start: Start, ids: Tensor, liger: bool) -> Steps:
    """Sequences of one length: no padding."""
    model = _model("CausalLM", sizes, start, context, liger)
    ids = ids.to(context.device.place)
    options = {} if liger else {"use_cache": False}
    return _steps(context, model, lambda: model(input_ids=ids, labels=ids, **options).loss)


def reward(
    context: Context, sizes: ModelConfig, start: Start, pairs: list[tuple[list[int], list[int]]]
) -> Steps:
    """Both sides of all pairs as one batch, padded to the longest, as TRL has them."""
    model = _model("SequenceClassification", sizes, start, context)
    sides = [pair[side] for side in (0, 1) for pair in pairs]
    longest = max(map(len, sides))
    pad = sizes.pad_token_id or 0
    rows = torch.tensor([side + [pad] * (longest - len(side)) for side in sides])
    lengths = torch.tensor([len(side) for side in sides])
    mask = (torch.arange(longest) < lengths[:, None]).long()
    rows, mask = rows.to(context.device.place), mask.to(context.device.place)

    def loss() -> Tensor:
        scores = model(input_ids=rows, attention_mask=mask, use_cache=False).logits.squeeze(-1)
        chosen, rejected = scores.float().chunk(2)
        return -F.logsigmoid(chosen - rejected).mean()

    return _steps(context, model, loss)


def grpo(
    context: Context, sizes: ModelConfig, start: Start, size: tuple[int, int, int, int]
) -> Steps:
    """Generation by transformers, then passes over so many completions with their prompts."""
    prompts, group, prompt, new = size
    model = _model("CausalLM", sizes, start, context)
    optimizer = _optimizer(model)
    place = context.device.place
    generator = torch.Generator().manual_seed(context.seed)
    ids = torch.randint(*material.IDS, (prompts, prompt), generator=generator).to(place)
    ids = ids.repeat_interleave(group, 0)
    at_once = max(1, min(32, len(ids)))

    def step() -> Tensor:
        with torch.no_grad():
            whole = model.eval().generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=True,
                top_k=0,
                pad_token_id=sizes.pad_token_id,
            )
        rewards = (whole[:, prompt:] % 2 == 0).float().mean(1).view(prompts, group)
        centred = rewards - rewards.mean(1, keepdim=True)
        advantages = (centred / (rewards.std(1, keepdim=True) + 1e-4)).flatten()
        total = torch.zeros((), device=place)
        model.train()
        for rows, advantage in zip(whole.split(at_once), advantages.split(at_once), strict=True):
            logits = model(input_ids=rows, logits_to_keep=new + 1, use_cache=False).logits[:, :-1]
            logp = -F.cross_entropy(
                logits.flatten(0, 1), rows[:, prompt:].flatten(), reduction="none"
            )
            loss = -(advantage[:, None] * logp.view(-1, new)).sum() / (len(ids) * new)
            loss.backward()
            total += loss.detach()
        _update(model, optimizer)
        return total

    return _block(context, step, warm=0, count=1)


def trl_sft(context: Context, sizes: ModelConfig, start: Start, records: list[Any]) -> Steps:
    """TRL's trainer, with Liger's kernels where they are installed."""
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    if context.device.place.type != "cuda":
        raise ImportError("compared on a GPU only")
    stamps: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step in (WARM, WARM + MEASURED):
                context.device.synchronize()
                stamps.append(time.perf_counter())

    model = _model("CausalLM", sizes, start, context)

    def block() -> tuple[float, float]:
        stamps.clear()
        with tempfile.TemporaryDirectory() as folder:
            Tokenizer.bytes().save_pretrained(folder)
            args = SFTConfig(
                output_dir=folder,
                per_device_train_batch_size=len(records),
                max_steps=WARM + MEASURED,
                max_length=len(records[0]["input_ids"]),
                learning_rate=LEARNING_RATE,
                lr_scheduler_type="constant",
                optim="adamw_torch_fused",
                bf16=True,
                gradient_checkpointing=False,
                use_liger_kernel=liger_kernel.installed(),
                report_to="none",
                save_strategy="no",
                logging_steps=10_000,
                disable_tqdm=True,
            )
            trainer = SFTTrainer(
                model=model,
                args=args,
                train_dataset=Dataset.from_list(records),
                processing_class=AutoTokenizer.from_pretrained(folder),
                callbacks=[Clock()],
            )
            loss = trainer.train().training_loss
        return (stamps[-1] - stamps[0]) / MEASURED, loss

    return block


def _steps(context: Context, model: Any, loss: Callable[[], Tensor]) -> Steps:
    optimizer = _optimizer(model)

    def step() -> Tensor:
        value = loss()
        value.backward()
        _update(model, optimizer)
        return value.detach()

    return _block(context, step)


def _block(
    context: Context, step: Callable[[], Tensor], warm: int = WARM, count: int = MEASURED
) -> Steps:
    def block() -> tuple[float, float]:
        losses = [step() for _ in range(warm)]
        context.device.synchronize()
        begun = time.perf_counter()
        losses += [step() for _ in range(count)]
        context.device.synchronize()
        seconds = (time.perf_counter() - begun) / count
        return seconds, float(torch.stack(losses).float().mean())

    return block


def _optimizer(model: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True)


def _update(model: Any, optimizer: torch.optim.Optimizer) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _model(
    name: str, sizes: ModelConfig, start: Start, context: Context, liger: bool = False
) -> Any:
    """A model of transformers with our weights, in bf16."""
    import transformers

    settings = sizes.to_dict()
    kind = settings.pop("model_type")
    if liger:
        from liger_kernel import transformers as patches

        getattr(patches, f"apply_liger_kernel_to_{kind}")()
    labels = {"num_labels": 1} if name == "SequenceClassification" else {}
    config = transformers.AutoConfig.for_model(kind, **settings, **labels)
    config._attn_implementation = "sdpa"
    with torch.device(context.device.place):
        model = getattr(transformers, f"AutoModelFor{name}").from_config(
            config, dtype=torch.bfloat16, attn_implementation="sdpa"
        )
    model = model.to(device=context.device.place, dtype=torch.bfloat16)
    missing, unexpected = model.load_state_dict(start, strict=False)
    lacking = [one for one in itertools.chain(missing, unexpected) if "lm_head" not in one]
    if lacking:
        raise RuntimeError(f"weights without a place: {lacking[:3]}")
    if name == "CausalLM" and sizes.tie_word_embeddings:
        model.tie_weights()
    return model.train()


def generation(
    context: Context, sizes: ModelConfig, start: Start, ids: Tensor
) -> Callable[[int], list[list[int]]]:
    """Greedy, with a cache of fixed size; as it comes, without compilation."""
    model = _model("CausalLM", sizes, start, context).eval()
    ids = ids.to(context.device.place)

    def draw(new: int) -> list[list[int]]:
        with torch.no_grad():
            whole = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
                cache_implementation="static",
                disable_compile=True,
                pad_token_id=sizes.pad_token_id,
            )
        return whole[:, ids.shape[1] :].tolist()

    return draw

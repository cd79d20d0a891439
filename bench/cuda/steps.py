"""Section `steps`: whole training steps, ours as a user runs them, beside a loop or TRL's trainer.

A contender is made once and then asked for blocks of steps. Losses of the first blocks are compared
before anything is timed: the models start from the same weights and see the same batches.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from fastllm import (
    GRPOConfig,
    GRPOTrainer,
    RewardConfig,
    RewardModel,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
    Tokenizer,
    Transformer,
)

from ..harness import in_turns
from ..records import OURS, Record
from . import flops, loops, material
from .case import Case, Context
from .device import first_line
from .goals import Share, faster, judged

NAME = "steps"

# Steps before the clock starts, and on the clock.
WARM, MEASURED = 2, 6
LEARNING_RATE = 1e-5

# How far the mean losses of a block may be apart, relative.
TOLERANCE = 2e-2

Steps = Callable[[], tuple[float, float]]
"""A block: seconds of a step, and the mean loss."""


@dataclass(frozen=True)
class Work:
    """A kind of training step at a size."""

    name: str
    label: str
    make: Callable[[Context], dict[str, Callable[[], Steps]]]
    """Makers of contenders, ours first."""
    amount: Callable[[Context], tuple[float, str]]
    goal: Any = None
    times: float = 0.0
    """How many times faster than the best peer it is to be."""
    rounds: int = 3
    compared: bool = True


def cases(context: Context) -> list[Case]:
    """SFT, reward model, GRPO."""
    works = [
        Work("SFT step", _sft_label(context), _sft, _sft_flops, Share(0.55), 1.5),
        Work("RM step", _rm_label(context), _rm, _rm_pairs, None, 4.0),
        Work("GRPO step", _grpo_label(context), _grpo, _grpo_steps, None, 6.0, 1, False),
    ]
    return [
        Case(NAME, work.name, work.label, lambda context, work=work: _run(work, context), seconds=8)
        for work in works
    ]


def _run(work: Work, context: Context) -> Iterator[Record]:
    blank = Record(NAME, work.name, work.label, "bfloat16", OURS)
    blocks: dict[str, Steps] = {}
    first: dict[str, tuple[float, float]] = {}
    whole = 0.0
    for name, make in work.make(context).items():
        context.progress(f"{work.name}: {name}")
        if name != OURS and context.left < 10:
            yield replace(blank, contender=name, note="left out: the section's time is over")
            continue
        try:
            block = make()
            begun = time.perf_counter()
            first[name] = block()
            whole += time.perf_counter() - begun
        except Exception as error:
            if name == OURS or not context.device.alive():
                raise
            kind = "not here" if isinstance(error, ImportError) else "failed"
            yield replace(blank, contender=name, note=f"{kind}: {first_line(error)}")
            context.device.forget()
            continue
        wrong = _wrong(first, name) if work.compared else ""
        if wrong:
            yield replace(blank, contender=OURS, note=wrong)
            return
        blocks[name] = block
    rounds = max(0, min(work.rounds, int((context.left - 5) / max(whole, 1e-9))))
    yield from _timed(work, blank, blocks, first, rounds, context)


def _wrong(first: dict[str, tuple[float, float]], name: str) -> str:
    difference = abs(first[name][1] / first[OURS][1] - 1)
    if difference <= TOLERANCE:
        return ""
    return f"WRONG, not timed: the loss is off by {difference:.2g} from that of {name}"


def _timed(
    work: Work,
    blank: Record,
    blocks: dict[str, Steps],
    first: dict[str, tuple[float, float]],
    rounds: int,
    context: Context,
) -> Iterator[Record]:
    """Rounds as far as the time allows; the first blocks count where there is none for more."""
    amount, unit = work.amount(context)
    note = "" if rounds else "one block each, in which it warmed up"
    if rounds:
        calls = {name: lambda block=block: block()[0] for name, block in blocks.items()}
        turns = in_turns(calls, rounds, sample=lambda: None).rounds
    else:
        turns = {name: (first[name][0],) for name in blocks}
    rate = context.rates.get("product") if unit == "FLOP" else None
    records = {
        name: replace(blank, contender=name, rounds=taken, work=amount, unit=unit, note=note)
        for name, taken in turns.items()
    }
    if rate:
        records = {
            name: replace(record, roofline=(record.rate or 0.0) / rate)
            for name, record in records.items()
        }
    others = [record for name, record in records.items() if name != OURS]
    peers = [record for record in others if not record.contender.startswith(OURS)]
    best = min(peers, key=lambda record: record.seconds or 0.0, default=None)
    mine = records[OURS]
    yield replace(mine, **judged(mine, work.goal))
    yield from others
    extra = faster(mine, best, work.times, best.contender if best else "a peer")
    yield replace(mine, name=f"{work.name} against peers", roofline=None, **extra)


# -- our trainers ----------------------------------------------------------------------------------


class _Clock:
    """Reads the clock after the warm-up and at the end, both times with the device idle."""

    def __init__(self, context: Context, warm: int, last: int) -> None:
        self.context, self.at = context, (warm, last)
        self.stamps: list[float] = []

    def on_step_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        if state.global_step in self.at:
            self.context.device.synchronize()
            self.stamps.append(time.perf_counter())

    def seconds(self) -> float:
        return (self.stamps[-1] - self.stamps[0]) / (self.at[1] - self.at[0])


def _trainer(
    context: Context, make: Callable[[str, _Clock], Any], warm: int = WARM, count: int = MEASURED
) -> Steps:
    """Blocks of a trainer that starts anew each time, on the same model."""

    def block() -> tuple[float, float]:
        clock = _Clock(context, warm, warm + count)
        with tempfile.TemporaryDirectory() as folder, _quiet():
            output = make(folder, clock).train()
        return clock.seconds(), output.training_loss

    return block


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        yield


def arguments(folder: str, context: Context, steps: int) -> dict[str, Any]:
    """What the configurations of our trainers have in common."""
    return {
        "output_dir": folder,
        "max_steps": steps,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "logging_steps": 10_000,
        "disable_tqdm": True,
        "device": str(context.device.place),
        "dtype": "bf16",
        "seed": context.seed % 2**31,
    }


def _graphed(ours: Callable[..., Steps], context: Context) -> dict[str, Callable[[], Steps]]:
    """Ours with passes replayed from CUDA graphs."""
    if context.device.place.type != "cuda":
        return {}
    return {f"{OURS}, graphs": lambda: ours(cuda_graphs=True)}


# -- SFT -------------------------------------------------------------------------------------------


def _sft_size(context: Context) -> tuple[int, int]:
    """Sequences and their length."""
    return context.pick((8, 2048), (8, 2048), (2, 16))


def _sft_label(context: Context) -> str:
    batch, length = _sft_size(context)
    return f"1.2B, {batch * length} packed tokens ({batch}x{length})"


def _sft_flops(context: Context) -> tuple[float, str]:
    batch, length = _sft_size(context)
    return flops.training(material.config(material.LLAMA_1B, context), [length] * batch), "FLOP"


def _sft(context: Context) -> dict[str, Callable[[], Steps]]:
    batch, length = _sft_size(context)
    config = material.config(material.LLAMA_1B, context)
    generator = torch.Generator().manual_seed(context.seed)
    ids = torch.randint(*material.IDS, (batch, length), generator=generator)
    start = material.model(Transformer, material.LLAMA_1B, context).cpu().state_dict()
    records = [{"input_ids": row} for row in ids.tolist()]

    def ours(**options: Any) -> Steps:
        model = material.loaded(Transformer, config, start, context)

        def make(folder: str, clock: _Clock) -> SFTTrainer:
            args = SFTConfig(
                **arguments(folder, context, WARM + MEASURED),
                **options,
                per_device_train_batch_size=batch,
                max_length=length,
            )
            return SFTTrainer(
                model,
                args,
                train_dataset=records,
                processing_class=Tokenizer.bytes(),
                callbacks=[clock],
            )

        return _trainer(context, make)

    # Liger changes the classes of transformers for the whole process: there is one or the other.
    liger = loops.has_liger()
    return {
        OURS: ours,
        "transformers + Liger" if liger else "transformers": lambda: loops.sft(
            context, config, start, ids, liger
        ),
        "TRL": lambda: loops.trl_sft(context, config, start, records),
        **_graphed(ours, context),
    }


# -- reward model ----------------------------------------------------------------------------------


def _rm_size(context: Context) -> int:
    return context.pick(64, 64, 2)


def _rm_label(context: Context) -> str:
    return f"0.5B, {_rm_size(context)} pairs as in hh"


def _rm_pairs(context: Context) -> tuple[float, str]:
    return float(_rm_size(context)), "pairs"


def _rm(context: Context) -> dict[str, Callable[[], Steps]]:
    batch = _rm_size(context)
    config = material.config(material.QWEN_HALF_B, context)
    pairs = material.pairs(batch, context)
    start = material.model(RewardModel, material.QWEN_HALF_B, context).cpu().state_dict()
    records = [{"chosen_ids": a, "rejected_ids": b} for a, b in pairs]

    def ours(**options: Any) -> Steps:
        model = material.loaded(RewardModel, config, start, context)

        def make(folder: str, clock: _Clock) -> RewardTrainer:
            args = RewardConfig(
                **arguments(folder, context, WARM + MEASURED),
                **options,
                per_device_train_batch_size=batch,
                max_length=2048,
            )
            return RewardTrainer(
                model,
                args,
                train_dataset=records,
                processing_class=Tokenizer.bytes(),
                callbacks=[clock],
            )

        return _trainer(context, make)

    return {
        OURS: ours,
        "transformers, padded": lambda: loops.reward(context, config, start, pairs),
        **_graphed(ours, context),
    }


# -- GRPO ------------------------------------------------------------------------------------------


def _grpo_size(context: Context) -> tuple[int, int, int, int]:
    """Prompts, completions of each, tokens of a prompt and of a completion."""
    return context.pick((32, 8, 512, 512), (32, 8, 512, 64), (2, 2, 8, 4))


def _grpo_label(context: Context) -> str:
    prompts, group, prompt, new = _grpo_size(context)
    return f"0.5B, {prompts} prompts x {group}, {prompt} + {new}"


def _grpo_steps(context: Context) -> tuple[float, str]:
    return 1.0, "steps"


def _grpo(context: Context) -> dict[str, Callable[[], Steps]]:
    prompts, group, prompt, new = _grpo_size(context)
    config = material.config(material.QWEN_HALF_B, context)
    start = material.model(Transformer, material.QWEN_HALF_B, context).cpu().state_dict()

    def ours() -> Steps:
        model = material.loaded(Transformer, config, start, context)

        def make(folder: str, clock: _Clock) -> GRPOTrainer:
            args = GRPOConfig(
                **arguments(folder, context, 2),
                per_device_train_batch_size=prompts * group,
                num_generations=group,
                max_completion_length=new,
                max_tokens_per_pass=context.pick(32768, 32768, 64),
            )
            return GRPOTrainer(
                model,
                share_of_even,
                args,
                train_dataset=material.prompts(prompts, prompt, context),
                processing_class=material.tokenizer(config, folder),
                callbacks=[clock],
            )

        return _trainer(context, make, warm=1, count=1)

    return {
        OURS: ours,
        "transformers": lambda: loops.grpo(context, config, start, (prompts, group, prompt, new)),
    }


def share_of_even(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """A reward that costs nothing: how many of the ids are even."""
    return [sum(token % 2 == 0 for token in ids) / max(1, len(ids)) for ids in completion_ids]

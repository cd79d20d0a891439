"""The commands and their options. Running one loads its module; asking for help does not."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from .options import Option, Verbatim, options_of

IO = "input and output"
MODEL = "a model from scratch"
LORA = "LoRA"
TRAINING = "training"
SAMPLING = "sampling"

DEFAULT_EVAL_FRACTION = 0.05
DEFAULT_BLOCK_SIZE = 1024
DEFAULT_COMPLETION_LENGTH = 64


@dataclass(frozen=True)
class Command:
    """One command of `fastllm`."""

    name: str
    summary: str
    options: Callable[[], list[Option]]
    runs: str
    """`module:function` under fastllm.cli; it takes the given values and returns an exit code."""
    passes_on: bool = False
    """The arguments go on as they are, as the value "arguments": another program parses them."""

    def load(self) -> Callable[[dict[str, Any]], int]:
        """Import the module that does the work."""
        module, function = self.runs.split(":")
        return getattr(importlib.import_module(f"fastllm.cli.{module}"), function)


def _sft_options() -> list[Option]:
    from fastllm.training.config import SFTConfig

    return [*_train_io("sft"), *_start(), *_scratch(), *_lora(), *_fields(SFTConfig)]


def _rm_options() -> list[Option]:
    from fastllm.training.config import RewardConfig

    return [*_train_io("rm"), *_start(), *_scratch(), *_lora(), *_fields(RewardConfig)]


def _grpo_options() -> list[Option]:
    from fastllm.training.config import GRPOConfig

    rewards = [
        Option(
            name="policy",
            aliases=("model",),
            metavar="PATH",
            required=True,
            group=IO,
            help="the policy to train: a run folder, a checkpoint, a .pt file or a Hugging Face "
            "folder",
        ),
        Option(
            name="reward",
            hint=list[str],
            metavar="PATH",
            group=IO,
            help="one or more reward models, of the same kinds",
        ),
        Option(
            name="reward_func",
            hint=list[str],
            metavar="MODULE:FUNCTION",
            group=IO,
            help="one or more Python functions with TRL's signature; FILE.py:FUNCTION works too",
        ),
    ]
    io = [*_train_io("grpo"), *rewards, _tokenizer("the policy's own")]
    return [*io, *_lora(), *_fields(GRPOConfig)]


def _train_io(command: str) -> list[Option]:
    return [
        _data("records to train on: .jsonl, .jsonl.gz or .json"),
        Option(name="eval_data", hint=Path, metavar="FILE", group=IO, help="records held out"),
        Option(
            name="output_dir",
            aliases=("out",),
            hint=Path,
            default=f"runs/{command}",
            metavar="DIR",
            group=IO,
            help="the run folder",
        ),
        Option(
            name="resume",
            default="never",
            metavar="auto|never|PATH",
            group=IO,
            help="continue the run in --out from its newest checkpoint (auto: if there is one)",
        ),
        Option(
            name="overwrite_output_dir",
            aliases=("overwrite",),
            hint=bool,
            default=False,
            group=IO,
            help="replace the run that --out already holds",
        ),
        _config(),
    ]


def _start() -> list[Option]:
    return [
        Option(
            name="model",
            hint=str | None,
            metavar="PATH",
            group=IO,
            help="start from this model: a run folder, a checkpoint, a .pt file or a Hugging Face "
            "folder; without it, a small model is built from scratch",
        ),
        _tokenizer("the model's own, or one made from the data; which one is said"),
    ]


def _scratch() -> list[Option]:
    sizes = {
        "n_layer": (4, "layers"),
        "n_head": (4, "query heads"),
        "n_kv_head": (2, "key/value heads"),
        "n_embd": (128, "width"),
        "block_size": (DEFAULT_BLOCK_SIZE, "longest sequence, in tokens"),
    }
    options = [
        Option(name=name, hint=int, default=default, help=text, group=MODEL)
        for name, (default, text) in sizes.items()
    ]
    text = "size of the vocabulary to train on the data; default: chosen by the size of the data"
    return [*options, Option(name="vocab_size", hint=int | None, help=text, group=MODEL)]


def _lora() -> list[Option]:
    return [
        Option(
            name="use_peft", hint=bool, default=False, group=LORA, help="train LoRA adapters only"
        ),
        Option(name="lora_r", hint=int, default=16, group=LORA, help="rank"),
        Option(
            name="lora_alpha", hint=float, default=32.0, group=LORA, help="scale, as alpha / rank"
        ),
        Option(name="lora_dropout", hint=float, default=0.0, group=LORA),
        Option(
            name="lora_target_modules",
            hint=list[str],
            default="all-linear",
            group=LORA,
            help="projections to adapt (q_proj, v_proj, ...)",
        ),
    ]


def _fields(config: type) -> list[Option]:
    """The config's fields, with the defaults that the command line has of its own."""
    own = {
        "eval_fraction": f"{DEFAULT_EVAL_FRACTION} without --eval_data",
        "max_completion_length": DEFAULT_COMPLETION_LENGTH,
    }
    options = options_of(config, TRAINING, skip=["output_dir", "overwrite_output_dir"])
    return [replace(option, default=own.get(option.name, option.default)) for option in options]


def _tokenizer(default: str) -> Option:
    return Option(
        name="tokenizer",
        hint=str | None,
        metavar="PATH",
        group=IO,
        help=f"a tokenizer.json or its folder, or bytes, or bpe; default: {default}",
    )


def _data(text: str, required: bool = True) -> Option:
    return Option(name="data", hint=Path, metavar="FILE", group=IO, help=text, required=required)


def _config() -> Option:
    return Option(
        name="config",
        hint=Path,
        metavar="FILE",
        group=IO,
        help="YAML file with the same names; the command line wins",
    )


def _device() -> list[Option]:
    dtypes = Literal["auto", "fp32", "bf16", "fp16"]
    return [
        Option(name="device", default="auto", group=IO, help="auto, cpu, cuda or mps"),
        Option(name="dtype", hint=dtypes, default="auto", group=IO, help="arithmetic"),
    ]


def _generate_options() -> list[Option]:
    return [
        Option(
            name="model", metavar="PATH", required=True, group=IO, help="the model to sample from"
        ),
        Option(
            name="prompt", hint=list[Verbatim], metavar="TEXT", group=IO, help="one or more prompts"
        ),
        _data("prompts: records with 'prompt', .jsonl, .jsonl.gz or .json", required=False),
        Option(
            name="out",
            hint=Path,
            metavar="FILE.jsonl",
            group=IO,
            help="where the completions go; default: the terminal",
        ),
        Option(
            name="overwrite", hint=bool, default=False, group=IO, help="replace an existing --out"
        ),
        Option(
            name="stream",
            hint=bool,
            default=False,
            group=IO,
            help="show the completion of a single --prompt as it is drawn",
        ),
        _tokenizer("the model's own"),
        *_device(),
        Option(
            name="weights",
            hint=Literal["auto", "int8"],
            default="auto",
            group=IO,
            help="int8 draws with rounded weights, faster where memory is the limit",
        ),
        Option(
            name="cache_gb",
            hint=float | None,
            metavar="X",
            group=IO,
            help="the most that keys and values may take, in 10^9 bytes; default: half of the free "
            "memory",
        ),
        _config(),
        *_sampling(),
        Option(
            name="reward_model",
            metavar="PATH",
            group=SAMPLING,
            help="a reward model that scores the completions",
        ),
        Option(
            name="best",
            hint=bool,
            default=False,
            group=SAMPLING,
            help="keep only the completion of each prompt that --reward_model likes best",
        ),
    ]


def _sampling() -> list[Option]:
    return [
        Option(
            name="max_new_tokens",
            hint=int,
            default="128, or what the model has room for",
            group=SAMPLING,
        ),
        Option(
            name="min_new_tokens",
            hint=int,
            default=0,
            group=SAMPLING,
            help="tokens before which a completion does not end",
        ),
        Option(
            name="temperature",
            hint=float,
            default=1.0,
            group=SAMPLING,
            help="0 takes the likeliest token",
        ),
        Option(name="top_k", hint=int, default=0, group=SAMPLING, help="0: all tokens"),
        Option(name="top_p", hint=float, default=1.0, group=SAMPLING),
        Option(name="min_p", hint=float | None, group=SAMPLING),
        Option(name="repetition_penalty", hint=float, default=1.0, group=SAMPLING),
        Option(
            name="stop",
            hint=list[Verbatim],
            metavar="TEXT",
            group=SAMPLING,
            help="one or more texts that end a completion; they are not part of it",
        ),
        Option(
            name="num_return_sequences",
            hint=int,
            default=1,
            group=SAMPLING,
            help="completions of each prompt",
        ),
        Option(name="seed", hint=int, default=0, group=SAMPLING),
    ]


def _score_options() -> list[Option]:
    return [
        Option(name="model", metavar="PATH", required=True, group=IO, help="the reward model"),
        _data("records with prompt and completion, text, messages, or chosen and rejected"),
        Option(
            name="out",
            hint=Path,
            metavar="FILE.jsonl",
            group=IO,
            help="where each record's score goes; default: only the summary is printed",
        ),
        Option(
            name="overwrite", hint=bool, default=False, group=IO, help="replace an existing --out"
        ),
        Option(name="batch_size", hint=int, default=32, group=IO, help="records scored at once"),
        _tokenizer("the model's own"),
        *_device(),
        _config(),
    ]


def _demo_options() -> list[Option]:
    return [
        Option(
            name="out",
            hint=Path,
            default="runs/demo",
            metavar="DIR",
            group=IO,
            help="folder of the three runs",
        ),
        Option(name="seed", hint=int, default=0, group=IO),
        Option(
            name="quick",
            hint=bool,
            default=False,
            group=IO,
            help="a few steps of each stage: shows that it works, not what it learns",
        ),
        Option(
            name="overwrite", hint=bool, default=False, group=IO, help="replace an existing --out"
        ),
    ]


def _env_options() -> list[Option]:
    return [Option(name="json", hint=bool, default=False, group=IO, help="print JSON")]


COMMANDS = {
    command.name: command
    for command in (
        Command("sft", "supervised fine-tuning", _sft_options, "train:sft"),
        Command("rm", "train a reward model on preference pairs", _rm_options, "train:rm"),
        Command("grpo", "reinforcement learning with GRPO", _grpo_options, "train:grpo"),
        Command("generate", "sample completions", _generate_options, "generate:generate"),
        Command("score", "score texts with a reward model", _score_options, "infer:score"),
        Command("demo", "SFT, RM and GRPO on generated tasks", _demo_options, "demo:demo"),
        Command("bench", "time it against its peers", list, "bench:bench", passes_on=True),
        Command("env", "what runs where on this machine", _env_options, "env:env"),
    )
}

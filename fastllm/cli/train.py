"""`fastllm sft`, `fastllm rm` and `fastllm grpo`."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .commands import DEFAULT_BLOCK_SIZE, DEFAULT_COMPLETION_LENGTH, DEFAULT_EVAL_FRACTION
from .folder import check_run_folder
from .log import start_log
from .options import UsageError
from .summary import print_summary

if TYPE_CHECKING:
    from fastllm.training.config import TrainingConfig

SCRATCH = ("n_layer", "n_head", "n_kv_head", "n_embd", "block_size", "vocab_size")
LORA = {
    "lora_r": "r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "lora_target_modules": "target_modules",
}


def sft(values: dict[str, Any]) -> int:
    """Supervised fine-tuning on the records of --data."""
    from fastllm.training.config import SFTConfig

    _settle_sizes(values)
    data, out = _prepare(values, SFTConfig, "runs/sft")
    from fastllm.training.sft import train_sft

    return _train(train_sft, out, data, eval_items=values.pop("eval_data", None), **values)


def rm(values: dict[str, Any]) -> int:
    """A reward model on the pairs of --data."""
    from fastllm.training.config import RewardConfig

    _settle_sizes(values)
    data, out = _prepare(values, RewardConfig, "runs/rm")
    from fastllm.training.rm import train_rm

    return _train(train_rm, out, data, eval_pairs=values.pop("eval_data", None), **values)


def grpo(values: dict[str, Any]) -> int:
    """GRPO on the prompts of --data with reward models and reward functions."""
    from fastllm.training.config import GRPOConfig

    models, functions = values.pop("reward", None), values.pop("reward_func", None)
    if not models and not functions:
        raise UsageError("grpo needs --reward PATH or --reward_func MODULE:FUNCTION")
    policy = values.pop("policy")
    values.setdefault("max_completion_length", DEFAULT_COMPLETION_LENGTH)
    prompts, out = _prepare(values, GRPOConfig, "runs/grpo")
    rewards = [load_function(name) for name in functions or ()]
    from fastllm.training.grpo import train_grpo

    return _train(
        train_grpo,
        out,
        policy,
        models,
        prompts=prompts,
        reward_funcs=rewards,
        eval_prompts=values.pop("eval_data", None),
        **values,
    )


def _train(train: Callable[..., Any], out: Path, *arguments: Any, **keywords: Any) -> int:
    """Train, print the summary of the run and leave torchrun's group, if there is one."""
    from fastllm.training import distributed
    from fastllm.training.termination import Terminated

    try:
        train(*arguments, out_dir=out, **keywords)
    except Terminated:  # all processes leave together, as they do at the end
        distributed.stop()
        raise
    if distributed.is_main():
        print_summary(out)
    distributed.stop()
    return 0


def _prepare(
    values: dict[str, Any], config: type[TrainingConfig], default_out: str
) -> tuple[Path, Path]:
    """Check the given values in every way that needs no torch, and make keywords of them.

    Afterwards `values` are keywords of a `train_*` function. Returns the data file and the run
    folder.
    """
    values.pop("config", None)
    data, out = values.pop("data"), values.pop("output_dir", Path(default_out))
    peft = _lora_settings(values)
    if values.get("eval_data") is None:
        values.setdefault("eval_fraction", DEFAULT_EVAL_FRACTION)
    known = {field.name for field in dataclasses.fields(config)}
    # Raises on a value out of its range.
    config(output_dir=str(out), **{name: values[name] for name in values if name in known})
    resume = values.get("resume", "never")
    check_run_folder(out, overwrite=values.get("overwrite_output_dir", False), resume=resume)
    start_log()
    if peft is not None:
        from fastllm.model.lora_config import LoraConfig

        values["peft_config"] = LoraConfig(**peft)
    return data, out


def _settle_sizes(values: dict[str, Any]) -> None:
    """A model from scratch takes its longest sequence from max_length, if that is given."""
    sizes = [f"--{name}" for name in SCRATCH if name in values]
    if values.get("model") is None:
        values.setdefault("block_size", values.get("max_length", DEFAULT_BLOCK_SIZE))
    elif sizes:
        raise UsageError(f"{', '.join(sizes)}: for a model from scratch, but --model is given")


def _lora_settings(values: dict[str, Any]) -> dict[str, Any] | None:
    settings = {field: values.pop(name) for name, field in LORA.items() if name in values}
    if values.pop("use_peft", False):
        if settings.get("target_modules") == ["all-linear"]:
            settings["target_modules"] = "all-linear"
        return settings
    if settings:
        raise UsageError("the --lora_ options need --use_peft")
    return None


def load_function(name: str) -> Callable[..., Any]:
    """The function that `module:function` or `file.py:function` names.

    Raises:
        UsageError: the form, the module or the function is not there.
    """
    source, colon, function = name.rpartition(":")
    if not colon or not source or not function:
        raise UsageError(f"--reward_func: expected module:function, found {name!r}")
    module = _load_file(Path(source)) if source.endswith(".py") else _load_module(source)
    found = getattr(module, function, None)
    if not callable(found):
        raise UsageError(f"--reward_func: {source} has no function {function!r}")
    return found


def _load_file(path: Path) -> Any:
    if not path.is_file():
        raise UsageError(f"--reward_func: no such file: {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def _load_module(name: str) -> Any:
    sys.path.insert(0, "")  # modules beside the user, as with `python -m`
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not name.startswith(error.name):
            raise
        raise UsageError(f"--reward_func: there is no module {name!r}") from error
    finally:
        sys.path.remove("")

"""Optimizer and random state as tensors and JSON values, and back."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

_OPTIMIZER = "optimizer/"
_RANDOM = "random/"


def optimizer_tensors(
    optimizer: Any, named_parameters: Iterable[tuple[str, nn.Parameter]]
) -> dict[str, Tensor]:
    """An optimizer's state by parameter name: `optimizer/<name>/<key>`, for example `exp_avg`.

    The optimizer is one of PyTorch's, or laid out like it.
    Learning rates and other settings are not in it: the trainer's own configuration has them.
    """
    state: dict[str, Tensor] = {}
    for name, parameter in named_parameters:
        for key, value in optimizer.state.get(parameter, {}).items():
            if not isinstance(value, Tensor):
                raise ValueError(f"optimizer state {key!r} of {name} is no tensor: {value!r}")
            state[f"{_OPTIMIZER}{name}/{key}"] = value
    return state


def restore_optimizer(
    optimizer: Any,
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    tensors: Mapping[str, Tensor],
) -> None:
    """Put back what `optimizer_tensors` gave; other tensors are left alone.

    Moments in bf16 become fp32 where the optimizer has them so: nothing is lost.

    Raises:
        ValueError: state of a parameter that is not there, or in another shape, or in a wider
            dtype than the optimizer keeps.
    """
    parameters = dict(named_parameters)
    fused = {
        id(p) for group in optimizer.param_groups for p in group["params"] if _on_device(group)
    }
    optimizer.state.clear()
    for full_name, value in tensors.items():
        if not full_name.startswith(_OPTIMIZER):
            continue
        name, _, key = full_name.removeprefix(_OPTIMIZER).rpartition("/")
        if name not in parameters:
            raise ValueError(f"optimizer state of {name!r}, which the model does not train")
        parameter = parameters[name]
        if value.dim() and value.shape != parameter.shape:
            raise ValueError(
                f"optimizer state {key} of {name}: expected shape {list(parameter.shape)}, "
                f"found {list(value.shape)}"
            )
        dtype = value.dtype
        if key != "step":
            dtype = getattr(optimizer, "moment_dtype", parameter.dtype)
            _check_fits(f"optimizer state {key} of {name}", value, dtype, "optim_state_dtype")
        # The count of steps stays on the CPU, unless the optimizer's kernel reads it itself.
        on_cpu = key == "step" and id(parameter) not in fused
        device = torch.device("cpu") if on_cpu else parameter.device
        optimizer.state.setdefault(parameter, {})[key] = value.to(device, dtype, copy=True)
    if hasattr(optimizer, "state_restored"):
        optimizer.state_restored()


def restore_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """`model.load_state_dict`, but where a narrower dtype would lose something that was trained.

    Raises:
        ValueError: trained weights that the model's dtype cannot hold.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and name in weights:
            _check_fits(name, weights[name], parameter.dtype, "stochastic_rounding")
    model.load_state_dict(weights)


def random_state(device: torch.device | str = "cpu") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state of every default random generator: torch's on the CPU and on `device`, Python's,
    and NumPy's where it is loaded (a reward function may draw from it)."""
    tensors = {f"{_RANDOM}cpu": torch.get_rng_state()}
    kind = torch.device(device).type
    if kind != "cpu":
        tensors[f"{_RANDOM}{kind}"] = getattr(torch, kind).get_rng_state()
    version, words, spare = random.getstate()
    state: dict[str, Any] = {"random": {"python": [version, list(words), spare]}}
    if "numpy" in sys.modules:
        name, keys, *rest = sys.modules["numpy"].random.get_state()
        state["random"]["numpy"] = [name, keys.tolist(), *rest]
    return tensors, state


def restore_random_state(
    tensors: Mapping[str, Tensor], state: Mapping[str, Any], device: torch.device | str = "cpu"
) -> None:
    """Put back what `random_state` gave.

    A generator that the checkpoint knows nothing of, on another kind of device than the run
    began on, stays as it is.
    """
    torch.set_rng_state(tensors[f"{_RANDOM}cpu"])
    kind = torch.device(device).type
    if f"{_RANDOM}{kind}" in tensors and kind != "cpu":
        getattr(torch, kind).set_rng_state(tensors[f"{_RANDOM}{kind}"])
    version, words, spare = state["random"]["python"]
    random.setstate((version, tuple(words), spare))
    if "numpy" in state["random"] and "numpy" in sys.modules:
        sys.modules["numpy"].random.set_state(tuple(state["random"]["numpy"]))


def _check_fits(what: str, value: Tensor, dtype: torch.dtype, setting: str) -> None:
    narrower = torch.promote_types(value.dtype, dtype) != dtype
    if narrower and not torch.equal(value.to(dtype).to(value.dtype), value):
        raise ValueError(
            f"{what}: the checkpoint has it in {value.dtype}, which {dtype} cannot hold: resume "
            f"with the {setting} that the run began with"
        )


def _on_device(group: Mapping[str, Any]) -> bool:
    return bool(group.get("capturable") or group.get("fused"))

"""AdamW with Transformers' groups, loss scaling for fp16, and the norm that is clipped.

Where Triton serves, a step is three launches and the host learns nothing of it (DeviceAdamW); on
the CPU, the C++ kernels clip and step in one pass (ScaledAdamW); elsewhere PyTorch's AdamW serves.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import backend, cpp
from ..ops.optimizer import Settings
from . import distributed
from .config import TrainingConfig
from .device_adamw import DeviceAdamW, LossScale, plain

_log = logging.getLogger("fastllm")


class ScaledAdamW:
    """AdamW by the C++ kernel: a step that multiplies the gradients by a factor on the way.

    Clipping is then no pass over memory of its own. Groups and state are laid out as in
    `torch.optim.AdamW`, so that either continues from a checkpoint of the other. It is not derived
    from `torch.optim.Optimizer`, whose first instance imports PyTorch's compiler: two seconds and
    110 MB.
    """

    def __init__(self, groups: list[dict[str, Any]], **defaults: Any) -> None:
        self.param_groups = [{"lr": 0.0, **defaults, **group} for group in groups]
        self.state: dict[Tensor, dict[str, Any]] = {}

    @torch.no_grad()
    def step_scaled(self, scale: float) -> None:
        """One step from `scale` times the gradients, with the C++ kernel."""
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            states = [self._state_of(p) for p in parameters]
            cpp.optimizer.adamw_(
                parameters,
                [_contiguous(p.grad) for p in parameters],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [state["step"] for state in states],
                scale,
                group["lr"],
                *group["betas"],
                group["eps"],
                group["weight_decay"],
            )

    def _state_of(self, parameter: Tensor) -> dict[str, Any]:
        state = self.state.setdefault(parameter, {})
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        return state


def _contiguous(gradient: Tensor | None) -> Tensor:
    assert gradient is not None
    return gradient.contiguous()


class Optimizer:
    """One optimizer step from summed gradients.

    Args:
        model: its trainable parameters are optimized: in fp32, or in bf16 where
            `config.stochastic_rounding` says so. Working copies of them are kept up to date.
        config: learning rate apart, the settings of AdamW and clipping.
        scale_loss: fp16: keep gradients in range with a loss scale that adapts.

    Raises:
        ValueError: nothing to train, or weights in another dtype than the config says.
        RuntimeError: an explicitly requested backend cannot do what the config says.
    """

    def __init__(self, model: nn.Module, config: TrainingConfig, scale_loss: bool) -> None:
        self.named_parameters = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        if not self.named_parameters:
            raise ValueError("the model has no trainable parameter")
        self._parameters = [p for _, p in self.named_parameters]
        _check_dtypes(self.named_parameters, config.stochastic_rounding)
        self._max_norm = config.max_grad_norm if config.max_grad_norm > 0 else math.inf
        # Norms and biases are one-dimensional; decaying them only hurts.
        decayed = [p for p in self._parameters if p.dim() > 1]
        others = [p for p in self._parameters if p.dim() <= 1]
        groups = [
            {"params": decayed, "weight_decay": config.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        self.adamw: DeviceAdamW | ScaledAdamW | torch.optim.AdamW
        self.scaler: LossScale | torch.amp.GradScaler
        if _decides_on_device(self._parameters, config):
            settings = Settings(
                config.adam_beta1,
                config.adam_beta2,
                config.adam_epsilon,
                self._max_norm,
                config.seed,
                scale_loss,
            )
            moments = torch.bfloat16 if config.optim_state_dtype == "bf16" else torch.float32
            self.adamw = DeviceAdamW(groups, settings, moments)
            self.scaler = self.adamw.scaler
            return
        device = self._parameters[0].device.type
        options: dict[str, Any] = {
            "betas": (config.adam_beta1, config.adam_beta2),
            "eps": config.adam_epsilon,
            "fused": device in ("cpu", "cuda"),
        }
        # Without C++ kernels, and where a parameter has gaps, PyTorch clips and steps.
        in_one_pass = (
            backend.requested() in ("auto", "cpp")
            and cpp.available()
            and all(map(_plain, self._parameters))
        )
        self.adamw = (
            ScaledAdamW(groups, **options) if in_one_pass else torch.optim.AdamW(groups, **options)
        )
        self.scaler = torch.amp.GradScaler(device, enabled=scale_loss)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of one pass."""
        self.scaler.scale(loss).backward()

    def step(self, learning_rate: float, loss: Tensor) -> Tensor:
        """Update the weights and clear the gradients.

        Args:
            learning_rate: of this step.
            loss: the step's loss over all ranks, a scalar.

        Returns:
            The gradient norm before clipping, a scalar. Where it or the loss is not finite, no
            weight was changed, on any rank. Where Triton serves it is still to be computed when
            this returns, and after one that is not finite no later step changes a weight either;
            gradients of a scaled loss may overflow, and then only this step is left out.
        """
        # Summed before they are unscaled, so that every rank finds the same overflow.
        distributed.all_reduce_sum_(self._gradients())
        if isinstance(self.adamw, DeviceAdamW):
            norm = self.adamw.step_(loss, learning_rate)
        else:
            norm = self._step_of_host(self.adamw, learning_rate, loss)
        for parameter in self._parameters:
            parameter.grad = None
        return norm

    def failed(self) -> bool:
        """Whether a step has failed and no later one changes a weight; waits for the device."""
        return isinstance(self.adamw, DeviceAdamW) and self.adamw.op.failed()

    def _step_of_host(
        self, adamw: ScaledAdamW | torch.optim.AdamW, learning_rate: float, loss: Tensor
    ) -> Tensor:
        assert isinstance(self.scaler, torch.amp.GradScaler)
        self.scaler.unscale_(adamw)  # type: ignore[arg-type]  # it reads the groups only
        for group in adamw.param_groups:
            group["lr"] = learning_rate
        if isinstance(adamw, ScaledAdamW):
            norm = self._step_in_one_pass(adamw, loss)
        else:
            norm = self._step_of_torch(adamw, loss)
        self.scaler.update()
        # PyTorch does not count what its own fused kernels write.
        torch.autograd.graph.increment_version(self._parameters)
        return norm

    def _step_of_torch(self, adamw: torch.optim.AdamW, loss: Tensor) -> Tensor:
        assert isinstance(self.scaler, torch.amp.GradScaler)
        norm = nn.utils.clip_grad_norm_(self._parameters, self._max_norm)
        if torch.isfinite(norm) & torch.isfinite(loss):
            self.scaler.step(adamw)
        return norm

    def _step_in_one_pass(self, adamw: ScaledAdamW, loss: Tensor) -> Tensor:
        gradients = [_contiguous(p.grad) for p in self._parameters if p.grad is not None]
        norm = cpp.optimizer.gradient_norm(gradients).float() if gradients else torch.zeros(())
        if torch.isfinite(norm) & torch.isfinite(loss):
            # As in torch.nn.utils.clip_grad_norm_.
            adamw.step_scaled(min(1.0, self._max_norm / (float(norm) + 1e-6)))
        return norm

    def _gradients(self) -> list[Tensor]:
        """This rank's gradients; with several ranks all of them, since one may have no passes."""
        if distributed.world_size() > 1:
            for parameter in self._parameters:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
        return [p.grad for p in self._parameters if p.grad is not None]


def _decides_on_device(parameters: Sequence[Tensor], config: TrainingConfig) -> bool:
    """Whether DeviceAdamW serves: where Triton does, and where only it has what is asked for."""
    if config.stochastic_rounding or config.optim_state_dtype == "bf16":
        return True
    if backend.kernels("optimizer", *parameters) in (None, cpp.optimizer):
        return False
    if plain(parameters):
        return True
    problem = "a weight is not contiguous, or begins at no multiple of 16 bytes"
    if backend.requested() == "triton":
        raise RuntimeError(
            f"backend 'triton' was requested but its optimizer cannot serve: {problem}"
        )
    _log.warning("optimizer: PyTorch's AdamW serves, because %s", problem)
    return False


def _check_dtypes(named: list[tuple[str, nn.Parameter]], stochastic: bool) -> None:
    for name, parameter in named:
        if (parameter.dtype == torch.bfloat16) != stochastic:
            expected = "bfloat16 (stochastic_rounding)" if stochastic else "float32"
            raise ValueError(f"{name}: expected weights in {expected}, found {parameter.dtype}")


def _plain(parameter: Tensor) -> bool:
    on_cpu = parameter.device.type == "cpu"
    return on_cpu and parameter.dtype == torch.float32 and parameter.is_contiguous()

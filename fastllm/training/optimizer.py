"""AdamW with Transformers' groups, loss scaling for fp16, and the norm that is clipped."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..ops import backend, cpp
from . import distributed
from .config import TrainingConfig


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
        model: its trainable parameters are optimized; they must be fp32.
        config: learning rate apart, the settings of AdamW and clipping.
        scale_loss: fp16: keep gradients in range with a loss scale that adapts.
    """

    def __init__(self, model: nn.Module, config: TrainingConfig, scale_loss: bool) -> None:
        self.named_parameters = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        if not self.named_parameters:
            raise ValueError("the model has no trainable parameter")
        self._parameters = [p for _, p in self.named_parameters]
        device = self._parameters[0].device.type
        # Norms and biases are one-dimensional; decaying them only hurts.
        decayed = [p for p in self._parameters if p.dim() > 1]
        others = [p for p in self._parameters if p.dim() <= 1]
        groups = [
            {"params": decayed, "weight_decay": config.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
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
        self.adamw: ScaledAdamW | torch.optim.AdamW = (
            ScaledAdamW(groups, **options) if in_one_pass else torch.optim.AdamW(groups, **options)
        )
        self.scaler = torch.amp.GradScaler(device, enabled=scale_loss)
        self._max_norm = config.max_grad_norm if config.max_grad_norm > 0 else float("inf")

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
            weight was changed, on any rank.
        """
        # Summed before they are unscaled, so that every rank finds the same overflow.
        distributed.all_reduce_sum_(self._gradients())
        self.scaler.unscale_(self.adamw)  # type: ignore[arg-type]  # it reads the groups only
        for group in self.adamw.param_groups:
            group["lr"] = learning_rate
        if isinstance(self.adamw, ScaledAdamW):
            norm = self._step_in_one_pass(self.adamw, loss)
        else:
            norm = self._step_of_torch(self.adamw, loss)
        self.scaler.update()
        for parameter in self._parameters:
            parameter.grad = None
        return norm

    def _step_of_torch(self, adamw: torch.optim.AdamW, loss: Tensor) -> Tensor:
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


def _plain(parameter: Tensor) -> bool:
    on_cpu = parameter.device.type == "cpu"
    return on_cpu and parameter.dtype == torch.float32 and parameter.is_contiguous()

"""AdamW with Transformers' groups, loss scaling for fp16, and the norm that is clipped."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import distributed
from .config import TrainingConfig


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
        self.adamw = torch.optim.AdamW(
            [
                {"params": decayed, "weight_decay": config.weight_decay},
                {"params": others, "weight_decay": 0.0},
            ],
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
            fused=device in ("cpu", "cuda"),
        )
        self.scaler = torch.amp.GradScaler(device, enabled=scale_loss)
        self._max_norm = config.max_grad_norm

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
        self.scaler.unscale_(self.adamw)
        limit = self._max_norm if self._max_norm > 0 else float("inf")
        norm = nn.utils.clip_grad_norm_(self._parameters, limit)
        for group in self.adamw.param_groups:
            group["lr"] = learning_rate
        if torch.isfinite(norm) & torch.isfinite(loss):
            self.scaler.step(self.adamw)
        self.scaler.update()
        self.adamw.zero_grad(set_to_none=True)
        return norm

    def _gradients(self) -> list[Tensor]:
        """This rank's gradients; with several ranks all of them, since one may have no passes."""
        if distributed.world_size() > 1:
            for parameter in self._parameters:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
        return [p.grad for p in self._parameters if p.grad is not None]

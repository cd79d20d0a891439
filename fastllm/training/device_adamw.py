"""AdamW whose decisions stay on the device, laid out for checkpoints as `torch.optim.AdamW`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops.optimizer import AdamW, Settings, Slot


class DeviceAdamW:
    """`ops.optimizer.AdamW` with groups and state.

    Args:
        groups: parameters and their weight decay.
        settings: see ops.optimizer.
        moment_dtype: of exp_avg and exp_avg_sq.
    """

    def __init__(
        self, groups: list[dict[str, Any]], settings: Settings, moment_dtype: torch.dtype
    ) -> None:
        # In PyTorch's words, `fused` says that the counts of steps are on the device.
        common = {"lr": 0.0, "betas": (settings.beta1, settings.beta2), "eps": settings.eps}
        self.param_groups = [{**common, "fused": True, **group} for group in groups]
        self.state: dict[Tensor, dict[str, Tensor]] = {}
        self.settings, self.moment_dtype = settings, moment_dtype
        self.scaler = LossScale(self)
        self._parameters = [p for group in groups for p in group["params"]]
        self._op: AdamW | None = None

    @property
    def op(self) -> AdamW:
        """The steps; made with the first, since a checkpoint may bring the moments."""
        if self._op is None:
            self._op = self._made()
        return self._op

    def step_(self, loss: Tensor, rate: float) -> Tensor:
        """One step from the gradients of the parameters; see `ops.optimizer.AdamW.step_`."""
        return self.op.step_([p.grad for p in self._parameters], loss, rate)

    def state_restored(self) -> None:
        """Go on with the moments and counts that were put into `state`."""
        before, self._op = self._op, None
        if before is not None:
            self.op.scale.copy_(before.scale)

    def _made(self) -> AdamW:
        slots = []
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self._state_of(parameter)
                decay = group["weight_decay"]
                slots.append(Slot(parameter, state["exp_avg"], state["exp_avg_sq"], decay))
        op = AdamW(slots, self.settings)
        for parameter, steps in zip(self._parameters, op.steps, strict=True):
            state = self.state[parameter]
            if "step" in state:
                steps.copy_(state["step"])
            state["step"] = steps
        return op

    def _state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        state = self.state.setdefault(parameter, {})
        for name in ("exp_avg", "exp_avg_sq"):
            if name not in state:
                state[name] = torch.zeros_like(parameter, dtype=self.moment_dtype)
        return state


class LossScale:
    """fp16's loss scale on the device, with the methods of `torch.amp.GradScaler`."""

    def __init__(self, adamw: DeviceAdamW) -> None:
        self._adamw = adamw

    def is_enabled(self) -> bool:
        """Whether losses are scaled at all."""
        return self._adamw.settings.scaled

    def scale(self, loss: Tensor) -> Tensor:
        """The loss from which gradients are computed."""
        return loss * self._adamw.op.scale.to(loss.dtype) if self.is_enabled() else loss

    def get_scale(self) -> float:
        """The scale; waits for the device."""
        return float(self._adamw.op.scale) if self.is_enabled() else 1.0

    def state_dict(self) -> dict[str, Any]:
        """As `GradScaler.state_dict`; waits for the device."""
        if not self.is_enabled():
            return {}
        op = self._adamw.op
        return {
            "scale": self.get_scale(),
            "growth_factor": 2.0,
            "backoff_factor": 0.5,
            "growth_interval": op.settings.growth_interval,
            "_growth_tracker": op.clean_steps(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with what `state_dict`, this one or PyTorch's, gave.

        Raises:
            ValueError: that of a run whose losses were not scaled.
        """
        if not self.is_enabled():
            return
        if not state:
            raise ValueError("the checkpoint has no loss scale: its run was not one in fp16")
        self._adamw.op.set_scale(state["scale"], state["_growth_tracker"])


def plain(parameters: Sequence[Tensor]) -> bool:
    """Whether the kernels can read parameters where they are."""
    return all(p.is_contiguous() and p.data_ptr() % 16 == 0 for p in parameters)

"""Memory of a run on a GPU: predicted before it, measured after it.

The prediction follows one step. Weights, their copies and the optimizer's state are always there.
Layer by layer the forward pass keeps what the backward pass reads; the head makes a chunk of
logits; then the backward pass frees what was kept while the gradients grow. The largest moment of
it is the peak.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..model.reward import RewardModel
from . import activations
from .activations import PassSize
from .config import TrainingConfig

_log = logging.getLogger("fastllm")

WORKSPACE = 96 << 20
"""Bytes of the matrix library's workspace, tables of angles and what is smaller yet."""
_SPARE = 0.95
"""Part of a device that a run may fill: the allocator cannot use every gap."""


@dataclass(frozen=True)
class Prediction:
    """Bytes at the largest moment of a step, by what they are for."""

    parts: dict[str, int]
    recomputed: int
    """Layers whose activations are computed again."""

    @property
    def peak(self) -> int:
        return sum(self.parts.values())

    def line(self, room: int) -> str:
        """For the log, with the `room` bytes that there are."""
        parts = ", ".join(f"{name} {_size(n)}" for name, n in self.parts.items() if n)
        again = f"; {self.recomputed} layers recomputed" if self.recomputed else ""
        return f"predicted peak {_size(self.peak)} of {_size(room)}: {parts}{again}"


def predict(
    model: Any,
    size: PassSize,
    config: TrainingConfig,
    *,
    others: Iterable[nn.Module] = (),
    cache: int = 0,
    recomputed: int | None = None,
) -> Prediction:
    """The peak of a run whose largest pass is `size`.

    Args:
        model: what is trained, on any device.
        config: optimizer, accumulation, recomputation.
        others: models that are there too, such as a reference.
        cache: bytes of keys and values of an engine that samples between the steps, and stays.
        recomputed: layers recomputed; None for what `config` says.
    """
    if recomputed is None:
        recomputed = _recomputed(config, model.config.num_hidden_layers)
    trainable = [p for p in model.parameters() if p.requires_grad]
    numbers = sum(p.numel() for p in trainable)
    moment = 2 if config.optim_state_dtype == "bf16" else 4
    always = {
        "weights": _bytes(model.parameters()) + sum(_bytes(m.parameters()) for m in others),
        "copies": _copies(model),
        "optimizer": 2 * numbers * moment,
        # The engine joins weights that are multiplied together, in copies of its own.
        "rollouts": cache and cache + _narrow_bytes(model),
    }
    # Later passes of a step, and graphs, find the gradients of all that is trained.
    kept = config.gradient_accumulation_steps > 1 or config.cuda_graphs
    moments = _moments(model, size, recomputed, kept)
    worst = max(moments, key=lambda moment: sum(moment.values()))
    return Prediction(always | worst | {"workspace": WORKSPACE}, recomputed)


def fewest_recomputed(
    model: Any, size: PassSize, config: TrainingConfig, room: int, **beside: Any
) -> Prediction:
    """The prediction with the fewest layers recomputed that fits into `room` bytes; else all.

    `beside`: what `predict` is told beside these.
    """
    for layers in range(model.config.num_hidden_layers + 1):
        found = predict(model, size, config, **beside, recomputed=layers)
        if found.peak <= _SPARE * room:
            break
    return found


def advice(prediction: Prediction, config: TrainingConfig, room: int) -> str | None:
    """What to change where a prediction does not fit into `room` bytes, the best first."""
    if prediction.peak <= _SPARE * room:
        return None
    changes = _changes(prediction.parts, config)
    if prediction.parts["rollouts"] > prediction.parts["activations"]:
        changes.insert(0, "generation_kwargs with cache_bytes or max_batch_size")
    return (
        f"a peak of {_size(prediction.peak)} is predicted, the device has {_size(room)}; "
        f"try {', '.join(changes)}"
    )


def _changes(parts: dict[str, int], config: TrainingConfig) -> list[str]:
    passes, states = [], []
    if not config.gradient_checkpointing:
        passes.append("gradient_checkpointing=True")
    elif config.gradient_checkpointing_layers is not None:
        passes.append("gradient_checkpointing_layers=None (all layers)")
    if getattr(config, "max_tokens_per_pass", None):
        passes.append("a smaller max_tokens_per_pass")
    elif config.per_device_train_batch_size > 1:
        passes.append("a smaller per_device_train_batch_size (more gradient_accumulation_steps)")
    if hasattr(config, "max_length"):
        passes.append("a smaller max_length")
    if 2 * parts["optimizer"] > parts["weights"]:
        states.append("a peft_config (LoRA)")
    if config.optim_state_dtype != "bf16":
        states.append("optim_state_dtype='bf16'")
    if not config.stochastic_rounding:
        states.append("stochastic_rounding=True")
    there = parts["weights"] + parts["optimizer"] + parts["gradients"]
    return [*passes, *states] if parts["activations"] > there else [*states, *passes]


def _moments(model: Any, size: PassSize, recomputed: int, kept: bool) -> Iterator[dict[str, int]]:
    """Activations, gradients and the head's buffers at each moment that may be the largest."""
    layers = model.model.layers
    saved = [
        activations.of_layer(model, index, size, index < recomputed) for index in range(len(layers))
    ]
    below, above = activations.of_embedding(model, size), activations.of_end(model, size)
    head, of_head = activations.of_head(model, size)
    everything = _trained(model)
    gradients = everything if kept else 0
    yield {
        "activations": below + sum(saved) + above,
        "gradients": gradients + of_head,
        "head": head,
    }
    gradients += 0 if kept else of_head
    for index in reversed(range(len(layers))):
        again = activations.of_layer(model, index, size) if index < recomputed else 0
        transient = activations.of_backward(model, index, size)
        own = _trained(layers[index])
        yield {
            "activations": below + sum(saved[: index + 1]) + again + transient,
            "gradients": gradients + own,
            "head": 0,
        }
        gradients += 0 if kept else own
    embedding = model.model.embed_tokens.weight
    table = embedding.nbytes if embedding.requires_grad else 0
    tied = isinstance(model, RewardModel) or embedding is not model.lm_head.weight
    yield {
        "activations": below + activations.of_stream(model, size),
        "gradients": everything + (table if kept or not tied else 0),
        "head": 0,
    }


def _recomputed(config: TrainingConfig, layers: int) -> int:
    if not config.gradient_checkpointing:
        return 0
    asked = config.gradient_checkpointing_layers
    return layers if asked is None or asked < 0 else min(asked, layers)


def _copies(model: Any) -> int:
    """Weights in the dtype of the arithmetic, kept beside wider ones."""
    dtype = model.model.compute_dtype
    if dtype is None:
        return 0
    wider = (p for p in model.parameters() if p.dtype.itemsize > dtype.itemsize)
    return sum(p.numel() for p in wider) * dtype.itemsize


def _narrow_bytes(model: Any) -> int:
    """Of the weights in the dtype of the arithmetic."""
    dtype = model.model.compute_dtype
    return sum(p.numel() * (dtype or p.dtype).itemsize for p in model.parameters())


def _trained(module: nn.Module) -> int:
    return _bytes(p for p in module.parameters() if p.requires_grad)


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(t.nbytes for t in tensors)


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


class Watch:
    """The memory of a run on a GPU: predicted in the log, then measured; elsewhere silent.

    Args:
        model: what is trained.
        config: of the run.
        device: of the run.
        beside: what `predict` is told beside these.
    """

    def __init__(
        self, model: Any, config: TrainingConfig, device: torch.device, **beside: Any
    ) -> None:
        self._model, self._config, self._device = model, config, device
        self._beside, self._predicted = beside, 0

    def begin(self, largest: Callable[[], PassSize]) -> None:
        """Say what is predicted and what to change where it does not fit; settle how many layers
        are recomputed where that was left open.

        Args:
            largest: finds the largest pass of the run.

        Raises:
            ValueError: it was left open on a device whose memory is not known.
        """
        model, config = self._model, self._config
        left_open = config.gradient_checkpointing_layers == -1
        if self._device.type != "cuda":
            if left_open:
                raise ValueError(
                    "gradient_checkpointing_layers is -1: expected a CUDA device, whose memory is "
                    f"known, found {self._device}"
                )
            return
        room, size = _room(self._device), largest()
        if left_open:
            prediction = fewest_recomputed(model, size, config, room, **self._beside)
            model.model.recomputed_layers = prediction.recomputed
        else:
            prediction = predict(model, size, config, **self._beside)
        self._predicted = prediction.peak
        _log.info("%s", prediction.line(room))
        problem = advice(prediction, config, room)
        if problem is not None:
            _log.warning("memory: %s", problem)
        torch.cuda.reset_peak_memory_stats(self._device)

    def end(self) -> dict[str, float]:
        """What was measured, for the output of `train`; nothing where nothing was predicted."""
        if not self._predicted:
            return {}
        measured = torch.cuda.max_memory_allocated(self._device)
        _log.info("measured peak %s (predicted %s)", _size(measured), _size(self._predicted))
        return {"peak_memory": measured, "predicted_peak_memory": self._predicted}


def _room(device: torch.device) -> int:
    """Bytes of the device that this process has or may get."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device)

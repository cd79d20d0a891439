"""The one training loop: SFT, reward models and GRPO differ in their source and their loss."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor, nn

from . import checkpoint, distributed, snapshot, termination
from .averages import Averages, Metric
from .callbacks import Callbacks, TrainerControl, TrainerState
from .config import TrainingConfig
from .devices import exact_sums, keep_memory
from .garbage import collector_spared
from .logging import MetricsLog, Progress
from .optimizer import Optimizer
from .outcomes import NumericError, Outcomes, lag_of
from .passes import LossFn, OpByOp, Pass, Passes
from .schedule import learning_rate
from .termination import Terminated

__all__ = ["Hooks", "NumericError", "Pass", "Source", "TrainOutput", "fit"]

_log = logging.getLogger("fastllm")


class Source(Protocol):
    """Where a trainer's batches come from."""

    steps_per_epoch: int

    def passes(self, step: int) -> list[Pass]:
        """The passes of one optimizer step on this rank."""

    def metrics(self) -> dict[str, Metric]:
        """What the source itself measured since the last call (rewards, lengths)."""

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What a checkpoint must keep beside the step number."""

    def restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Continue from `state`."""

    def close(self) -> None:
        """Training is over; what ran beside it ends."""


@dataclass
class TrainOutput:
    """What `train()` returns, as in Transformers."""

    global_step: int
    training_loss: float
    metrics: dict[str, float]


@dataclass
class Hooks:
    """What the loop asks of the trainer around it."""

    evaluate: Callable[[], dict[str, float]] | None
    save_model: Callable[[Path], None]
    callbacks: Callbacks
    state: TrainerState = field(default_factory=TrainerState)
    description: str = "training"
    shown: tuple[str, ...] = ("loss",)
    """Metrics on the progress line."""


def fit(
    model: nn.Module,
    source: Source,
    loss_fn: LossFn,
    config: TrainingConfig,
    hooks: Hooks,
    *,
    peak_learning_rate: float,
    scale_loss: bool = False,
    passes: Callable[[Optimizer], Passes] | None = None,
    resume_from: Path | None = None,
) -> TrainOutput:
    """Train `model` on `source`.

    Args:
        model: trained in place.
        source: yields each step's passes.
        loss_fn: sum of the loss over a pass and its metrics.
        config: steps, logging, saving, optimizer settings.
        hooks: evaluation, saving, callbacks and the state that they see.
        peak_learning_rate: `config.learning_rate`, or its default where that is None.
        scale_loss: scale the loss for fp16.
        passes: how they are computed; op by op when None.
        resume_from: a committed checkpoint folder; the run continues bit for bit.

    Raises:
        NumericError: a loss or gradient is not finite. Nothing is saved then.
        Terminated: the process got SIGTERM; a checkpoint is saved where the config saves any.
    """
    device = next(model.parameters()).device
    keep_memory(device)
    exact_sums(device)
    optimizer = Optimizer(model, config, scale_loss)
    compute = OpByOp(model, loss_fn, optimizer) if passes is None else passes(optimizer)
    loop = _Loop(model, source, compute, optimizer, config, hooks, peak_learning_rate)
    if resume_from is not None:
        loop.restore(resume_from)
    with collector_spared():
        return loop.run()


class _Loop:
    def __init__(
        self,
        model: nn.Module,
        source: Source,
        compute: Passes,
        optimizer: Optimizer,
        config: TrainingConfig,
        hooks: Hooks,
        peak_learning_rate: float,
    ) -> None:
        self.model, self.source, self.compute = model, source, compute
        self.config, self.hooks, self.state = config, hooks, hooks.state
        self.peak, self.optimizer = peak_learning_rate, optimizer
        self.averages, self.control = Averages(), TrainerControl()
        self.state.max_steps = total_steps(config, source)
        self.state.is_world_process_zero = distributed.is_main()
        self.device = next(model.parameters()).device
        self.outcomes = Outcomes(
            self.averages, self.state, optimizer.scaler.is_enabled(), lag_of(optimizer)
        )
        self.started = time.perf_counter()
        self.window_tokens, self.window_start = 0, self.started
        self.resumed = self.terminated = False
        self.done: dict[str, int] = {}  # the step after which each of these was last done
        self.duties = {"log": self._log_line, "eval": self.evaluate, "save": self.save}

    def run(self) -> TrainOutput:
        first = self.state.global_step
        self._call("on_train_begin")
        with (
            closing(self.source),
            termination.watching() as self.request,
            self._open_log(first) as self.metrics_log,
            self._open_progress(first) as self.progress,
        ):
            while not self._ended:
                self._step()
                self._after_step()
                self.control.should_log = False
                self.control.should_evaluate = self.control.should_save = False
            self._after_step()  # in case a callback asked to stop as the last thing
            self.outcomes.settle()
        self._call("on_train_end")
        if self.terminated:
            self._leave()
        return self._output(first)

    @property
    def _ended(self) -> bool:
        steps_left = self.state.global_step < self.state.max_steps
        return self.control.should_training_stop or self.terminated or not steps_left

    @property
    def _finished(self) -> bool:
        """Ended on its own account, not to be resumed: time for the last line and evaluation."""
        return self._ended and not self.terminated

    def _leave(self) -> NoReturn:
        step = self.state.global_step
        saved = "nothing was saved (save_strategy is no)"
        if self.config.save_strategy != "no":
            saved = f"resume from {Path(self.config.output_dir) / f'checkpoint-{step}'}"
        message = f"ended by SIGTERM after step {step} of {self.state.max_steps}; {saved}"
        _log.warning(message)
        raise Terminated(message)

    def _open_log(self, first: int) -> AbstractContextManager[MetricsLog | None]:
        """The main process writes metrics.jsonl; the others have none."""
        if not distributed.is_main():
            return nullcontext()
        resumed = first if self.resumed else None
        return MetricsLog(self.config.output_dir, self.config.report_to, resumed)

    def _open_progress(self, first: int) -> AbstractContextManager[Progress | None]:
        if not distributed.is_main():
            return nullcontext()
        bar = not self.config.disable_tqdm
        return Progress(self.state.max_steps, self.hooks.description, start=first, bar=bar)

    def _step(self) -> None:
        """One optimizer step over all of its passes."""
        step = self.state.global_step
        if step % self.source.steps_per_epoch == 0:
            self._call("on_epoch_begin")
        self._call("on_step_begin")
        passes = self.source.passes(step)
        normaliser = distributed.all_reduce_sum(float(sum(p.weight for p in passes)))
        step_loss = torch.zeros((), device=self.device)
        if not self.model.training:
            self.model.train()
        self.compute.begin()
        for one in passes:
            loss, metrics = self.compute(one, max(normaliser, 1e-12))
            step_loss = step_loss + loss
            self.averages.add(metrics)
        rate = learning_rate(self.config, self.peak, step, self.state.max_steps)
        step_loss = distributed.all_reduce_sum(step_loss)
        self.outcomes.add(self.optimizer.step(rate, step_loss), step_loss)
        self.averages.add(self.source.metrics())
        self.outcomes.look()
        read = sum(p.tokens for p in passes)
        tokens, requests = map(int, distributed.sums(read, self.request.made))
        self.state.num_input_tokens_seen += tokens
        self.window_tokens += tokens
        self.rate = rate
        self.state.global_step += 1
        self.terminated = requests > 0 and self.state.global_step < self.state.max_steps
        self.state.epoch = self.state.global_step / self.source.steps_per_epoch
        if self.progress is not None:
            self.progress.update(self.state.global_step, tokens)
        self._call("on_step_end")
        if self.state.global_step % self.source.steps_per_epoch == 0:
            self._call("on_epoch_end")

    def _after_step(self) -> None:
        """Log, evaluate and save where it is due, each at most once for a step.

        Saving comes last: a checkpoint stands for a step with all of its lines.
        """
        for duty, act in self.duties.items():
            if self.done.get(duty) != self.state.global_step and self._due(duty):
                self.outcomes.settle()
                act()
                self.done[duty] = self.state.global_step

    def _due(self, duty: str) -> bool:
        control, config, step = self.control, self.config, self.state.global_step
        if duty == "log":
            return control.should_log or self._finished or step % config.logging_steps == 0
        if duty == "eval":
            if self.hooks.evaluate is None:
                return False
            asked = control.should_evaluate or self._finished
            strategy, every = config.eval_strategy, config.eval_steps or config.logging_steps
        else:
            asked = control.should_save or (self._ended and config.save_strategy != "no")
            strategy, every = config.save_strategy, config.save_steps
        every = self.source.steps_per_epoch if strategy == "epoch" else every
        return asked or (strategy != "no" and step % every == 0)

    def _log_line(self) -> None:
        now = time.perf_counter()
        line = self.averages.pop()
        timings = {name: line.pop(name) for name in list(line) if name.startswith("time/")}
        line |= {
            "learning_rate": self.rate,
            "epoch": self.state.epoch,
            "num_tokens": self.state.num_input_tokens_seen,
        }
        speed = self.window_tokens / max(now - self.window_start, 1e-9)
        self.window_tokens, self.window_start = 0, now
        self.log(line, tokens_per_second=speed, **timings)
        if self.progress is not None:
            shown = {name: line[name] for name in self.hooks.shown if name in line}
            self.progress.update(self.state.global_step, 0, **shown)

    def log(self, line: dict[str, float], **timing: float) -> None:
        """Record a line; timings go to the file but not into the comparable history."""
        step = self.state.global_step
        self.state.log_history.append({"step": step, **line})
        if self.metrics_log is not None:
            self.metrics_log.log(step, {**line, **timing})
        self._call("on_log", logs=line, timings=timing)

    def evaluate(self) -> dict[str, float]:
        assert self.hooks.evaluate is not None
        metrics = self.hooks.evaluate()
        self.log(metrics)
        self._call("on_evaluate", metrics=metrics)
        self.window_start = time.perf_counter()
        return metrics

    def save(self) -> None:
        """Commit `checkpoint-N` with everything that resuming needs."""
        if self.metrics_log is not None:
            self.metrics_log.flush()
        source_tensors, source_state = self.source.state()
        own_tensors = {f"source.{name}": t for name, t in source_tensors.items()}
        named = self.optimizer.named_parameters
        tensors = snapshot.optimizer_tensors(self.optimizer.adamw, named)
        random_tensors, random_state = snapshot.random_state(self.device)
        state = {
            "trainer": vars(self.state),
            "scaler": self.optimizer.scaler.state_dict(),
            "loss_sum": self.outcomes.loss_sum,
        }
        checkpoint.save_checkpoint(
            Path(self.config.output_dir),
            self.state.global_step,
            self.hooks.save_model,
            tensors,
            state,
            rank_tensors=own_tensors | random_tensors,
            rank_state={
                "source": source_state,
                "averages": self.averages.state(),
                **random_state,
            },
            save_total_limit=self.config.save_total_limit,
        )
        self._call("on_save")
        self.window_start = time.perf_counter()

    def restore(self, folder: Path) -> None:
        """Continue from a checkpoint; the model's weights were loaded by the trainer."""
        checkpoint.check_world_size(folder)
        tensors, state = checkpoint.load_checkpoint(folder)
        named = self.optimizer.named_parameters
        snapshot.restore_optimizer(self.optimizer.adamw, named, tensors)
        snapshot.restore_random_state(tensors, state, self.device)
        self.optimizer.scaler.load_state_dict(state["scaler"])
        self.averages.restore(state["averages"])
        self.outcomes.loss_sum = state["loss_sum"]
        own = {name: getattr(self.state, name) for name in ("max_steps", "is_world_process_zero")}
        vars(self.state).update(state["trainer"] | own)
        source = {
            n.removeprefix("source."): t for n, t in tensors.items() if n.startswith("source.")
        }
        self.source.restore(source, state["source"])
        self.done, self.resumed = dict.fromkeys(self.duties, self.state.global_step), True
        _log.info("resumed at step %d from %s", self.state.global_step, folder)

    def _call(self, event: str, **extra: Any) -> None:
        self.hooks.callbacks.call(event, self.state, self.control, model=self.model, **extra)

    def _output(self, first: int) -> TrainOutput:
        seconds = time.perf_counter() - self.started
        steps = self.state.global_step
        loss = self.outcomes.loss_sum / max(1, steps)
        metrics = {
            "train_runtime": seconds,
            "train_steps_per_second": (steps - first) / seconds,
            "train_loss": loss,
        }
        return TrainOutput(steps, loss, metrics)


def total_steps(config: TrainingConfig, source: Source) -> int:
    """Optimizer steps of a run."""
    if config.max_steps > 0:
        return config.max_steps
    return math.ceil(config.num_train_epochs * source.steps_per_epoch)

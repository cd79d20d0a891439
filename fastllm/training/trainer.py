"""What the three trainers share: model, tokenizer, device, the run folder, TRL's methods."""

from __future__ import annotations

import copy
import json
import logging
import random
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import ops
from ..data.errors import DataError
from ..layout import PackedLayout
from ..model import adapters, tensors, weights
from ..model.config import ModelConfig
from ..model.lora import LoraConfig, add_lora, merge_lora
from ..ops.working import keep_copies, narrow_frozen
from . import checkpoint, distributed, loop
from .activations import PassSize
from .averages import Averages, Metric
from .batches import Send
from .buckets import padded
from .callbacks import Callbacks, TrainerState
from .config import SCRATCH_LEARNING_RATE, TrainingConfig
from .devices import pick_device, pick_dtype
from .graphs import GraphedPasses
from .graphs import check as check_graphs
from .loop import Hooks, Pass, Source, TrainOutput
from .memory import Watch
from .prefetch import Placement
from .snapshot import restore_weights
from .start import as_tokenizer, tokenizer_of

_log = logging.getLogger("fastllm")


class Trainer(ABC):
    """Base of SFTTrainer, RewardTrainer and GRPOTrainer.

    A subclass encodes its data, yields a `Source` and defines the loss of one pass.
    """

    config_class: ClassVar[type[TrainingConfig]]
    model_class: ClassVar[type[Any]]
    description: ClassVar[str]
    """What the progress line calls the run."""
    shown: ClassVar[tuple[str, ...]] = ("loss",)
    """Metrics on the progress line."""

    def __init__(
        self,
        model: str | Path | nn.Module | ModelConfig,
        args: TrainingConfig | None,
        processing_class: Any,
        callbacks: Iterable[Any] | None,
        peft_config: Any,
    ) -> None:
        self.args = args if args is not None else self.config_class()
        if not isinstance(self.args, self.config_class):
            raise ValueError(
                f"args: expected {self.config_class.__name__}, found {type(self.args).__name__}"
            )
        self.device = pick_device(self.args)
        distributed.start(self.device)
        self.dtype = pick_dtype(self.args, self.device)
        self.callbacks = Callbacks(callbacks, self.args)
        self.state = TrainerState()
        self.from_scratch = isinstance(model, ModelConfig)
        self.base_path = str(model) if isinstance(model, str | Path) else None
        self.model: Any = self._load(model)
        self.processing_class = as_tokenizer(processing_class, self.base_path)
        self._check_tokenizer()
        if peft_config is not None:
            self._add_adapter(LoraConfig.from_peft(peft_config))
        self._prepare_model()

    # -- what a subclass defines ---------------------------------------------------------------

    @abstractmethod
    def source(self) -> Source:
        """Where the batches of training come from."""

    @abstractmethod
    def loss(self, model: Any, batch: Any) -> tuple[Tensor, dict[str, Metric]]:
        """Sum of the loss over a pass, and metrics as (sum, weight)."""

    @abstractmethod
    def evaluation_passes(self) -> list[Pass] | None:
        """Held-out passes, or None when there are no held-out data."""

    @abstractmethod
    def largest_pass(self, source: Any) -> PassSize:
        """How large the largest pass of a run on `source` is, or may be."""

    # -- Transformers' methods -----------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | Path | bool | None = None) -> TrainOutput:
        """Train, and leave the final model in `args.output_dir`.

        Args:
            resume_from_checkpoint: True or "auto" for the newest good checkpoint of the run
                folder, or a checkpoint folder. None or "never" starts afresh.

        Raises:
            ValueError: the run folder holds checkpoints and neither resuming nor
                `overwrite_output_dir` was asked for.
        """
        if self.args.cuda_graphs:
            check_graphs(self.model, self.device)
        vars(self.state).update(vars(TrainerState()))
        self._check_adapter_folder()
        resume = self._resume_folder(resume_from_checkpoint)
        if resume is not None:
            self._restore_model(resume)
        self._write_run_file()
        hooks = Hooks(
            evaluate=None if self.evaluation_passes() is None else self.evaluate,
            save_model=self.save_model,
            callbacks=self.callbacks,
            state=self.state,
            description=self.description,
            shown=self.shown,
        )
        source = self.source()
        memory = Watch(self.model, self.args, self.device, **self._memory_beside())
        memory.begin(lambda: self.largest_pass(source))
        output = loop.fit(
            self.model,
            source,
            self.loss,
            self.args,
            hooks,
            peak_learning_rate=self.learning_rate,
            scale_loss=self.dtype is torch.float16,
            passes=partial(GraphedPasses, self.model, self.loss) if self.args.cuda_graphs else None,
            resume_from=resume,
        )
        output.metrics |= memory.end()
        if distributed.is_main():
            self.save_model(Path(self.args.output_dir))
        distributed.barrier()
        self.model.eval()
        return output

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Mean loss and metrics over the held-out data, with the prefix `eval_`."""
        passes = self.evaluation_passes()
        if passes is None:
            raise ValueError("evaluate: there are no held-out data (eval_dataset, eval_fraction)")
        self.model.eval()
        averages = Averages()
        for one in passes:
            total, metrics = self.loss(self.model, one.batch)
            averages.add({"loss": (total, one.weight), **metrics})
        return {f"eval_{name}": value for name, value in averages.pop().items()}

    def save_model(self, output_dir: str | Path | None = None) -> None:
        """Write the model (or its adapter) and the tokenizer as a Hugging Face folder."""
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        if hasattr(self.model, "lora_config"):
            adapters.save_adapter(self.model, folder, self.base_path or "")
        else:
            weights.save_model(self.model, folder)
        self.processing_class.save_pretrained(folder)

    def add_callback(self, callback: Any) -> None:
        self.callbacks.add(callback)

    # -- for subclasses ------------------------------------------------------------------------

    @cached_property
    def placement(self) -> Placement:
        """Puts batches where they are computed."""
        return Placement(self.device, self._prepare_layouts)

    @property
    def sending(self) -> Send:
        """What a source of training does with its batches."""
        if not self.args.cuda_graphs:
            return self.placement.send
        return lambda batch: self.placement.send_parcel(padded(batch))

    def _memory_beside(self) -> dict[str, Any]:
        """What the prediction of memory must know beside the model and its passes."""
        return {}

    def _prepare_layouts(self, layout: PackedLayout, last: PackedLayout) -> None:
        """Make the tables that a pass reads: of the last layer, and of those before it."""
        config = self.model.config
        for layer in range(config.num_hidden_layers):
            ops.prepare_layout(
                last if layer == config.num_hidden_layers - 1 else layout,
                self.dtype,
                config.num_attention_heads,
                config.num_key_value_heads,
                config.head_dim,
                window=config.window(layer),
                device=self.device,
            )

    # -- set-up --------------------------------------------------------------------------------

    @property
    def learning_rate(self) -> float:
        """The peak learning rate, with the default for this kind of start."""
        if self.args.learning_rate is not None:
            return self.args.learning_rate
        if self.from_scratch:
            return SCRATCH_LEARNING_RATE
        return self.args.pretrained_learning_rate

    def _load(self, model: str | Path | nn.Module | ModelConfig) -> Any:
        torch.manual_seed(self.args.seed)
        random.seed(self.args.seed)  # reward functions may draw from it
        if isinstance(model, ModelConfig):
            return self.model_class(model)
        if isinstance(model, str | Path):
            loaded = self._from_path(model)
            if hasattr(loaded, "lora_config"):  # part of the base from now on, as on loading it
                merge_lora(loaded)
                loaded.requires_grad_(True)
            return loaded
        if isinstance(model, self.model_class):
            return model
        return weights.from_transformers(model, self.model_class)

    def _from_path(self, path: str | Path) -> Any:
        return weights.load_model(path, self.model_class)

    def _check_tokenizer(self) -> None:
        rows = self.model.config.vocab_size
        if self.processing_class.vocab_size > rows:
            raise DataError(
                f"vocabulary mismatch: the tokenizer has {self.processing_class.vocab_size:,} "
                f"tokens, the model's embedding table {rows:,} rows"
            )

    def _add_adapter(self, config: LoraConfig) -> None:
        if self.base_path is None:
            raise ValueError(
                "LoRA adapts a pretrained model: give `model` as a path, so that the adapter can "
                "name its base"
            )
        torch.manual_seed(self.args.seed)
        add_lora(self.model, config)

    def _prepare_model(self) -> None:
        """Weights on the device, in fp32 (with working copies on a GPU) or as the config says; the
        arithmetic takes `dtype`."""
        self.model.to(device=self.device, dtype=self._weight_dtype())
        self.model.model.compute_dtype = self.dtype
        if self.device.type == "cuda" and self.dtype != torch.float32:
            narrow_frozen(self.model.parameters(), self.dtype)
            keep_copies(self.model.parameters(), self.dtype)
        self.model.model.gradient_checkpointing = self.args.gradient_checkpointing
        asked = self.args.gradient_checkpointing_layers
        self.model.model.recomputed_layers = None if asked == -1 else asked

    def _weight_dtype(self) -> torch.dtype:
        if not self.args.stochastic_rounding:
            return torch.float32
        if self.dtype != torch.bfloat16:
            raise ValueError(
                f"stochastic_rounding: expected dtype bf16, found {self.dtype} on {self.device}"
            )
        return torch.bfloat16

    def _check_adapter_folder(self) -> None:
        """An adapter cannot lie where a whole model is: say so before training, not after."""
        run = Path(self.args.output_dir)
        whole = [name for name in (tensors.WEIGHTS, tensors.INDEX) if (run / name).exists()]
        if whole and hasattr(self.model, "lora_config"):
            raise ValueError(
                f"{run} holds a whole model ({whole[0]}): choose another output_dir for the adapter"
            )

    def _resume_folder(self, resume: str | Path | bool | None) -> Path | None:
        run = Path(self.args.output_dir)
        checkpoint.clean_stale(run)
        if resume in (None, False, "never"):
            existing = checkpoint.checkpoints(run)
            if existing and not self.args.overwrite_output_dir:
                raise ValueError(
                    f"{run} holds checkpoints of an earlier run (newest: {existing[0].name}); "
                    "resume it, set overwrite_output_dir, or choose another folder"
                )
            if distributed.is_main():
                for folder in existing:
                    shutil.rmtree(folder)
            distributed.barrier()
            return None
        if resume in (True, "auto"):
            return checkpoint.latest_checkpoint(run)
        return Path(str(resume))

    def _restore_model(self, folder: Path) -> None:
        if tokenizer_of(folder).fingerprint != self.processing_class.fingerprint:
            raise DataError(
                f"{folder} was trained with another tokenizer than the one at hand "
                f"({self.processing_class.description}): resume with the data or the tokenizer "
                "that the run began with"
            )
        saved = weights.load_model(folder, self.model_class)
        restore_weights(self.model, saved.state_dict())

    def _write_run_file(self) -> None:
        """`run.json`: the settings as resolved, so that a run can be understood and repeated."""
        if not distributed.is_main():
            return
        run = Path(self.args.output_dir)
        run.mkdir(parents=True, exist_ok=True)
        content = {
            "trainer": type(self).__name__,
            "model": self.base_path or "from scratch",
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "tokenizer": self.processing_class.description,
            "device": str(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),
            "learning_rate": self.learning_rate,
            "torch": torch.__version__,
            "config": vars(self.args),
        }
        (run / "run.json").write_text(json.dumps(content, indent=2, default=str) + "\n")


def split_by_prompt(
    records: list[Any], fraction: float, seed: int, key: Callable[[Any], str]
) -> tuple[list[Any], list[Any]]:
    """Training and held-out records; records with one prompt stay on one side.

    Args:
        records: all records.
        fraction: part to hold out; at least one prompt when above 0.
        seed: of the choice.
        key: the prompt of a record.
    """
    prompts = sorted({key(record) for record in records})
    if len(prompts) < 2:
        raise DataError(
            f"eval_fraction {fraction}: the records share one prompt, nothing can be held out; "
            "give evaluation data or set eval_fraction to 0"
        )
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed)).tolist()
    count = min(max(1, round(fraction * len(prompts))), len(prompts) - 1)
    held = {prompts[i] for i in order[:count]}
    train = [record for record in records if key(record) not in held]
    return train, [record for record in records if key(record) in held]


def frozen_copy(model: nn.Module) -> nn.Module:
    """A copy that nothing trains: the reference of a policy.

    On a GPU its weights are in the dtype of the arithmetic, which is all that reads them.
    """
    frozen = copy.deepcopy(model).requires_grad_(False).eval()
    dtype = getattr(frozen.get_submodule("model"), "compute_dtype", None)
    for parameter in frozen.parameters():
        if dtype is not None and parameter.is_cuda:
            parameter.data = parameter.data.to(dtype)
    return frozen

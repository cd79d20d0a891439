"""Settings of the trainers, in TRL's and Transformers' names, each written once.

The command line's options, a YAML file's keys and the classes' keywords all come from these
dataclasses. A field that is not here is an error that names it, never ignored. This module
imports no torch, so that `fastllm --help` answers at once.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

SCRATCH_LEARNING_RATE = 1e-3

GENERATION_KWARGS = (
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "min_new_tokens",
    "stop_token_ids",
    "stop_strings",
    "cache_bytes",
    "max_batch_size",
    "prefill_tokens",
    "weights",
)
"""What `GRPOConfig.generation_kwargs` may hold: keywords of `fastllm.generate`."""


@dataclass(kw_only=True)
class TrainingConfig:
    """What every trainer has."""

    pretrained_learning_rate: ClassVar[float]
    """TRL's default, where `learning_rate` is None and the model was trained before."""

    output_dir: str = "runs/default"
    """Run folder: a Hugging Face folder, with checkpoint-N folders and metrics.jsonl in it."""
    overwrite_output_dir: bool = False
    """Remove the checkpoints of an earlier run in output_dir instead of refusing to start."""
    device: str = "auto"
    """auto (CUDA, then MPS, then the CPU), or a torch device."""
    use_cpu: bool = False
    """Train on the CPU even where there is a GPU."""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Arithmetic of the step; weights and optimizer state stay fp32 (see stochastic_rounding and
    optim_state_dtype). auto: bf16 on CUDA devices that have it, else fp32. fp16 scales the loss."""
    bf16: bool | None = None
    """TRL's switch for `dtype`: True is bf16, False forbids it under auto."""
    fp16: bool = False
    """TRL's switch for `dtype`: True is fp16."""
    per_device_train_batch_size: int = 8
    """Sequences (pairs, completions) of one forward and backward pass on one device."""
    per_device_eval_batch_size: int = 8
    gradient_accumulation_steps: int = 1
    """Passes per optimizer step; losses are normalised by the count over all of them."""
    num_train_epochs: float = 3.0
    max_steps: int = -1
    """Optimizer steps; -1 for num_train_epochs."""
    learning_rate: float | None = None
    """None: TRL's default for a pretrained model, 1e-3 for a model built from scratch."""
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    warmup_steps: float = 0
    """Steps of linear warm-up; below 1, a fraction of all steps."""
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm; 0 for no clipping."""
    stochastic_rounding: bool = False
    """Under bf16, keep the weights themselves in bf16 and round each update up or down at random,
    right on average, instead of fp32 weights with bf16 copies: 4 bytes less for each parameter. The
    saved model is bf16."""
    optim_state_dtype: Literal["fp32", "bf16"] = "fp32"
    """AdamW's two moments. bf16 is rounded stochastically: 4 bytes less for each parameter."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more time."""
    gradient_checkpointing_layers: int | None = None
    """With gradient_checkpointing, how many layers (the first ones) are recomputed; None for all,
    -1 for as few as the prediction of memory allows on this GPU."""
    cuda_graphs: bool = False
    """SFT and reward models on CUDA: replay a pass from a graph captured for its rounded-up sizes,
    which spares small models the launches."""
    seed: int = 42
    dataloader_num_workers: int = 1
    """Threads (in TRL: processes) that pack coming batches while a step is computed; 0: none."""
    dataloader_prefetch_factor: int = 2
    """Steps that each of these threads is ahead."""
    logging_steps: int = 10
    disable_tqdm: bool = False
    """No progress bar on a terminal: plain lines, as elsewhere."""
    report_to: str = "none"
    """none or tensorboard; metrics.jsonl is always written."""
    eval_strategy: Literal["no", "steps", "epoch"] = "no"
    """When to evaluate during training. With held-out data there is always a last evaluation."""
    eval_steps: int | None = None
    """Steps between evaluations; None for logging_steps."""
    eval_fraction: float = 0.0
    """Part of the data held out when no evaluation data is given, split by prompt."""
    save_strategy: Literal["no", "steps", "epoch"] = "steps"
    save_steps: int = 500
    save_total_limit: int | None = None
    """Checkpoints kept, the newest ones; None for all."""
    packing: bool = True
    """False pads every sequence of a pass to the longest: the same numbers, more work."""
    share_prefix: bool = True
    """False computes a shared prompt again for every answer: the same numbers, more work."""

    def __post_init__(self) -> None:
        self._choices()
        for name in (
            "per_device_train_batch_size",
            "per_device_eval_batch_size",
            "gradient_accumulation_steps",
            "dataloader_prefetch_factor",
            "logging_steps",
            "save_steps",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, found {getattr(self, name)}")
        if self.dataloader_num_workers < 0:
            raise ValueError(
                f"dataloader_num_workers must be at least 0, found {self.dataloader_num_workers}"
            )
        if self.max_steps == 0 or self.max_steps < -1:
            raise ValueError(f"max_steps must be positive or -1, found {self.max_steps}")
        if not 0 <= self.eval_fraction < 1:
            raise ValueError(f"eval_fraction must lie in [0, 1), found {self.eval_fraction}")
        if self.learning_rate is not None and self.learning_rate < 0:
            raise ValueError(f"learning_rate must not be negative, found {self.learning_rate}")
        if self.fp16 and self.bf16:
            raise ValueError("fp16 and bf16 are both True: choose one")
        if self.stochastic_rounding and (self.fp16 or self.dtype in ("fp32", "fp16")):
            found = "fp16" if self.fp16 else self.dtype
            raise ValueError(f"stochastic_rounding: expected dtype bf16, found {found}")
        self._check_recomputation()

    def _check_recomputation(self) -> None:
        layers = self.gradient_checkpointing_layers
        if layers is None:
            return
        if not self.gradient_checkpointing:
            raise ValueError(
                f"gradient_checkpointing_layers is {layers}, but gradient_checkpointing is off"
            )
        if layers < -1:
            raise ValueError(
                "gradient_checkpointing_layers: expected a number of layers, -1 or None; "
                f"found {layers}"
            )

    def _choices(self) -> None:
        """Literal fields take one of their values."""
        import typing

        for name, hint in typing.get_type_hints(type(self)).items():
            if typing.get_origin(hint) is Literal:
                allowed, found = typing.get_args(hint), getattr(self, name)
                if found not in allowed:
                    expected = ", ".join(str(a) for a in allowed)
                    raise ValueError(f"{name}: expected one of {expected}; found {found!r}")

    def replaced(self, **changes: Any) -> TrainingConfig:
        """A copy with some fields changed, validated again."""
        return dataclasses.replace(self, **changes)


@dataclass(kw_only=True)
class SFTConfig(TrainingConfig):
    """Supervised fine-tuning."""

    pretrained_learning_rate: ClassVar[float] = 2e-5
    max_length: int = 1024
    """Longer sequences are cut at the end; how many is logged."""
    completion_only_loss: bool | None = None
    """Loss on the completion only; None: where records have a prompt and a completion."""
    assistant_only_loss: bool = False
    """Loss on the assistant's turns of `messages` only."""


@dataclass(kw_only=True)
class RewardConfig(TrainingConfig):
    """Reward model on preference pairs."""

    pretrained_learning_rate: ClassVar[float] = 1e-4
    num_train_epochs: float = 1.0
    """Reward models overfit after one pass over the pairs (Ouyang et al., 2022)."""
    max_length: int = 1024
    """Pairs with a longer side are dropped, as in TRL; how many is logged."""
    center_rewards_coefficient: float | None = None
    """Weight of mean((chosen + rejected)^2), which keeps scores around zero."""


@dataclass(kw_only=True)
class GRPOConfig(TrainingConfig):
    """Group relative policy optimisation.

    A step trains on per_device_train_batch_size * gradient_accumulation_steps completions per
    device, in groups of num_generations to a prompt.
    """

    pretrained_learning_rate: ClassVar[float] = 1e-6
    num_generations: int = 8
    """Completions of each prompt (G)."""
    max_prompt_length: int | None = None
    """Longer prompts are an error; None: what the model's positions leave for the completion."""
    max_completion_length: int = 512
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float | None = None
    repetition_penalty: float = 1.0
    generation_kwargs: dict[str, Any] | None = None
    """More keywords of `fastllm.generate` (min_new_tokens, stop_strings, cache_bytes, ...); they
    override the fields above."""
    beta: float = 0.0
    """Weight of the KL term against the reference; 0 loads no reference."""
    epsilon: float = 0.2
    epsilon_high: float | None = None
    """Upper clip range; None for epsilon. For cispo it is the clamp of the ratio itself."""
    delta: float | None = None
    """Upper bound of the ratio for negative advantages too (two-sided clipping)."""
    num_iterations: int = 1
    """Optimizer passes over each batch of rollouts."""
    steps_per_generation: int | None = None
    """Passes (micro-batches) between rollouts; None for gradient_accumulation_steps."""
    max_tokens_per_pass: int | None = None
    """Divide a step's completions into passes of at most so many packed tokens instead of
    per_device_train_batch_size completions: the same loss and gradients."""
    dynamic_sampling_rounds: int = 0
    """Rounds in which groups of equal rewards are replaced by groups of new prompts (dynamic
    sampling of DAPO); 0 for none. A round ends early where nothing is left to replace."""
    loss_type: Literal["grpo", "bnpo", "dr_grpo", "dapo", "cispo"] = "dapo"
    importance_sampling_level: Literal["token", "sequence"] = "token"
    """sequence is GSPO; use it with loss_type grpo."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    reward_weights: list[float] | None = None
    """One weight for each reward function; None for 1 each."""
    reward_batch_size: int | None = None
    """Completions (rounded up to whole groups) that reward functions get at a time, in a thread,
    while later ones are sampled; None: all in one call, after sampling, as in TRL."""
    mask_truncated_completions: bool = False
    """Completions that reached max_completion_length carry no loss."""
    shuffle_dataset: bool = True
    deterministic: bool = False
    """Sample and train with one order of summation: in fp32 on the CPU, the sampler's
    log-probabilities are the trainer's, bit for bit. Slower."""
    log_completions: bool = False
    """Write the completions of logged steps to completions.jsonl."""

    def __post_init__(self) -> None:
        # TRL also takes True and False here.
        if isinstance(self.scale_rewards, bool):
            self.scale_rewards = "group" if self.scale_rewards else "none"
        super().__post_init__()
        if self.num_generations < 2:
            raise ValueError(
                f"num_generations must be at least 2 to compare, found {self.num_generations}"
            )
        per_rollout = self.per_device_train_batch_size * self.passes_per_rollout
        if per_rollout % self.num_generations:
            raise ValueError(
                f"completions per rollout and device ({self.per_device_train_batch_size} * "
                f"{self.passes_per_rollout} passes) must be a multiple of num_generations "
                f"({self.num_generations})"
            )
        if self.loss_type == "cispo" and self.epsilon_high is None:
            raise ValueError(
                "loss_type cispo clamps the ratio itself at epsilon_high: give one, say 5.0"
            )
        if self.passes_per_rollout % self.gradient_accumulation_steps:
            raise ValueError(
                f"steps_per_generation ({self.steps_per_generation}) must be a multiple of "
                f"gradient_accumulation_steps ({self.gradient_accumulation_steps})"
            )
        self._check_counts()
        self._check_generation_kwargs()
        self._check_deterministic()

    def _check_counts(self) -> None:
        if self.cuda_graphs:
            raise ValueError(
                "cuda_graphs: expected False for GRPO, whose passes have the sizes of what was "
                "sampled (generation has graphs of its own)"
            )
        for name in ("max_completion_length", "num_iterations"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, found {getattr(self, name)}")
        for name in ("max_tokens_per_pass", "reward_batch_size", "steps_per_generation"):
            found = getattr(self, name)
            if found is not None and found < 1:
                raise ValueError(f"{name}: expected at least 1 or None, found {found}")
        if self.dynamic_sampling_rounds < 0:
            raise ValueError(
                "dynamic_sampling_rounds: expected 0 (none) or more, found "
                f"{self.dynamic_sampling_rounds}"
            )

    def _check_generation_kwargs(self) -> None:
        if not isinstance(self.generation_kwargs, dict | None):
            raise ValueError(
                f"generation_kwargs: expected a dict or None, found {self.generation_kwargs!r}"
            )
        elsewhere = {"temperature": "temperature", "max_new_tokens": "max_completion_length"}
        for name in self.generation_kwargs or ():
            if name in elsewhere:
                raise ValueError(
                    f"generation_kwargs: {name} concerns the loss too: set {elsewhere[name]}"
                )
            if name not in GENERATION_KWARGS:
                raise ValueError(
                    f"generation_kwargs: expected keys among {', '.join(GENERATION_KWARGS)}; "
                    f"found {name!r}"
                )

    def _check_deterministic(self) -> None:
        if not self.deterministic:
            return
        for name in ("packing", "share_prefix"):
            if not getattr(self, name):
                raise ValueError(
                    f"deterministic: expected {name} True (the sampler reads a prompt once, and "
                    "sums in that order), found False"
                )
        weights = (self.generation_kwargs or {}).get("weights", "auto")
        if weights != "auto":
            raise ValueError(
                f"deterministic: expected the sampler to have the weights of training (generation_"
                f"kwargs without weights), found weights {weights!r}"
            )
        if self.dtype not in ("auto", "fp32") or self.bf16 or self.fp16:
            found = self.dtype if self.dtype not in ("auto", "fp32") else "bf16 or fp16"
            raise ValueError(f"deterministic: expected dtype fp32, found {found}")

    @property
    def passes_per_rollout(self) -> int:
        """Micro-batches that one rollout feeds, on one device."""
        return self.steps_per_generation or self.gradient_accumulation_steps

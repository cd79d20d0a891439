"""Group relative policy optimisation: sample groups, score them, move towards the better ones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import generation, ops
from ..data.encoding import EncodedPrompt, encode_prompts
from ..data.packing import TokenBatch
from ..data.records import PromptRecord, prompt_records
from ..data.tasks import exact_match, generate_tasks, grpo_prompts
from ..model.lora import disable_lora
from ..model.transformer import Transformer
from ..ops.decode_attention import BLOCK
from . import distributed
from .activations import PassSize
from .averages import Averages, Metric
from .completions_log import write_completions
from .config import GRPOConfig
from .groups import Group, GroupSource, sampling_options
from .grpo_loss import Tokens, grpo_loss, on_policy_credit
from .grpo_metrics import SamplerAgreement, mean
from .grpo_passes import GRPOBatch, PassPlan
from .loop import Pass, TrainOutput
from .rewards import Rewards
from .rollouts import RolloutSource
from .sampler import EpochSampler
from .scoring import RewardLog, Scorer, as_rollout
from .start import config_from, finish
from .timings import Timings
from .trainer import Trainer, frozen_copy, split_by_prompt


def train_grpo(
    policy_ckpt: str | Path,
    reward_ckpt: str | Path | Sequence[str | Path] | None = None,
    out_dir: str | Path = "runs/grpo",
    *,
    prompts: Any = None,
    reward_funcs: Any = None,
    tokenizer: Any = None,
    eval_prompts: Any = None,
    steps: int | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    save_every: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    seed: int = 42,
    resume: str | Path | bool = "never",
    peft_config: Any = None,
    callbacks: Iterable[Any] | None = None,
    **config: Any,
) -> Transformer:
    """Improve a policy on prompts with reward models, reward functions, or both.

    Args:
        policy_ckpt: run folder, checkpoint, `.pt` file or Hugging Face folder.
        reward_ckpt: one reward model or several, likewise.
        out_dir: run folder; becomes a Hugging Face folder.
        prompts: a .jsonl(.gz) path or records with `prompt`; other columns go to the reward
            functions. None takes generated arithmetic and string tasks.
        reward_funcs: a function in TRL's signature, or several. With generated prompts and
            neither a reward model nor a function, the tasks' exact check.
        eval_prompts: held-out prompts: one greedy completion of each is scored.
        config: any other field of `GRPOConfig`.

    The other arguments are those of `train_sft`.

    Returns:
        The trained policy.

    Raises:
        DataError: a bad record, or a reward model with another vocabulary than the policy.
        ValueError, TypeError: settings that do not fit.
    """
    functions = [*_listed(reward_ckpt), *_listed(reward_funcs)]
    if prompts is None:
        prompts = grpo_prompts(generate_tasks(4096, seed))
        functions = functions or [exact_match]
    if "max_completion_length" not in config:
        config["max_completion_length"] = 64
    trainer = GRPOTrainer(
        policy_ckpt,
        functions,
        config_from(
            GRPOConfig,
            out_dir,
            steps=steps,
            batch_size=batch_size,
            lr=lr,
            save_every=save_every,
            device=device,
            dtype=dtype,
            seed=seed,
            **config,
        ),
        train_dataset=prompts,
        eval_dataset=eval_prompts,
        processing_class=tokenizer,
        callbacks=callbacks,
        peft_config=peft_config,
    )
    trainer.train(resume)
    finish(trainer, policy_ckpt)
    return trainer.model


class GRPOTrainer(Trainer):
    """TRL's GRPOTrainer with the sampler inside: rollouts use the weights that are trained."""

    config_class = GRPOConfig
    model_class = Transformer
    description = "GRPO"
    shown = ("reward", "completions/mean_length")
    args: GRPOConfig
    model: Transformer

    def __init__(
        self,
        model: Any,
        reward_funcs: Any,
        args: GRPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        callbacks: Iterable[Any] | None = None,
        peft_config: Any = None,
    ) -> None:
        super().__init__(model, args, processing_class, callbacks, peft_config)
        sampling_options(self.args, self.processing_class)  # raises now what sampling would
        records, held = prompt_records(train_dataset), None
        if eval_dataset is not None:
            held = prompt_records(eval_dataset, "eval_prompts")
        elif self.args.eval_fraction:
            records, held = split_by_prompt(
                records, self.args.eval_fraction, self.args.seed, lambda r: str(r.prompt)
            )
        self._prompts = self._encode(records)
        self._check_budget()
        self._held = None if held is None else self._encode(held)
        self.rewards = Rewards(
            _listed(reward_funcs),
            self.args.reward_weights,
            self.processing_class,
            self.device,
            self.dtype,
        )
        self._log, self._agreement = RewardLog(), SamplerAgreement(self.device)
        self._reference = self._reference_model()
        self._check_deterministic()

    def train(self, resume_from_checkpoint: str | Path | bool | None = None) -> TrainOutput:
        with self._one_order():
            return super().train(resume_from_checkpoint)

    def source(self) -> RolloutSource:
        config, world = self.args, distributed.world_size()
        per_rank = config.per_device_train_batch_size * config.passes_per_rollout
        prompts = per_rank // config.num_generations * world
        sampler = EpochSampler(
            len(self._prompts), prompts, config.seed, shuffle=config.shuffle_dataset, fill=True
        )
        timings = Timings("prefill", "decode", "reward", "train")
        scorer = Scorer(self.rewards, self.processing_class, self._log, self._context())
        pad = self.processing_class.pad_token_id or 0
        return RolloutSource(
            self.model,
            GroupSource(self.model, self._prompts, sampler, scorer, config, timings),
            PassPlan(config, self.placement, pad),
            config,
            reward_names=self.rewards.names,
            policy_logp=self._policy_logp,
            on_rollout=self._write_completions,
            on_step=lambda: self._agreement.take() | self._log.take_metrics(),
            timings=timings,
        )

    def loss(self, model: Any, batch: GRPOBatch) -> tuple[Tensor, dict[str, Metric]]:
        credit = None
        if batch.old_logp is None and self.dtype is not torch.float16:  # whose range is too small
            credit = on_policy_credit(batch.advantages, batch.weights, self.args)
        if credit is None:
            logp, entropy = self._logp(model, batch.tokens)
        else:
            with_gradient, logp, entropy = self._credited(model, batch.tokens, credit)
        tokens = Tokens(
            logp=logp,
            old=batch.old_logp,
            reference=self._reference_logp(batch.tokens),
            sequence=batch.tokens.sequence,
            lengths=batch.lengths,
            advantages=batch.advantages,
            weights=batch.weights,
            skipped=batch.skipped,
        )
        loss, metrics = grpo_loss(tokens, self.args)
        if credit is not None:
            loss = with_gradient + (loss - with_gradient).detach()
        # Old log-probabilities are the trainer's own of the rollout's weights; on policy, now.
        trainer_logp = logp.detach() if batch.old_logp is None else batch.old_logp
        self._agreement.add(trainer_logp, batch.sampler_logp)
        return loss, metrics | {"entropy": (entropy.detach().sum(), logp.numel())}

    def evaluation_passes(self) -> list[Pass] | None:
        """GRPO evaluates by sampling; the presence of held-out prompts is what counts."""
        return None if self._held is None else []

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Mean reward of one greedy completion for each held-out prompt, `eval_reward` and
        `eval_rewards/<function>/mean`; penalty and stops are those of training."""
        if self._held is None:
            raise ValueError("evaluate: there are no held-out prompts (eval_dataset)")
        rank, world = distributed.rank(), distributed.world_size()
        held = self._held[rank::world]
        with self._one_order():
            completions = generation.generate(
                self.model,
                [p.input_ids for p in held],
                self.args.max_completion_length,
                temperature=0.0,
                **sampling_options(self.args, self.processing_class),
            )
            rollout = as_rollout(held, completions, self.processing_class)
            total, each = self.rewards(rollout, **self._context())
        self._log.take_extra(0)
        averages = Averages()
        averages.add(self._log.take_metrics())
        columns = zip(
            ["reward", *self._reward_metric_names()], [total, *each.unbind(1)], strict=True
        )
        for name, values in columns:
            averages.add({name: mean(values)})
        lengths = [len(c.token_ids) for c in completions]
        averages.add({"completions/mean_length": (sum(lengths), len(lengths))})
        return {f"eval_{name}": value for name, value in averages.pop().items()}

    def largest_pass(self, source: RolloutSource) -> PassSize:
        """What completions of full length would make of it."""
        config, longest = self.args, max(len(p.input_ids) for p in self._prompts)
        completions = config.per_device_train_batch_size
        targets = completions * config.max_completion_length
        prompts = -(-completions // config.num_generations) if config.share_prefix else completions
        tokens = targets + prompts * longest
        if config.max_tokens_per_pass is not None:
            tokens = config.max_tokens_per_pass
            targets = min(targets, tokens)
        return PassSize(tokens, targets, targets)

    # -- parts ---------------------------------------------------------------------------------

    def _encode(self, records: list[PromptRecord]) -> list[EncodedPrompt]:
        limit = self.model.config.max_position_embeddings - self.args.max_completion_length
        allowed = self.args.max_prompt_length or limit
        if allowed > limit or allowed < 1:
            raise ValueError(
                f"the model has {self.model.config.max_position_embeddings} positions: too few for "
                f"max_completion_length {self.args.max_completion_length} and prompts of up to "
                f"{max(allowed, 1)} tokens"
            )
        return encode_prompts(records, self.processing_class, allowed)[0]

    def _check_budget(self) -> None:
        longest = max(len(p.input_ids) for p in self._prompts)
        needed = longest + self.args.max_completion_length
        budget = self.args.max_tokens_per_pass
        if budget is not None and budget < needed:
            raise ValueError(
                f"max_tokens_per_pass: expected at least {needed}, the longest prompt ({longest}) "
                f"and max_completion_length ({self.args.max_completion_length}); found {budget}"
            )

    def _logp(self, model: Transformer, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        hidden = model.hidden(batch.input_ids, batch.layout, batch.rows)
        return ops.linear_logprob(
            batch.of_targets(hidden),
            model.lm_head.weight,
            batch.targets,
            temperature=self.args.temperature or 1.0,
            entropy=True,
        )  # type: ignore[return-value]

    def _credited(
        self, model: Transformer, batch: TokenBatch, credit: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """A scalar whose gradient by the log-probabilities of completion b is -credit[b], the
        log-probabilities and the entropies, without gradient."""
        hidden = model.hidden(batch.input_ids, batch.layout, batch.rows)
        return ops.linear_cross_entropy(
            batch.of_targets(hidden),
            model.lm_head.weight,
            batch.targets,
            credit[batch.sequence],
            temperature=self.args.temperature or 1.0,
            # The log-probabilities are compared with the sampler's.
            logits_dtype=torch.float32,
        )

    @torch.no_grad()
    def _policy_logp(self, batch: TokenBatch) -> Tensor:
        return self._logp(self.model, batch)[0]

    @torch.no_grad()
    def _reference_logp(self, batch: TokenBatch) -> Tensor | None:
        """Log-probabilities under the reference: with LoRA, the adapter switched off."""
        if self.args.beta == 0:
            return None
        if self._reference is not None:
            return self._logp(self._reference, batch)[0]
        with disable_lora(self.model):
            return self._logp(self.model, batch)[0]

    def _reference_model(self) -> Transformer | None:
        if self.args.beta == 0 or hasattr(self.model, "lora_config"):
            return None
        return frozen_copy(self.model)  # type: ignore[return-value]

    def _memory_beside(self) -> dict[str, Any]:
        models = [] if self._reference is None else [self._reference]
        return {"others": [*models, *self.rewards.modules], "cache": self._cache_bytes()}

    def _cache_bytes(self) -> int:
        """Keys and values of the completions that are sampled at a time, at their full length."""
        args, config = self.args, self.model.config
        limits = args.generation_kwargs or {}
        count = args.per_device_train_batch_size * args.passes_per_rollout
        count = min(count, limits.get("max_batch_size") or count)
        longest = max(len(p.input_ids) for p in self._prompts)
        prompts = -(-count // args.num_generations)
        tokens = count * (args.max_completion_length + BLOCK) + prompts * (longest + BLOCK)
        of_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        return min(tokens * of_token * self.dtype.itemsize, limits.get("cache_bytes") or 1 << 62)

    def _reward_metric_names(self) -> list[str]:
        return [f"rewards/{name}/mean" for name in self.rewards.names]

    def _context(self) -> dict[str, Any]:
        """What TRL passes to every reward function beside the data."""
        return {
            "trainer_state": self.state,
            "log_extra": self._log.extra,
            "log_metric": self._log.metric,
        }

    def _write_completions(self, groups: Sequence[Group]) -> None:
        step = self.state.global_step
        due = step % self.args.logging_steps == 0
        if not (self.args.log_completions and due and distributed.is_main()):
            return
        path = Path(self.args.output_dir) / "completions.jsonl"
        write_completions(path, step, groups, self.processing_class)

    # -- one order of summation -----------------------------------------------------------------

    def _one_order(self) -> AbstractContextManager[Any]:
        return ops.same_order() if self.args.deterministic else nullcontext()

    def _check_deterministic(self) -> None:
        """Refuse now what sampler and trainer do not sum alike."""
        if not self.args.deterministic:
            return
        config = self.model.config
        found = {
            "adapters (LoRA)": hasattr(self.model, "lora_config"),
            "sliding windows": any(map(config.window, range(config.num_hidden_layers))),
        }
        for name, present in found.items():
            if present:
                raise ValueError(f"deterministic: expected a model without {name}, found one")
        if self.dtype is not torch.float32 or self.device.type != "cpu":
            raise ValueError(
                f"deterministic: expected fp32 on the CPU, found {self.dtype} on {self.device}"
            )
        with self._one_order():  # it says by itself what it cannot honour
            pass


def _listed(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]

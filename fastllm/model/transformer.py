"""A Llama-type transformer on packed rows; parameter names are Hugging Face's."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .. import ops
from ..layout import PackedLayout
from . import fused, weights
from .config import LANGUAGE_MODEL, ModelConfig
from .layers import Linear, RMSNorm
from .rotary import RotaryTable


class Attend(Protocol):
    """How the tokens of one pass see each other: packed training, prefill, or decoding."""

    @property
    def positions(self) -> Tensor:
        """Sequence position of each token [T], int32."""

    @property
    def max_position(self) -> int:
        """Largest position plus one."""

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None, window: int | None
    ) -> Tensor:
        """Attention output [N, H, D] of q [N, H, D] over k, v [T, K, D] and any cache."""


class PackedAttend:
    """Training and scoring: every segment sees its prefix and itself, nothing is kept."""

    def __init__(self, layout: PackedLayout, rows: Tensor | None = None) -> None:
        self.layout = layout
        self.selected = layout if rows is None else layout.select(rows)
        self.positions, self.max_position = layout.positions, layout.max_position

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None, window: int | None
    ) -> Tensor:
        return ops.attention(q, k, v, self.layout if rows is None else self.selected, window=window)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.window = layer, config.window(layer)
        self.head_dim = config.head_dim
        self.heads = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, queries, bias=config.qkv_bias)
        self.k_proj = Linear(config.hidden_size, keys, bias=config.qkv_bias)
        self.v_proj = Linear(config.hidden_size, keys, bias=config.qkv_bias)
        self.o_proj = Linear(queries, config.hidden_size, bias=config.output_bias)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], attend: Attend, rows: Tensor | None
    ) -> Tensor:
        """x [T, C] -> [N, C]; with `rows`, queries are computed for those rows only."""
        asking = x if rows is None else x[rows]
        q = self.q_proj(asking).view(-1, self.q_proj.out_features // self.head_dim, self.head_dim)
        k = self.k_proj(x).view(-1, self.k_proj.out_features // self.head_dim, self.head_dim)
        v = self.v_proj(x).view(k.shape)
        if rows is None:
            q, k = ops.rope(q, k, *rotary, attend.positions, **self.norms())
        else:
            of_keys = attend.positions
            q, k = ops.rope(q, k, *rotary, of_keys[rows], k_positions=of_keys, **self.norms())
        out = attend(self.layer, q, k, v, rows, self.window)
        return self.o_proj(out.flatten(1))

    def projections(self) -> tuple[Linear, ...]:
        """Query, key, value, output."""
        return self.q_proj, self.k_proj, self.v_proj, self.o_proj

    def norms(self) -> dict[str, Any]:
        """What `ops.rope` is told of the norms of queries and keys; nothing without them."""
        if not hasattr(self, "q_norm"):
            return {}
        weights = {"q_norm": self.q_norm.weight, "k_norm": self.k_norm.weight}
        return {**weights, "eps": self.q_norm.eps}


class MLP(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = Linear(width, inner, bias=bias)
        self.up_proj = Linear(width, inner, bias=bias)
        self.down_proj = Linear(inner, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(ops.swiglu(self.gate_proj(x), self.up_proj(x)))

    def projections(self) -> tuple[Linear, ...]:
        """Gate, up, down."""
        return self.gate_proj, self.up_proj, self.down_proj


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        update: Tensor | None,
        residual: Tensor,
        rotary: tuple[Tensor, Tensor],
        attend: Attend,
        rows: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(update, residual) -> (update, residual): the sum is the residual stream.

        The add is left to the next norm, which does both in one pass over memory.
        """
        if isinstance(attend, PackedAttend) and self._is_plain():
            raw = fused.raw_kernels(residual)
            if raw is not None:
                return self._fused(raw, update, residual, rotary, attend, rows)
        if update is None:
            x = self.input_layernorm(residual)
        else:
            x, residual = self.input_layernorm.add(update, residual)
        attended = self.self_attn(x, rotary, attend, rows)
        residual = residual if rows is None else residual[rows]
        x, residual = self.post_attention_layernorm.add(attended, residual)
        return self.mlp(x), residual

    def _fused(
        self,
        raw: SimpleNamespace,
        update: Tensor | None,
        residual: Tensor,
        rotary: tuple[Tensor, Tensor],
        attend: PackedAttend,
        rows: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        update, residual = fused.attention_half(
            raw,
            update,
            residual,
            self.input_layernorm,
            self.self_attn,
            rotary,
            attend.layout,
            attend.layout if rows is None else attend.selected,
            rows,
        )
        return fused.mlp_half(raw, update, residual, self.post_attention_layernorm, self.mlp)

    def _is_plain(self) -> bool:
        """Whether the projections are matrices, with biases for queries, keys and values at most.

        No adapters, that is, and no other biases.
        """
        *inward, output = self.self_attn.projections()
        others = output, *self.mlp.projections()
        plain = all(type(p) is Linear for p in (*inward, *others))
        return plain and all(p.bias is None for p in others)


class Trunk(nn.Module):
    """Embedding, blocks and the final norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary = RotaryTable(config)
        self.compute_dtype: torch.dtype | None = None
        self.gradient_checkpointing = False
        self.recomputed_layers: int | None = None  # how many, the first ones; None for all

    def forward(self, input_ids: Tensor, attend: Attend, rows: Tensor | None = None) -> Tensor:
        """Hidden states after the final norm.

        Args:
            input_ids: packed tokens [T].
            attend: how they see each other.
            rows: packed rows whose hidden state is wanted [N], ascending and unique, int64; the
                last layer computes no others. None for all.

        Returns:
            [N, C] in the compute dtype.
        """
        residual = self.embed_tokens(input_ids)
        residual = residual.to(self.compute_dtype or residual.dtype)
        rotary = self.rotary(attend.max_position, residual.device)
        update = None
        for layer in self.layers[:-1]:
            update, residual = self._run(layer, update, residual, rotary, attend, None)
        update, residual = self._run(self.layers[-1], update, residual, rotary, attend, rows)
        return self.norm.add(update, residual)[0]

    def recomputes(self, layer: int) -> bool:
        """Whether the backward pass computes a layer again instead of keeping what it made.

        The first layers come last in the backward pass, when the others' memory is free again.
        """
        limit = self.recomputed_layers
        return self.gradient_checkpointing and (limit is None or layer < limit)

    def _run(self, layer: Any, *inputs: object) -> tuple[Tensor, Tensor]:
        if not (torch.is_grad_enabled() and self.recomputes(layer.self_attn.layer)):
            return layer(*inputs)
        draws = any(isinstance(m, nn.Dropout) and m.p > 0 for m in layer.modules())
        return checkpoint(layer, *inputs, use_reentrant=False, preserve_rng_state=draws)


class Transformer(nn.Module):
    """A causal language model: trunk and vocabulary head."""

    head_name = LANGUAGE_MODEL

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Trunk(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        initialise(self, config)
        self.tie_weights()

    def tie_weights(self) -> None:
        """Share the embedding table with the head where the config says so."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def hidden(self, input_ids: Tensor, layout: PackedLayout, rows: Tensor | None = None) -> Tensor:
        """Hidden states of packed tokens [T] at `rows` (all when None): [N, C]."""
        return self.model(input_ids, PackedAttend(layout, rows), rows)

    def forward(self, input_ids: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Logits of a padded batch.

        Args:
            input_ids: [B, T], padded on the right.
            lengths: real tokens of each row [B]; T for all when None.

        Returns:
            [B, T, V] in the compute dtype; 0 at padding.
        """
        packed, layout, real = unpad(input_ids, lengths)
        logits = self.lm_head(self.hidden(packed, layout))
        padded = logits.new_zeros(*input_ids.shape, logits.shape[-1])
        padded[real] = logits
        return padded

    @classmethod
    def from_pretrained(cls, folder: str | Path, **options: Any) -> Transformer:
        """Load a Hugging Face folder, a run or checkpoint folder, or a `.pt` file."""
        return weights.load_model(folder, cls, **options)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` and `model.safetensors` as Hugging Face does."""
        weights.save_model(self, folder)


def unpad(input_ids: Tensor, lengths: Tensor | None) -> tuple[Tensor, PackedLayout, Tensor]:
    """A right-padded batch [B, T] as packed tokens, their layout and the mask of real tokens."""
    batch, width = input_ids.shape
    if lengths is None:
        lengths = torch.full((batch,), width, device=input_ids.device)
    if lengths.shape != (batch,) or any(not 0 <= n <= width for n in lengths.tolist()):
        raise ValueError(f"lengths must be [{batch}] with values in 0..{width}, found {lengths}")
    real = torch.arange(width, device=input_ids.device) < lengths.to(input_ids.device)[:, None]
    return input_ids[real], PackedLayout(lengths, device=input_ids.device), real


def initialise(model: nn.Module, config: ModelConfig) -> None:
    """Normal weights and zero biases; projections into the residual stream are scaled down
    with the depth (Radford et al., 2019)."""
    depth_scale = (2 * config.num_hidden_layers) ** -0.5
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            continue
        into_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
        std = config.initializer_range * (depth_scale if into_residual else 1.0)
        nn.init.normal_(parameter, std=std)

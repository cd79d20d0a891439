"""The layers of a model for one new token per sequence.

Matrices that read the same rows are one matrix here, copied once in the dtype of the computation:
query, key and value, and gate and up. Adapters are merged into the copies.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..model import Transformer
from ..model.layers import Linear
from ..model.transformer import Block
from ..ops.linear_logprob import wide_matmul
from .cache import BlockCache
from .native_step import compute_dtype, merged_weight
from .token_step import StepRows


class Decoder:
    """Tokens to logits, over the cache.

    Args:
        model: its norms and embedding are read where they are, its matrices copied where they are
            joined, merged or wider than the computation.
    """

    def __init__(self, model: Transformer) -> None:
        self._dtype = compute_dtype(model)
        self._trunk, self._config = model.model, model.config
        self._layers = [
            _Layer(block, self._dtype) for block in model.model.layers if isinstance(block, Block)
        ]
        self._head = _Matrix([model.lm_head], self._dtype)
        self._addresses = self._find()

    def refresh(self) -> bool:
        """Read the model's weights again; whether all of them are where they were."""
        for matrix in self._matrices():
            matrix.refresh()
        before, self._addresses = self._addresses, self._find()
        return before == self._addresses

    def __call__(self, rows: StepRows[Tensor], cache: BlockCache, max_position: int) -> Tensor:
        """Logits after the newest tokens [B, V], fp32.

        Args:
            rows: the tokens, and where each goes and looks.
            cache: gets their keys and values.
            max_position: a bound on their positions, plus one.
        """
        residual = self._trunk.embed_tokens.weight[rows.token].to(self._dtype)
        rotary = self._trunk.rotary(max_position, residual.device)
        update: Tensor | None = None
        for number, layer in enumerate(self._layers):
            update, residual = layer(number, update, residual, rotary, rows, cache)
        assert update is not None
        return self.logits(self._trunk.norm.add(update, residual)[0])

    def logits(self, hidden: Tensor) -> Tensor:
        """[N, C] -> [N, V], fp32."""
        return wide_matmul(hidden, self._head.weight.t())

    def _matrices(self) -> list[_Matrix]:
        layers = [matrix for layer in self._layers for matrix in layer.matrices]
        return [*layers, self._head]

    def _find(self) -> list[int]:
        parameters = self._trunk.named_parameters()
        norms = [p.data_ptr() for name, p in parameters if p.dim() == 1 or "embed" in name]
        return norms + [matrix.weight.data_ptr() for matrix in self._matrices()]


class _Layer:
    """One block of the model."""

    def __init__(self, block: Block, dtype: torch.dtype) -> None:
        attention, mlp = block.self_attn, block.mlp
        self._first_norm, self._second_norm = block.input_layernorm, block.post_attention_layernorm
        self._norms: dict[str, Any] = {}
        if hasattr(attention, "q_norm"):
            q_norm, k_norm = attention.q_norm, attention.k_norm
            self._norms = {"q_norm": q_norm.weight, "k_norm": k_norm.weight, "eps": q_norm.eps}
        self._window, (heads, key_heads, self._head_dim) = attention.window, attention.heads
        self._widths = [n * self._head_dim for n in (heads, key_heads, key_heads)]
        query, key, value, out = attention.projections()
        gate, up, down = mlp.projections()
        self._qkv, self._out = _Matrix([query, key, value], dtype), _Matrix([out], dtype)
        self._gate_up, self._down = _Matrix([gate, up], dtype), _Matrix([down], dtype)
        self.matrices = self._qkv, self._out, self._gate_up, self._down

    def __call__(
        self,
        number: int,
        update: Tensor | None,
        residual: Tensor,
        rotary: tuple[Tensor, Tensor],
        rows: StepRows[Tensor],
        cache: BlockCache,
    ) -> tuple[Tensor, Tensor]:
        """(update, residual) -> (update, residual), as `model.transformer.Block`."""
        if update is None:
            x = self._first_norm(residual)
        else:
            x, residual = self._first_norm.add(update, residual)
        attended = self._out(self._attend(number, x, rotary, rows, cache))
        x, residual = self._second_norm.add(attended, residual)
        return self._down(ops.swiglu(self._gate_up(x))), residual

    def _attend(
        self,
        number: int,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        rows: StepRows[Tensor],
        cache: BlockCache,
    ) -> Tensor:
        parts = self._qkv(x).split(self._widths, dim=1)
        q, k, v = (part.unflatten(1, (-1, self._head_dim)) for part in parts)
        keys, values = cache.keys[number], cache.values[number]
        where = rows.position, keys, values, rows.block, rows.place
        q = ops.rope_into_cache(q, k, v, *rotary, *where, **self._norms)
        out = ops.decode_attention(
            q,
            keys,
            values,
            rows.prefix_blocks,
            rows.prefix_length,
            rows.group,
            rows.tail_blocks,
            rows.tail_length,
            window=self._window,
        )
        return out.flatten(1)


class _Matrix:
    """Projections of the same rows as one.

    Args:
        linears: one after another in the result. A plain one that has the dtype already is used
            where it is.
    """

    def __init__(self, linears: Sequence[Linear], dtype: torch.dtype) -> None:
        self._linears, self._dtype = list(linears), dtype
        (first, *others) = self._linears
        self._own = bool(others) or type(first) is not Linear or first.weight.dtype != dtype
        rows = [linear.weight.shape[0] for linear in self._linears]
        self.weight = first.weight.new_empty(
            sum(rows) if self._own else 0, first.weight.shape[1], dtype=dtype
        )
        biased = any(linear.bias is not None for linear in self._linears)
        self._bias = self.weight.new_zeros(sum(rows)) if biased else None
        self._slices = [slice(sum(rows[:i]), sum(rows[: i + 1])) for i in range(len(rows))]
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the weights again."""
        if not self._own:
            self.weight = self._linears[0].weight.detach()
        for linear, rows in zip(self._linears, self._slices, strict=True):
            if self._own:
                self.weight[rows] = merged_weight(linear)
            if self._bias is not None and linear.bias is not None:
                self._bias[rows] = linear.bias

    def __call__(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.weight, self._bias)

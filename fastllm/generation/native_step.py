"""The token step in C++: all layers and the draw in one call, for several tokens."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..model.layers import Linear
from ..model.lora import LoRALinear
from ..model.transformer import Block
from ..ops import backend, cpp
from ..ops.linear_logprob import wide_matmul
from .batch import Drawn, RunningBatch
from .cache import BlockCache

if TYPE_CHECKING:
    from ..model import Transformer

Weights = Literal["auto", "int8"]

# As csrc/kernels.h numbers them.
_FORMATS = {torch.float32: 0, torch.bfloat16: 1}
_PACKED = cpp.packed_matmul
_PACKINGS = {
    torch.float32: _PACKED.FLOAT32,
    torch.bfloat16: _PACKED.BFLOAT16,
    torch.int8: _PACKED.INT8,
}
_MOST_HEADS_OF_KEY = 256
_BATCH_ARRAYS = (
    "token", "position", "tail_length", "count", "group", "tail_blocks", "prefix_blocks",
    "prefix_length", "max_count", "temperature", "top_p", "min_p", "repetition_penalty", "top_k",
    "key", "min_count", "stop_tokens", "seen",
)  # fmt: skip


def status() -> str:
    """Which token step serves models on the CPU, and why, in one line."""
    reason = _why_not_here()
    if reason is not None:
        return f"op by op: {reason}"
    return f"C++ ({cpp.isa()}): all layers and the draw in one call, in float32 and bfloat16"


def why_not(model: Transformer) -> str | None:
    """Why the C++ step cannot serve a model; None when it can."""
    config = model.config
    device, dtype = model.lm_head.weight.device, compute_dtype(model)
    if device.type != "cpu":
        return f"the model is on {device.type}"
    if (reason := _why_not_here()) is not None:
        return reason
    if dtype not in _FORMATS:
        return f"it computes in float32 and bfloat16, and the model in {dtype}"
    if config.num_attention_heads // config.num_key_value_heads > _MOST_HEADS_OF_KEY:
        return f"more than {_MOST_HEADS_OF_KEY} query heads share a key head"
    if config.head_dim % 2 or config.hidden_size % 2 or config.intermediate_size % 2:
        return "a size of the model is odd"
    return None


def _why_not_here() -> str | None:
    if not cpp.available():
        return cpp.reason()
    if backend.requested() not in ("auto", "cpp"):
        return f"the {backend.requested()} backend was requested"
    return None


def compute_dtype(model: Transformer) -> torch.dtype:
    """The dtype of a model's hidden states."""
    return model.model.compute_dtype or model.lm_head.weight.dtype


class NativeStep:
    """Draws tokens for the running batch in C++.

    The weights are copied once into the order in which they are read; `Engine.update_weights`
    makes a new step. Adapters are merged into the copy.

    Args:
        model: as `why_not` allows.
        cache: where keys and values are.
        weights: "auto" stores the matrices in the compute dtype; "int8" in 8 bits, with a scale for
            each column and 128 numbers, and computes as before.
    """

    goes_on = False

    def __init__(self, model: Transformer, cache: BlockCache, weights: Weights = "auto") -> None:
        self._cache, self._rotary = cache, model.model.rotary
        self._dtype = compute_dtype(model)
        self._packing = torch.int8 if weights == "int8" else self._dtype
        self._kept: list[Tensor] = []
        self._products: list[tuple[Linear, functools.partial[Tensor]]] = []
        self._squares = np.zeros(2)
        self._decoder = self._make(model)
        self._bound: tuple[Any, ...] = ()
        self._threads = _threads()
        self._drawn = _drawn(0, 0)

    @property
    def description(self) -> str:
        """Which step serves, for the log."""
        text = f"C++ ({cpp.isa()}), {_name(self._packing)} weights, {_name(self._dtype)} arithmetic"
        if self._packing == torch.int8:
            text += f", weights off by {self.weight_error:.2%} (relative root mean square)"
        return text

    @property
    def weight_error(self) -> float:
        """What 8 bits changed: the norm of the difference over the norm of the matrices, both over
        the first 64 inputs of each."""
        difference, whole = self._squares
        return float((difference / whole) ** 0.5) if whole else 0.0

    def __call__(self, batch: RunningBatch, steps: int) -> Drawn:
        """See `TokenStep`."""
        self._bind(batch)
        rows = batch.size
        if self._drawn[0].size < steps * rows:
            self._drawn = _drawn(steps, rows)
        furthest = int(batch.position[:rows].max()) + steps
        cos, sin = self._rotary(furthest, torch.device("cpu"))
        done = self._decoder.run(
            rows, steps, self._threads, cos.data_ptr(), sin.data_ptr(), *map(_at, self._drawn)
        )
        drawn = Drawn(*(a[: done * rows].reshape(done, rows).copy() for a in self._drawn))
        if not np.isfinite(drawn.logprobs).all():
            bad = int(np.argwhere(~np.isfinite(drawn.logprobs))[0][1])
            raise RuntimeError(f"the model's logits are not finite (row {bad} of {rows})")
        return drawn

    @contextlib.contextmanager
    def prefilling(self) -> Iterator[None]:
        """The packed weights serve short prompts too: nothing is copied or cast for each of them.

        Weights in 8 bits do not: prompts are read with the weights as they are.
        """
        for linear, product in self._products:
            linear.packed = product
        try:
            yield
        finally:
            for linear, _ in self._products:
                linear.packed = None

    def logits(self, hidden: Tensor) -> Tensor:
        """See `TokenStep`."""
        return self._head(hidden)

    # -- addresses -----------------------------------------------------------------------------

    def _bind(self, batch: RunningBatch) -> None:
        """Tell C++ where the batch and the cache are, if they have moved."""
        bound = (id(batch), batch.version, self._cache.version)
        if bound == self._bound:
            return
        arrays: dict[str, int] = {}
        for name in _BATCH_ARRAYS:
            arrays[name] = _at(getattr(batch, name))
        arrays["tail_stride"] = batch.tail_blocks.shape[1]
        arrays["prefix_stride"] = batch.prefix_blocks.shape[1]
        arrays["stop_stride"] = batch.stop_tokens.shape[1]
        arrays["seen_stride"] = batch.seen.shape[1]
        self._decoder.bind(arrays)
        self._decoder.bind_cache(
            [keys.data_ptr() for keys in self._cache.keys],
            [values.data_ptr() for values in self._cache.values],
        )
        self._bound = bound

    def _make(self, model: Transformer) -> Any:
        config, trunk = model.config, model.model
        shape = {
            "hidden": config.hidden_size,
            "heads": config.num_attention_heads,
            "key_heads": config.num_key_value_heads,
            "head_size": config.head_dim,
            "inner": config.intermediate_size,
            "vocabulary": config.vocab_size,
            "eps": config.rms_norm_eps,
            "scale": config.head_dim**-0.5,
            "format": _FORMATS[self._dtype],
            **self._embedding(trunk.embed_tokens.weight),
            "norm": self._norm(trunk.norm),
        }
        projections, norms, windows = [], [], []
        for block in trunk.layers:
            assert isinstance(block, Block)
            attention = block.self_attn
            linears = (*attention.projections(), *block.mlp.projections())
            projections.append([self._projection(linear) for linear in linears])
            norms.append(
                [
                    self._norm(block.input_layernorm),
                    self._norm(block.post_attention_layernorm),
                    self._norm(getattr(attention, "q_norm", None)),
                    self._norm(getattr(attention, "k_norm", None)),
                ]
            )
            windows.append(attention.window or 0)
        head = self._projection(model.lm_head)
        self._head = self._head_product(model.lm_head)
        return cpp.decoder_class()(
            shape,
            _PACKINGS[self._packing],
            head,
            projections,
            norms,
            windows,
        )

    def _embedding(self, weight: Tensor) -> dict[str, int]:
        if weight.dtype not in _FORMATS:
            weight = weight.to(self._dtype)
        return {"embedding": self._keep(weight), "embedding_format": _FORMATS[weight.dtype]}

    def _norm(self, norm: Any) -> int:
        return 0 if norm is None else self._keep(norm.weight.to(self._dtype))

    def _projection(self, linear: Linear) -> list[int]:
        weight = merged_weight(linear)
        panels, scales = _PACKED.pack(weight, _PACKINGS[self._packing])
        if self._packing == torch.int8:
            self._measure(weight, panels, scales)
        bias = None if linear.bias is None else linear.bias.detach().float()
        if type(linear) is Linear and self._packing != torch.int8:
            product = functools.partial(
                _PACKED.product,
                panels=panels,
                scales=scales,
                packing=_PACKINGS[self._packing],
                columns=weight.shape[0],
                bias=bias,
            )
            self._products.append((linear, product))
        address = 0 if bias is None else self._keep(bias)
        return [*weight.shape, self._keep(panels), self._keep(scales), address]

    def _head_product(self, head: Linear) -> Callable[[Tensor], Tensor]:
        """Hidden states to logits in fp32."""
        if self._products and self._products[-1][0] is head:
            _, product = self._products.pop()
            return functools.partial(product, wide=True)
        weight = head.weight.detach().to(self._dtype)
        return lambda hidden: wide_matmul(hidden, weight.t())

    def _measure(self, weight: Tensor, panels: Tensor, scales: Tensor) -> None:
        """Add up what packing a matrix changed, over its first inputs: all would cost seconds."""
        some = torch.eye(min(64, weight.shape[1]), weight.shape[1])
        packed = _PACKED.product(some, panels, scales, _PACKED.INT8, weight.shape[0])
        exact = weight[:, : some.shape[0]].t().float()
        self._squares += [float((packed - exact).square().sum()), float(exact.square().sum())]

    def _keep(self, tensor: Tensor) -> int:
        """The address of a tensor that lives as long as the step."""
        tensor = tensor.detach().contiguous()
        self._kept.append(tensor)
        return tensor.data_ptr()


def merged_weight(linear: Linear) -> Tensor:
    """A projection's weight, with its adapter where it has one."""
    weight = linear.weight.detach()
    if not isinstance(linear, LoRALinear) or not linear.enabled:
        return weight
    update = linear.lora_B.weight.detach().double() @ linear.lora_A.weight.detach().double()
    return (weight.double() + linear.scaling * update).to(weight.dtype)


def _threads() -> int:
    """A team meets at barriers, so its threads must run at the same time: OpenMP promises that."""
    together = "OpenMP" in torch.__config__.parallel_info()
    return torch.get_num_threads() if together else 1


def _drawn(steps: int, rows: int) -> tuple[np.ndarray, ...]:
    size = steps * rows
    return np.empty(size, np.int64), np.empty(size, np.float32), np.empty(size, np.float32)


def _at(array: np.ndarray) -> int:
    return array.ctypes.data


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

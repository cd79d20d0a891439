"""What is tuned: calls of raw kernels at the sizes of models, on any device ("meta" compiles only).

A problem's `make(device)` draws inputs and returns a call; the call returns tensors that do not
depend on the constants but for rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastllm.layout import PackedLayout

Call = Callable[[], Sequence[Tensor]]

B16, F32 = torch.bfloat16, torch.float32
BLOCK = 64


@dataclass(frozen=True)
class Problem:
    """A call that launches kernels, some of which are to be tuned."""

    op: str
    """The file `kernels/<op>.py`, and its table."""
    label: str
    dtype: torch.dtype
    build: Callable[[Any, Callable[..., Tensor], torch.device], Call]

    def make(self, device: str | torch.device) -> Call:
        """Inputs, and the call."""
        import importlib

        raw = importlib.import_module(f"fastllm.kernels.{self.op}")
        place = torch.device(device)

        def normal(*shape: int, dtype: torch.dtype = self.dtype) -> Tensor:
            return torch.randn(shape, device=place).to(dtype)

        return self.build(raw, normal, place)

    def __str__(self) -> str:
        return f"{self.op} {self.label} {str(self.dtype).removeprefix('torch.')}"


def _integers(values: Any, place: torch.device) -> Tensor:
    return torch.as_tensor(values, dtype=torch.int32).to(place)


def _rms_norm(rows: int, columns: int) -> Callable[..., Call]:
    def build(raw: Any, normal: Callable[..., Tensor], place: torch.device) -> Call:
        x, residual, dy, dh = (normal(rows, columns) for _ in range(4))
        weight = normal(columns)

        def call() -> Sequence[Tensor]:
            y, h, rstd = raw.forward(x, weight, 1e-6, residual)
            dx, dweight = raw.backward(dy, dh, h, weight, rstd, True)
            return y, h, dx, dweight

        return call

    return build


def _swiglu(rows: int, width: int) -> Callable[..., Call]:
    def build(raw: Any, normal: Callable[..., Tensor], place: torch.device) -> Call:
        both, dout = normal(rows, 2 * width), normal(rows, width)
        return lambda: (raw.forward_fused(both), raw.backward_fused(dout, both))

    return build


def _rope(tokens: int, heads: int, key_heads: int, head_dim: int) -> Callable[..., Call]:
    def build(raw: Any, normal: Callable[..., Tensor], place: torch.device) -> Call:
        q, k = normal(tokens, heads, head_dim), normal(tokens, key_heads, head_dim)
        cos, sin = (normal(tokens, head_dim // 2, dtype=F32) for _ in range(2))
        positions = _integers(range(tokens), place)
        norms = normal(head_dim), normal(head_dim)

        def call() -> Sequence[Tensor]:
            given = q, k, cos, sin, positions
            out = raw.forward(*given, False, positions, *norms, 1e-6)
            back = raw.backward(q, k, *given, positions, *norms, 1e-6, True)
            return [t for t in (*out, *back) if isinstance(t, Tensor)]

        return call

    return build


def _attention(
    lengths: Sequence[int], prefix: Sequence[int] | None, heads: int, key_heads: int, head_dim: int
) -> Callable[..., Call]:
    def build(raw: Any, normal: Callable[..., Tensor], place: torch.device) -> Call:
        # Its tables depend on the constants: a layout of its own for each call that is made.
        layout = PackedLayout(lengths, prefix, place)
        q, dout = (normal(sum(lengths), heads, head_dim) for _ in range(2))
        k, v = (normal(sum(lengths), key_heads, head_dim) for _ in range(2))

        def call() -> Sequence[Tensor]:
            out, lse = raw.forward(q, k, v, layout, head_dim**-0.5, 0)
            return out, *raw.backward(dout, q, k, v, out, lse, layout, head_dim**-0.5, 0)

        return call

    return build


def _decode(
    prompts: int, group: int, prompt: int, tail: int, heads: int, key_heads: int, head_dim: int
) -> Callable[..., Call]:
    def build(raw: Any, normal: Callable[..., Tensor], place: torch.device) -> Call:
        size = prompts * group
        first, own = prompts * (prompt // BLOCK), size * (tail // BLOCK)
        blocks = torch.randperm(first + own)
        tables = (
            _integers(blocks[:first].view(prompts, -1), place),
            _integers([prompt] * prompts, place),
            _integers([row // group for row in range(size)], place),
            _integers(blocks[first:].view(size, -1), place),
            _integers([tail] * size, place),
        )
        q = normal(size, heads, head_dim)
        keys = normal(first + own, key_heads, head_dim, BLOCK)
        values = normal(first + own, key_heads, BLOCK, head_dim)
        return lambda: (raw.forward(q, keys, values, *tables, head_dim**-0.5, 0),)

    return build


def _logprob(rows: int, vocabulary: int) -> Callable[..., Call]:
    def build(raw: Any, normal: Callable[..., Tensor], place: torch.device) -> Call:
        logits = normal(rows, vocabulary)
        targets = torch.zeros(rows, dtype=torch.int64).to(place)
        upstream = normal(rows, dtype=F32)

        def call() -> Sequence[Tensor]:
            logp, entropy, lse = raw.forward(logits, targets, 1.0, 0.0)
            gradient = logits.clone()
            raw.backward_(gradient, targets, lse, entropy, upstream, upstream, 1.0, 0.0)
            return logp, entropy, gradient

        return call

    return build


def _cross_entropy(rows: int, vocabulary: int) -> Callable[..., Call]:
    def build(raw: Any, normal: Callable[..., Tensor], place: torch.device) -> Call:
        logits, weights = normal(rows, vocabulary), normal(rows, dtype=F32)
        targets = torch.zeros(rows, dtype=torch.int64).to(place)

        def call() -> Sequence[Tensor]:
            gradient = logits.clone()
            return *raw.forward_backward_(gradient, targets, weights, 1.0, 0.0), gradient

        return call

    return build


def _reward_loss(pairs: int, channels: int) -> Callable[..., Call]:
    def build(raw: Any, normal: Callable[..., Tensor], place: torch.device) -> Call:
        hidden, weight = normal(2 * pairs, channels), normal(channels)
        rows = torch.arange(2 * pairs).to(place)
        loss = normal(dtype=F32)

        def call() -> Sequence[Tensor]:
            found = raw.forward(hidden, weight, rows[:pairs], rows[pairs:], None, 0.0)
            return *found, *raw.backward(loss, found[-1], hidden, weight, True)

        return call

    return build


def _optimizer(narrow: bool) -> Callable[..., Call]:
    """Matrices of 2,048: weights, gradients and moments in bf16, or fp32 with a bf16 copy."""
    weight, copy = (B16, None) if narrow else (F32, B16)
    moment, rows = weight, 1 << 15

    def compiling(raw: Any) -> Call:
        def meta(*shape: int, dtype: torch.dtype = F32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        slots = [meta(rows, 2048, dtype=weight)] * 2
        table, owners = (t.to("meta") for t in raw.tabulate(slots, slots, slots, [None] * 2))
        places, numbers = meta(2, dtype=torch.int64), meta(3)
        counts, streams = (meta(n, dtype=torch.int32) for n in (4, 2))
        sums, steps, scales = meta(owners.numel()), meta(2), meta(2, 2)

        def call() -> Sequence[Tensor]:
            raw.square_sums_(table, owners, places, numbers, sums, B16, False)
            state = steps, scales, numbers, counts
            raw.finish_(sums, places, *state, meta(), meta(), 1.0, -0.1, -0.001, 2000, False)
            dtypes = weight, B16, moment, copy
            settings = 0.9, 0.999, 1e-8, 7, dtypes, False
            raw.adamw_(table, owners, places, meta(2), streams, *state, *settings)
            return ()

        return call

    def build(raw: Any, normal: Callable[..., Tensor], place: torch.device) -> Call:
        if place.type == "meta":
            return compiling(raw)
        from fastllm.ops import use_backend
        from fastllm.ops.optimizer import AdamW, Settings, Slot
        from fastllm.ops.working import keep_copies

        weights = [normal(rows, 2048, dtype=weight) for _ in range(2)]
        gradients = [normal(rows, 2048, dtype=B16) for _ in range(2)]
        if copy is not None:
            keep_copies(weights, copy)
        moments = [[torch.zeros_like(w, dtype=moment) for w in weights] for _ in range(2)]
        slots = [Slot(*tensors, 0.1) for tensors in zip(weights, *moments, strict=True)]
        with use_backend("triton"):
            adamw = AdamW(slots, Settings(max_norm=1.0))
        loss = torch.zeros((), device=place)

        def call() -> Sequence[Tensor]:
            adamw.step_(gradients, loss, 1e-3)
            return weights

        return call

    return build


def _all() -> Iterator[Problem]:
    for dtype in (B16, F32):
        for columns in (896, 2048, 4096, 8192):
            label = f"8192x{columns}"
            yield Problem("rms_norm", label, dtype, _rms_norm(8192, columns))
        for width in (4864, 14336):
            yield Problem("swiglu", f"8192x{width}", dtype, _swiglu(8192, width))
    for heads, key_heads, head_dim in ((14, 2, 64), (32, 8, 128), (16, 4, 256)):
        label = f"8192x{heads}/{key_heads}x{head_dim}"
        yield Problem("rope", label, B16, _rope(8192, heads, key_heads, head_dim))
    for dtype, heads, key_heads, head_dim in (
        (B16, 32, 8, 64),
        (B16, 32, 8, 128),
        (B16, 16, 4, 80),
        (B16, 16, 4, 96),
        (B16, 16, 4, 256),
        (F32, 16, 4, 64),
    ):
        label = f"2x8192 {heads}/{key_heads}x{head_dim}"
        build = _attention([8192] * 2, None, heads, key_heads, head_dim)
        yield Problem("attention", label, dtype, build)
    for size in ((64, 1, 3968, 128, 32, 8, 128), (32, 8, 512, 256, 14, 2, 64)):
        prompts, group, prompt, tail, heads, key_heads, head_dim = size
        label = f"{prompts}x{group} {prompt}+{tail} {heads}/{key_heads}x{head_dim}"
        yield Problem("decode_attention", label, B16, _decode(*size))
    for dtype in (B16, F32):
        for vocabulary in (32000, 128256, 151936):
            label = f"2048x{vocabulary}"
            yield Problem("linear_logprob", label, dtype, _logprob(2048, vocabulary))
            label = f"cross-entropy {label}"
            yield Problem("linear_logprob", label, dtype, _cross_entropy(2048, vocabulary))
    for pairs, channels in ((64, 896), (512, 4096)):
        label = f"{pairs} pairs x {channels}"
        yield Problem("reward_loss", label, B16, _reward_loss(pairs, channels))
    yield Problem("optimizer", "fp32 with a bf16 copy", F32, _optimizer(narrow=False))
    yield Problem("optimizer", "bf16", B16, _optimizer(narrow=True))


def _later(problem: Problem) -> bool:
    """What few runs wait for."""
    return problem.dtype == F32 and problem.op != "optimizer"


PROBLEMS: list[Problem] = sorted(_all(), key=_later)

"""Section `attention`: packed causal attention of long rows, windows, shared prompts and pairs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch

from fastllm import ops
from fastllm.layout import NO_PREFIX, PackedLayout

from ..records import OURS, Record
from . import attention_peers, exact_attention, material
from .case import Case, Context
from .contest import Contender, Op, Work, ours
from .exact import Inputs
from .goals import Rate

NAME = "attention"

# What plain Triton and the best form are to reach at 16k tokens and heads of 128.
TRITON = {"forward": 480e12, "backward": 380e12}
BEST = {"forward": 620e12, "backward": 520e12}


@dataclass(frozen=True)
class Shape:
    """A packed row and its heads."""

    label: str
    lengths: tuple[int, ...]
    prefix: tuple[int, ...] | None = None
    heads: int = 32
    key_heads: int = 8
    head_dim: int = 128
    window: int | None = None
    goals: Mapping[str, float] = field(default_factory=dict)
    """FLOP/s to be reached by our kernels, by pass."""
    best: Mapping[str, float] = field(default_factory=dict)
    """And by whichever serves best."""

    @property
    def pairs(self) -> int:
        """Pairs of a query and a key that it sees."""
        layout = PackedLayout(self.lengths, self.prefix)
        total = 0
        for segment, length in enumerate(self.lengths):
            first = layout.prefix_length(segment)
            total += _seen(first + length, self.window) - _seen(first, self.window)
        return total

    @property
    def flops(self) -> float:
        """Of the forward pass; the backward pass has two and a half times as many."""
        return 4.0 * self.pairs * self.heads * self.head_dim

    def __str__(self) -> str:
        window = f" window {self.window}" if self.window else ""
        return f"{self.label}{window} {self.heads}/{self.key_heads}x{self.head_dim}"


def _seen(length: int, window: int | None) -> int:
    """Keys that the first `length` positions of a sequence see together."""
    near = min(length, window or length)
    return near * (near + 1) // 2 + (length - near) * near


def cases(context: Context) -> list[Case]:
    """The sizes with goals first."""
    shapes = [op(shape).case() for shape in _shapes(context)]
    if context.scale == "quick":
        shapes = shapes[:3]
    return [*shapes[:2], Case(NAME, "time per work", "shared prompts", _proportion), *shapes[2:]]


def _shapes(context: Context) -> list[Shape]:
    long = context.pick(16384, 16384, 48)
    heads: dict[str, int] = context.pick({}, {}, {"heads": 4, "key_heads": 2, "head_dim": 16})
    few = {"heads": 16, "key_heads": 4, "head_dim": 256}
    wide: dict[str, int] = context.pick(few, few, {"head_dim": 64})
    group = _groups(context)
    pairs = material.pair_segments(context)
    return [
        replace(Shape(f"1x{long}", (long,), goals=TRITON, best=BEST), **heads),
        replace(group, **heads),
        replace(Shape(f"pairs like hh, {sum(pairs[0])}", *pairs), **heads),
        replace(Shape(f"1x{long}", (long,), window=context.pick(4096, 4096, 16)), **heads),
        replace(Shape(f"1x{long}", (long,)), **(heads | {"head_dim": context.pick(64, 64, 32)})),
        replace(Shape(f"1x{long}", (long,)), **(heads | wide)),
        replace(Shape(f"8x{long // 8}", (long // 8,) * 8), **heads),
    ]


def _groups(context: Context) -> Shape:
    """Groups of eight completions on a shared prompt."""
    groups, prompt, answer = context.pick((2, 4096, 512), (2, 4096, 512), (1, 16, 6))
    lengths, prefix = [], []
    for _ in range(groups):
        first = len(lengths)
        lengths += [prompt, *[answer] * 8]
        prefix += [NO_PREFIX, *[first] * 8]
    return Shape(f"{groups} x ({prompt} + 8x{answer})", tuple(lengths), tuple(prefix))


def op(shape: Shape) -> Op:
    """Forward and backward."""
    goals = {way: Rate(least) for way, least in shape.goals.items()}
    layouts: dict[torch.device, PackedLayout] = {}

    def inputs(device: torch.device, generator: torch.Generator) -> Inputs:
        layout = layouts.setdefault(device, PackedLayout(shape.lengths, shape.prefix, device))

        def normal(heads: int) -> torch.Tensor:
            size = (layout.total_tokens, heads, shape.head_dim)
            return torch.randn(size, generator=generator, device=device).to(torch.bfloat16)

        tensors = {"q": normal(shape.heads), "k": normal(shape.key_heads)}
        return tensors | {"v": normal(shape.key_heads), "layout": layout, "window": shape.window}

    def contenders() -> list[Contender]:
        return [ours(ops.attention), *attention_peers.contenders(shape)]

    return Op(
        NAME,
        "attention",
        str(shape),
        inputs,
        contenders,
        exact_attention.solve,
        Work(shape.flops, "FLOP", goals.get("forward")),
        Work(2.5 * shape.flops, "FLOP", goals.get("backward")),
        leaves=("q", "k", "v"),
        like="q",
        seconds=5.0,
    )


def _proportion(context: Context) -> Iterator[Record]:
    """Whether a shared prompt saves time as it saves work: rates with and without sharing.

    The same groups once as they are, and once with a prompt for each completion.
    """
    shared = _groups(context)
    if context.scale == "tiny":
        shared = replace(shared, heads=4, key_heads=2, head_dim=16)
    alone = []
    for segment, prefix in enumerate(shared.prefix or ()):
        if prefix != NO_PREFIX:
            alone.append(shared.lengths[prefix] + shared.lengths[segment])
    apart = replace(shared, label=f"{len(alone)}x{alone[0]}", lengths=tuple(alone), prefix=None)
    found: dict[tuple[str, str], Record] = {}
    for name, shape in (("shared", shared), ("apart", apart)):
        one = op(shape)
        only_ours = replace(one, contenders=lambda one=one: [one.contenders()[0]])
        for record in only_ours.case().run(context):
            if not record.rounds:
                yield replace(record, name="time per work")
                return
            found[name, record.name] = record
    for way in ("forward", "backward"):
        one, other = found["shared", f"attention {way}"], found["apart", f"attention {way}"]
        assert one.rate and other.rate and one.seconds and other.seconds
        yield replace(
            one,
            name=f"time per work {way}",
            goal="as much work in a second as without sharing, less a tenth",
            met=one.rate >= 0.9 * other.rate,
            note=f"shared {other.seconds / one.seconds:.2f}x faster for "
            f"{other.work / one.work:.2f}x less work",
        )
        yield replace(other, name=f"time per work {way}", contender=f"{OURS}, not shared")

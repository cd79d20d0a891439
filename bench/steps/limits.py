"""What the machine would need at the rates that it was seen to reach in the same run.

Generation reads all weights and the cache for every token step; training is arithmetic. A limit
is a floor: what a program does beside that comes on top.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from fastllm import ModelConfig

from .. import roofline, table
from ..options import Options

# Of a weight or a number in the cache. Scales of int8 weights are not counted.
BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}


class Limit(Protocol):
    """A floor under the time of a piece of work."""

    def seconds(self, options: Options) -> float:
        """The least time."""

    def words(self, options: Options) -> str:
        """The same for a reader, with what it is made of."""


@dataclass(frozen=True)
class Memory:
    """Token steps that read weights and cache once each."""

    steps: int
    bytes_per_step: float
    """The mean over the steps."""

    def seconds(self, options: Options) -> float:
        return self.steps * self.bytes_per_step / roofline.read_rate(self.bytes_per_step, options)

    def words(self, options: Options) -> str:
        rate = roofline.read_rate(self.bytes_per_step, options)
        return (
            f"memory limit {table.time(self.bytes_per_step / rate)} a token step: "
            f"{table.amount(self.bytes_per_step, 'B')} at {table.amount(rate, 'B')}/s"
        )


@dataclass(frozen=True)
class Arithmetic:
    """Matrix products at the rate of a large one."""

    flops: float
    dtype: str = "float32"

    def seconds(self, options: Options) -> float:
        return self.flops / roofline.product_rate(self.dtype, options)

    def words(self, options: Options) -> str:
        rate = roofline.product_rate(self.dtype, options)
        return (
            f"arithmetic alone {table.time(self.flops / rate)}: "
            f"{table.amount(self.flops, 'FLOP')} at {table.amount(rate, 'FLOP')}/s"
        )


@dataclass(frozen=True)
class Shape:
    """A model by the sizes that count."""

    layers: int
    layer_weights: int
    """Numbers in the matrices of a layer."""
    key_value_weights: int
    """Those of them that keys and values need: in the last layer, most rows need no others."""
    head_weights: int
    cached: int
    """Numbers that a token leaves in the cache."""
    width: int
    """Query heads times head size."""

    @classmethod
    def of(cls, sizes: Mapping[str, int], vocabulary: int) -> Shape:
        config = ModelConfig.scratch(block_size=8, vocab_size=vocabulary, **sizes)
        hidden, head = config.hidden_size, config.head_dim
        queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
        layers = config.num_hidden_layers
        layer = 2 * hidden * (queries + keys) + 3 * hidden * config.intermediate_size
        head_weights, cached = hidden * vocabulary, 2 * layers * keys
        return cls(layers, layer, 2 * hidden * keys, head_weights, cached, queries)

    def decoding(
        self, prompts: int, group: int, prompt: int, new: int, weights: str, cache: str = ""
    ) -> Memory:
        """Token steps after the first token: each prompt's cache is read once for its group."""
        steps = new - 1
        rows = prompts * prompt + prompts * group * (steps + 1) / 2
        numbers = self.layers * self.layer_weights + self.head_weights
        of_weights = numbers * BYTES[weights]
        return Memory(steps, of_weights + rows * self.cached * BYTES[cache or weights])

    def forward(
        self, prompts: int, group: int, prompt: int, new: int, scored: bool = False
    ) -> float:
        """Operations for groups that share their prompts.

        Args:
            scored: by a reward model, which has no vocabulary and reads last tokens only.
        """
        before, drawn = prompts * prompt, prompts * group * new
        last = prompts * group if scored else drawn
        deep = self.layers - 1
        linear = (before + drawn) * deep + last
        numbers = linear * self.layer_weights + (before + drawn - last) * self.key_value_weights
        seen = prompt + new / 2
        pairs = deep * (before * prompt / 2 + drawn * seen) + last * seen
        head = 0 if scored else drawn * self.head_weights
        return 2 * (numbers + head) + 4 * pairs * self.width

    def training(self, prompts: int, group: int, prompt: int, new: int) -> Arithmetic:
        """Forward, and backward at twice its operations."""
        return Arithmetic(3 * self.forward(prompts, group, prompt, new))

    def grpo_step(
        self, prompts: int, group: int, prompt: int, new: int, scored: bool = False
    ) -> Arithmetic:
        """Sampling, training, and perhaps scoring by a model of the same size."""
        of = prompts, group, prompt, new
        scoring = self.forward(*of, scored=True) if scored else 0.0
        return Arithmetic(4 * self.forward(*of) + scoring)

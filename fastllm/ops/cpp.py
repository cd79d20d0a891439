"""The C++ kernels for CPUs: loading `fastllm._C`, and one namespace of raw kernels per op.

The namespaces have the same functions and arguments as the Triton modules `fastllm.kernels.<op>`.
An extension that was not built is a choice; one that does not load is a defect, and says so once.
"""

from __future__ import annotations

import importlib
import warnings
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..layout import PackedLayout
from .shapes import register_shapes

_BUILD = "pip install -e . (needs a C++ compiler: gcc 10+ or clang 14+) and start Python again"


def available() -> bool:
    """Whether the C++ kernels can serve CPU tensors in this process."""
    return _load()[0] is not None


def reason() -> str:
    """Why the C++ kernels can or cannot serve, in one line."""
    return _load()[1]


def isa() -> str:
    """Instruction set that the kernels run on: "baseline", "avx2", "avx512" or "avx512_bf16".

    Raises:
        RuntimeError: the extension was not built or does not load.
    """
    return _loaded().isa()


def fast_bf16_dot() -> bool:
    """Whether this processor multiplies bf16 faster than fp32.

    Raises:
        RuntimeError: the extension was not built or does not load.
    """
    return _loaded().fast_bf16_dot()


def decoder_class() -> Any:
    """The class Decoder (csrc/decoder.h).

    Raises:
        RuntimeError: the extension was not built or does not load.
    """
    return _loaded().Decoder


def prefer_large_pages(tensor: Tensor) -> None:
    """Ask for large pages for a fresh tensor on the CPU (csrc/memory.h); advice, no more."""
    if available() and tensor.device.type == "cpu":
        _loaded().prefer_large_pages(tensor.data_ptr(), tensor.nbytes)


def keep_memory() -> bool:
    """Let this process keep the memory that it frees (csrc/memory.h); whether that was possible."""
    return available() and bool(_loaded().keep_memory())


def _loaded() -> ModuleType:
    extension, why = _load()
    if extension is None:
        raise RuntimeError(why)
    return extension


def _op(name: str) -> Any:
    """One op; its only overload, because looking for it takes longer than a small kernel."""
    if torch.compiler.is_compiling():
        return getattr(torch.ops.fastllm, name).default
    return _found(name)


@cache
def _found(name: str) -> Any:
    _loaded()
    return getattr(torch.ops.fastllm, name).default


@cache
def _load() -> tuple[ModuleType | None, str]:
    try:
        extension = importlib.import_module("fastllm._C")
    except ModuleNotFoundError as error:
        if error.name != "fastllm._C":
            raise
        return None, f"C++ extension not built: run {_BUILD}"
    except ImportError as error:
        why = f"C++ extension is broken: {error}"
        warnings.warn(f"fastllm: {why}", RuntimeWarning, stacklevel=2)
        return None, why
    register_shapes()
    levels = ", ".join(extension.isa_levels())
    return extension, f"C++ extension built for {levels}; running {extension.isa()}"


class matmul:
    """out = a b, or out += a b."""

    @staticmethod
    def product_(a: Tensor, b: Tensor, out: Tensor, add: bool, in_order: bool) -> None:
        _op("matmul_")(a, b, out, add, in_order)


class packed_matmul:
    """x [M, K] times a matrix that was packed once; see csrc/packed_matmul.cpp."""

    FLOAT32, BFLOAT16, INT8 = 0, 1, 2

    @staticmethod
    def pack(weight: Tensor, packing: int) -> tuple[Tensor, Tensor]:
        """weight [N, K] -> its panels and their scales (for INT8)."""
        return _op("pack_matrix")(weight, packing)

    @staticmethod
    def product(
        x: Tensor,
        panels: Tensor,
        scales: Tensor,
        packing: int,
        columns: int,
        bias: Tensor | None = None,
        wide: bool = False,
    ) -> Tensor:
        """x weight^T + bias [M, N], in fp32 when `wide`, else in the dtype of x."""
        return _op("packed_matmul")(x, panels, scales, packing, columns, bias, wide)


class rms_norm:
    """h = x + residual, y = h / sqrt(mean(h^2) + eps) * weight, and its gradient."""

    READS_STRIDES = True

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, eps: float, residual: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        return _op("rms_norm_forward")(x, weight, eps, residual)

    @staticmethod
    def backward(
        dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor, rstd: Tensor, weight_grad: bool
    ) -> tuple[Tensor, Tensor]:
        return _op("rms_norm_backward")(dy, dh, h, weight, rstd, weight_grad)


class rope:
    """Rotation of the two halves of each head by its position's angle."""

    READS_STRIDES = True

    @staticmethod
    def forward(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, inverse: bool
    ) -> tuple[Tensor, Tensor]:
        return _op("rope_forward")(q, k, cos, sin, positions, inverse)

    @staticmethod
    def into_(
        q: Tensor,
        k: Tensor,
        cos: Tensor,
        sin: Tensor,
        positions: Tensor,
        inverse: bool,
        q_out: Tensor,
        k_out: Tensor,
    ) -> None:
        """Write the rotated q and k: to slices of one buffer, say, or over q and k."""
        _op("rope_into_")(q, k, cos, sin, positions, inverse, q_out, k_out)


class swiglu:
    """silu(gate) * up, and its gradient; tensors are rows [N, F]."""

    READS_STRIDES = True

    @staticmethod
    def forward(gate: Tensor, up: Tensor) -> Tensor:
        return _op("swiglu_forward")(gate, up)

    @staticmethod
    def backward(dout: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        return _op("swiglu_backward")(dout, gate, up)

    @staticmethod
    def backward_into_(dout: Tensor, gate: Tensor, up: Tensor, dgate: Tensor, dup: Tensor) -> None:
        """Write the gradients: to the halves of one buffer, say, or over gate and up."""
        _op("swiglu_backward_into_")(dout, gate, up, dgate, dup)


class attention:
    """Attention on the packed, prefix-shared layout, and its gradient."""

    READS_STRIDES = True

    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, scale: float, window: int
    ) -> tuple[Tensor, Tensor]:
        return _op("attention_forward")(
            q,
            k,
            v,
            layout.starts,
            layout.prefix,
            layout.positions,
            layout.query_rows,
            layout.query_starts,
            scale,
            window,
        )

    @staticmethod
    def backward(
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        layout: PackedLayout,
        scale: float,
        window: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
        attention.backward_into_(dout, q, k, v, out, lse, layout, scale, window, dq, dk, dv)
        return dq, dk, dv

    @staticmethod
    def backward_into_(
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        layout: PackedLayout,
        scale: float,
        window: int,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
    ) -> None:
        """Write the gradients: to slices of one buffer, say. All of them, zeros where nobody sees.

        Not over q, k or v, which are still read.
        """
        _op("attention_backward_into_")(
            dout,
            q,
            k,
            v,
            out,
            lse,
            layout.starts,
            layout.prefix,
            layout.positions,
            layout.query_rows,
            layout.query_starts,
            layout.children_starts,
            layout.children,
            scale,
            window,
            dq,
            dk,
            dv,
        )


class decode_attention:
    """One new token per sequence against the cache blocks of its prompt and of its tail."""

    READS_STRIDES = True

    @staticmethod
    def forward(
        q: Tensor,
        keys: Tensor,
        values: Tensor,
        prefix_blocks: Tensor,
        prefix_lengths: Tensor,
        group: Tensor,
        tail_blocks: Tensor,
        tail_lengths: Tensor,
        scale: float,
        window: int,
    ) -> Tensor:
        return _op("decode_attention_forward")(
            q,
            keys,
            values,
            prefix_blocks,
            prefix_lengths,
            group,
            tail_blocks,
            tail_lengths,
            scale,
            window,
        )


class linear_logprob:
    """Log-probability of the target and entropy of each row of logits, and the gradient."""

    @staticmethod
    def forward(
        logits: Tensor, targets: Tensor, temperature: float, softcap: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        return _op("linear_logprob_forward")(logits, targets, temperature, softcap)

    @staticmethod
    def backward_(
        logits: Tensor,
        targets: Tensor,
        lse: Tensor,
        entropy: Tensor,
        dlogp: Tensor,
        dentropy: Tensor,
        temperature: float,
        softcap: float,
    ) -> None:
        _op("linear_logprob_backward_")(
            logits, targets, lse, entropy, dlogp, dentropy, temperature, softcap
        )


class sampling:
    """The next token of each row of logits."""

    @staticmethod
    def draw(logits: Tensor, rows: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, log-probabilities, and those under the distribution that was drawn from.

        `rows`: as `fastllm.generation.sampling.SamplingRows`.
        """
        return _op("sample")(
            logits,
            rows.temperature,
            rows.top_p,
            rows.min_p,
            rows.repetition_penalty,
            rows.top_k,
            rows.key,
            rows.count,
            rows.min_count,
            rows.stop_tokens,
            rows.seen,
        )


class pairwise_loss:
    """Bradley-Terry loss of pairs of scores, with its gradient."""

    @staticmethod
    def forward(
        chosen: Tensor, rejected: Tensor, margin: Tensor | None, centering: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        return _op("pairwise_loss_forward")(chosen, rejected, margin, centering)


class optimizer:
    """The norm of a list of gradients, and a step of AdamW that scales them."""

    @staticmethod
    def gradient_norm(gradients: list[Tensor]) -> Tensor:
        """Euclidean norm over all elements, an fp64 scalar."""
        return _op("gradient_norm")(gradients)

    @staticmethod
    def adamw_(
        parameters: list[Tensor],
        gradients: list[Tensor],
        means: list[Tensor],
        squares: list[Tensor],
        steps: list[Tensor],
        *options: float,
    ) -> None:
        """Count a step and take it.

        `options`: gradient_scale, learning_rate, beta1, beta2, eps, weight_decay.
        """
        _op("adamw_")(parameters, gradients, means, squares, steps, *options)

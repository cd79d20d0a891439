"""The hot paths: one file per op, each with its PyTorch reference and a choice of backend."""

from .attention import attention, attention_reference
from .backend import BACKENDS, OPS, report, use_backend
from .decode_attention import decode_attention, decode_attention_reference
from .linear_logprob import linear_cross_entropy, linear_logprob, linear_logprob_reference
from .matmul import linear, matmul, same_order
from .pairwise_loss import pairwise_loss, pairwise_loss_reference
from .rms_norm import rms_norm, rms_norm_reference
from .rope import rope, rope_reference
from .swiglu import swiglu, swiglu_reference

__all__ = [
    "BACKENDS",
    "OPS",
    "attention",
    "attention_reference",
    "decode_attention",
    "decode_attention_reference",
    "linear",
    "linear_cross_entropy",
    "linear_logprob",
    "linear_logprob_reference",
    "matmul",
    "pairwise_loss",
    "pairwise_loss_reference",
    "report",
    "rms_norm",
    "rms_norm_reference",
    "rope",
    "rope_reference",
    "same_order",
    "swiglu",
    "swiglu_reference",
    "use_backend",
]

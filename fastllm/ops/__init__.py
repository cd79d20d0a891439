"""The hot paths: one file per op, each with its PyTorch reference and a choice of backend."""

from .attention import attention, attention_reference, prepare_layout
from .backend import BACKENDS, OPS, report, use_backend
from .decode_attention import decode_attention, decode_attention_reference
from .linear_logprob import linear_cross_entropy, linear_logprob, linear_logprob_reference
from .lora_linear import lora_linear, lora_linear_reference
from .matmul import linear, matmul, same_order
from .pairwise_loss import pairwise_loss, pairwise_loss_reference
from .reward_loss import reward_loss, reward_loss_reference, reward_scores
from .rms_norm import rms_norm, rms_norm_reference
from .rope import rope, rope_into_cache, rope_reference
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
    "lora_linear",
    "lora_linear_reference",
    "matmul",
    "pairwise_loss",
    "pairwise_loss_reference",
    "prepare_layout",
    "report",
    "reward_loss",
    "reward_loss_reference",
    "reward_scores",
    "rms_norm",
    "rms_norm_reference",
    "rope",
    "rope_into_cache",
    "rope_reference",
    "same_order",
    "swiglu",
    "swiglu_reference",
    "use_backend",
]

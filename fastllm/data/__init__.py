"""Data: records, tokenizers, chat templates, encoding, generated tasks.

Names are imported on first use: the records need neither the tokenizers library nor torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME = {
    "DataError": "errors",
    "EncodedPair": "encoding",
    "EncodedPrompt": "encoding",
    "EncodedSequence": "encoding",
    "EncodingSummary": "encoding",
    "Example": "examples",
    "PreferenceDataset": "preference",
    "RewardDataCollator": "preference",
    "Task": "tasks",
    "Tokenizer": "tokenizer",
    "choose_tokenizer": "tokenizer",
    "create_dummy_preference_data": "tasks",
    "encode_preferences": "encoding",
    "encode_prompts": "encoding",
    "encode_sft": "encoding",
    "format_example": "examples",
    "generate_tasks": "tasks",
    "preference_records": "records",
    "prompt_records": "records",
    "read_records": "records",
    "sft_records": "records",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__

"""What a command says while it runs."""

from __future__ import annotations

import logging


def start_log() -> None:
    """Send the library's messages to stderr, and say it when the fast CPU kernels are missing."""
    import torch

    from fastllm.ops import cpp
    from fastllm.training.logging import configure_logging

    configure_logging()
    if not cpp.available() and not torch.cuda.is_available():
        logging.getLogger("fastllm").warning("ops run on PyTorch, slower: %s", cpp.reason())

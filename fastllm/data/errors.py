"""The one exception for bad data and bad tokenizer files."""

from __future__ import annotations


class DataError(ValueError):
    """Data that cannot be used; the message says where, what was expected and what was found."""

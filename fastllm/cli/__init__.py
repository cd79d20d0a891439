"""The command line. Nothing here imports torch before a command runs."""

from .main import main

__all__ = ["main"]

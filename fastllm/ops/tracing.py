"""How ops meet torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

Function = TypeVar("Function", bound=Callable[..., object])


def traced_as_constant(function: Function) -> Function:
    """While torch.compile traces, call this function and take what it returns for a constant.

    The mark of `torch.compiler.assume_constant_result`, which imports the compiler: two seconds and
    110 MB for a program that compiles nothing.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function

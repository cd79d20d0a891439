"""Compiles the cases of `test_aot.py` from the last one on, in a process of its own.

A compiler takes one core. While the tests go through the cases from the first one on, this fills
Triton's cache from the other end; where they meet, everything is compiled.
"""

from __future__ import annotations

import triton

from fastllm.kernels.launch import launch
from tests.kernels.case import all_cases
from tests.kernels.machine_code import AbsentGPU


def main() -> None:
    """Compile; an error ends it, and is for the tests to report."""
    every = [case for of_op in all_cases().values() for case in of_op]
    for case, target in reversed([(one, target) for one in every for target in one.targets]):
        triton.runtime.driver._active = AbsentGPU(target)
        with launch.compiling():
            case.launch()


if __name__ == "__main__":
    main()

"""The same cases for pytest-benchmark: `pytest bench --benchmark-only`."""

from __future__ import annotations

import pytest
import torch

from bench import harness
from fastllm.ops import OPS

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _cases():
    for op in OPS:
        suite = harness.suite_of(op)
        case = suite.cases[0]
        for contender in harness.contenders(suite, DEVICE, compiled=False):
            for backward in (False, True) if case.gradients_of else (False,):
                name = f"{op} {case.label} {'both' if backward else 'forward'} {contender.name}"
                yield pytest.param(suite, case, contender, backward, id=name)


@pytest.mark.parametrize(("suite", "case", "contender", "backward"), list(_cases()))
def test_op(benchmark, suite, case, contender, backward):
    problem = harness.Problem(suite, case, DEVICE, torch.float32)
    call = problem.forward_backward if backward else problem.forward

    def run():
        call(contender.function)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    with contender.ready():
        benchmark(run)

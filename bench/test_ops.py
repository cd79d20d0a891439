"""The same cases for pytest-benchmark: `pytest bench --benchmark-only`."""

from __future__ import annotations

import pytest
import torch

from bench.cases import Problem, suite_of, suites

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _cases():
    for op in suites():
        suite = suite_of(op)
        case = suite.cases[0]
        for name in [c.name for c in Problem(suite, case, DEVICE, torch.float32).contenders(False)]:
            for backward in (False, True) if case.gradients_of else (False,):
                what = f"{op} {case.label} {'both' if backward else 'forward'} {name}"
                yield pytest.param(suite, case, name, backward, id=what)


@pytest.mark.parametrize(("suite", "case", "name", "backward"), list(_cases()))
def test_op(benchmark, suite, case, name, backward):
    problem = Problem(suite, case, DEVICE, torch.float32)
    contender = next(c for c in problem.contenders(compiled=False) if c.name == name)
    problem.check(contender, backward)
    call = problem.call(contender, backward)

    def run():
        call()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    with contender.ready():
        benchmark(run)

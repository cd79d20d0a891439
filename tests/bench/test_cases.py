"""No figure for what fails its check."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bench.cases import Case, Peer, Problem, Suite, Wrong, suite_of, suites
from bench.op_times import time_case
from bench.options import Options
from bench.records import OTHER_WORK, OURS
from fastllm.ops import OPS

OPTIONS = Options(quick=True, compile=False, dtypes=("float32",))


def doubled(x: Tensor) -> Tensor:
    return x * 2


def slightly_more(x: Tensor) -> Tensor:
    return x * 2.001


def unable(x: Tensor) -> Tensor:
    raise NotImplementedError


class _WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def suite(**peers: Peer) -> Suite:
    case = Case("64", lambda: {"x": torch.randn(64)}, ("x",), elements=128)
    return Suite(doubled, doubled, (case,), peers)


def notes(found: Suite) -> dict[tuple[str, str], str | None]:
    """What each contender got: None for a figure."""
    case = found.cases[0]
    records = list(time_case("doubled", found, case, torch.float32, OPTIONS))
    for record in records:
        assert bool(record.rounds) != record.note.startswith("WRONG")
        assert not record.rounds or record.roofline > 0
    return {
        (r.name.removeprefix("doubled "), r.contender): None if r.rounds else r.note
        for r in records
    }


def test_a_wrong_contender_gets_no_figure() -> None:
    found = notes(
        suite(
            output=Peer(slightly_more),
            gradient=Peer(_WrongGradient.apply, lambda given: given),
            unable=Peer(unable),
        )
    )
    assert "output 0 is off by 0.0005" in found["forward", "output"]
    assert "gradient 0 is off by 0.0005" in found["forward+backward", "output"]
    assert found["forward", "eager"] is None
    assert not [who for _, who in found if who == "unable"]


def test_a_wrong_gradient_is_found() -> None:
    wrong = suite(gradient=Peer(lambda x: _WrongGradient.apply(x)))
    found = notes(wrong)
    assert found["forward", "gradient"] is None
    assert "gradient 0 is off by 0.5" in found["forward+backward", "gradient"]


def test_ours_is_checked_too() -> None:
    problem = Problem(
        Suite(slightly_more, doubled, suite().cases),
        suite().cases[0],
        torch.device("cpu"),
        torch.float32,
    )
    ours = [c for c in problem.contenders(compiled=False) if c.name == OURS]
    for contender in ours:
        with pytest.raises(Wrong):
            problem.check(contender, backward=False)


def test_a_peer_with_other_work_is_named_and_not_checked() -> None:
    found = suite(more=Peer(slightly_more, same=False))
    records = list(time_case("doubled", found, found.cases[0], torch.float32, OPTIONS))
    more = [record for record in records if record.contender == "more"]
    assert more and all(r.rounds and r.note == OTHER_WORK for r in more)


def test_a_prepared_peer_can_decline() -> None:
    problem = Problem(
        suite(no=Peer(doubled, unable)), suite().cases[0], torch.device("cpu"), torch.float32
    )
    assert "no" not in [c.name for c in problem.contenders(compiled=False)]


def test_there_is_a_suite_for_every_op() -> None:
    assert set(OPS) <= set(suites())
    for op in suites():
        labels = [case.label for case in suite_of(op).cases]
        assert len(labels) == len(set(labels))


def test_work_is_bytes_or_operations() -> None:
    assert Case("", dict, elements=10).work(torch.bfloat16, backward=True) == (40.0, "B")
    assert Case("", dict, flops=10, both=3.0).work(torch.float32, backward=True) == (30.0, "FLOP")

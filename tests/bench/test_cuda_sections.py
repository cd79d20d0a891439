"""The suite on a GPU, run on the CPU at tiny sizes: every section from its cases to its records."""

from __future__ import annotations

import importlib.util
import time

import pytest
import torch

from bench.cuda import ceilings, contest, device, exact, sections, worker
from bench.cuda.case import Case, Context
from bench.cuda.contest import Contender, Op, Work
from bench.cuda.exact import Wrong, by_autograd
from bench.cuda.goals import Rate, Share, Within, faster, judged
from bench.cuda.protocol import Order, unpacked
from bench.options import CUDA_SECTIONS
from bench.records import OTHER_WORK, OURS, Record

HOST = device.Host()


def order(section: str, **more) -> Order:
    far = time.time() + 1000
    return Order(section, "tiny", 2, seed=5, deadline=far, compile=False, **more)


def records_of(section: str, **more) -> list[Record]:
    found: list[Record] = []

    def say(kind, **what):
        if kind == "record":
            found.append(unpacked(what["record"]))

    assert worker.run(order(section, **more), HOST, say)
    return found


def test_sections_are_those_of_the_command_line():
    assert tuple(sections.MODULES) == tuple(sections.WEIGHTS) == CUDA_SECTIONS
    assert sum(sections.WEIGHTS.values()) <= 540
    assert sections.WHOLE_SECONDS < 540 and sections.SECTION_SECONDS < 180


@pytest.mark.parametrize("section", ["check", "ceilings", "ops", "attention", "head", "optimizer"])
def test_a_section_runs_from_end_to_end(section):
    found = records_of(section)
    assert {record.section for record in found} == {section}
    notes = [f"{r.name} {r.case}: {r.note}" for r in found if r.contender == OURS]
    assert not [note for note in notes if "WRONG" in note or "ERROR" in note]
    if section == "check":
        assert all("ok, off by" in note for note in notes)
    else:
        timed = {record.name for record in found if record.rounds}
        assert timed and all(len(record.rounds) == 2 for record in found if record.rounds)


@pytest.mark.slow
@pytest.mark.parametrize("section", ["steps", "decode"])
def test_whole_steps_and_generations(section):
    if importlib.util.find_spec("transformers") is None:
        pytest.skip("needs transformers")
    found = records_of(section)
    ours = [record for record in found if record.contender == OURS]
    assert all(record.rounds for record in ours), [record.note for record in ours]
    peers = {record.contender for record in found if record.rounds}
    assert any(name.startswith("transformers") for name in peers)


def test_every_full_case_has_a_name_of_its_own():
    context = Context(HOST, "full")
    for section in CUDA_SECTIONS:
        keys = [case.key for case in sections.module_of(section).cases(context)]
        assert len(keys) == len(set(keys)), section


# -- one op ----------------------------------------------------------------------------------------


def doubled(x):
    return x * 2


def op(*contenders: Contender, **more) -> Op:
    def inputs(place, generator):
        return {"x": torch.randn(4, 8, generator=generator, device=place)}

    defaults = {
        "forward": Work(256.0, goal=Share(0.5)),
        "backward": Work(256.0),
        "leaves": ("x",),
        "dtype": torch.float32,
        "like": "x",
    }
    return Op(
        "ops", "double", "4x8", inputs, lambda: contenders, by_autograd(doubled), **defaults | more
    )


def timed(one: Op, **more) -> list[Record]:
    context = Context(HOST, "tiny", 2, rates={"copy": 1e9, "product": 1e9}, **more)
    return list(one.case().run(context))


def test_contenders_take_turns_and_are_held_against_the_ceiling():
    found = timed(op(Contender("eager", doubled), Contender(OURS, doubled)))
    assert [(r.name, r.contender) for r in found] == [
        ("double forward", OURS),
        ("double forward", "eager"),
        ("double backward", OURS),
        ("double backward", "eager"),
    ]
    assert found[0].roofline == pytest.approx(256.0 / found[0].seconds / 1e9, rel=0.5)
    assert found[0].goal == ">= 50% of the ceiling" and found[0].met is not None
    assert found[1].met is None


def test_ours_is_not_timed_when_it_is_wrong_and_nobody_else_then():
    found = timed(op(Contender("eager", doubled), Contender(OURS, lambda x: x * 2.1)))
    assert [record.contender for record in found] == [OURS]
    assert found[0].note.startswith("WRONG, not timed: output is off by")
    assert not found[0].rounds


def test_a_wrong_gradient_is_found():
    class Bad(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, dout):
            return dout

    found = timed(op(Contender(OURS, lambda x: Bad.apply(x))))
    assert "gradient is off" in found[0].note


def test_a_result_that_was_not_written_everywhere_is_found():
    def lazy(x):
        out = torch.empty_like(x)
        out[:-1] = x.detach()[:-1] * 2
        return out + 0 * x

    found = timed(op(Contender(OURS, lazy)))
    assert found[0].note.startswith("WRONG")


def test_what_a_peer_cannot_do_is_named_and_the_rest_goes_on():
    def fails(x):
        raise RuntimeError("no such kernel")

    def cannot(x):
        raise NotImplementedError("only on Tuesdays")

    found = timed(
        op(
            Contender(OURS, doubled),
            Contender("fails", fails),
            Contender("cannot", cannot),
            Contender("wrong", lambda x: x * 3),
            Contender("other work", lambda x: x * 3, equal=False),
            backward=None,
        )
    )
    notes = {record.contender: record.note for record in found}
    assert "no such kernel" in notes["fails"]
    assert "only on Tuesdays" in notes["cannot"]
    assert notes["wrong"].startswith("WRONG")
    assert notes["other work"].startswith(OTHER_WORK)
    assert {r.contender for r in found if r.rounds} == {OURS, "other work"}


def test_peers_are_left_out_by_name_when_the_time_is_over():
    one = op(Contender(OURS, doubled), Contender("eager", doubled))
    found = timed(one, deadline=time.time() + 1)
    assert {r.contender: r.note for r in found}["eager"].startswith("left out")


def test_a_layout_of_its_own_is_taken_back_for_the_comparison():
    def turned(x):
        return x * 2

    peer = Contender(
        "turned",
        turned,
        prepare=lambda inputs: {"x": inputs["x"].t().contiguous()},
        lay=lambda t: t.t().contiguous(),
        unlay=torch.t,
    )
    found = timed(op(Contender(OURS, doubled), peer))
    assert {record.contender for record in found if record.rounds} == {OURS, "turned"}


def test_inputs_are_as_many_as_no_cache_holds():
    one = op(Contender(OURS, doubled))
    sets = contest._Contest(one, Context(HOST, "tiny")).sets
    assert len(sets) == contest.MOST_SETS  # of 128 bytes each
    assert not torch.equal(sets[0]["x"], sets[1]["x"])


def test_seeds_make_the_inputs():
    def draw(seed):
        return torch.randn(3, generator=Context(HOST, "tiny", seed=seed).generator("x"))

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


# -- right and wrong -------------------------------------------------------------------------------


def test_errors_in_norm_and_at_most():
    right = torch.randn(1000, 100, dtype=torch.float64)
    exact.compare([right.bfloat16()], [right], "it", torch.bfloat16)
    one = right.bfloat16()
    one[3, 3] += right.abs().max()
    with pytest.raises(Wrong, match="at most"):  # one element in a hundred thousand
        exact.compare([one], [right], "it", torch.bfloat16)
    one[3, 3] = float("nan")
    with pytest.raises(Wrong, match="inf"):
        exact.compare([one], [right], "it", torch.bfloat16)
    with pytest.raises(Wrong, match="shape"):
        exact.compare([right[:1]], [right], "it", torch.float64)


def test_memory_is_poisoned_inside_and_not_after():
    with exact.poisoned():
        assert torch.empty(100).isnan().all()
    assert torch.are_deterministic_algorithms_enabled()  # as the fixture of the tests has it


def test_attention_by_its_formulas_is_attention_by_autograd():
    from bench.cuda import exact_attention
    from fastllm.layout import PackedLayout
    from fastllm.ops import attention_reference

    layout = PackedLayout([5, 3, 0, 4, 6], [-1, 0, 0, -1, -1])
    inputs = {
        "q": torch.randn(18, 4, 8, dtype=torch.float64),
        "k": torch.randn(18, 2, 8, dtype=torch.float64),
        "v": torch.randn(18, 2, 8, dtype=torch.float64),
        "layout": layout,
        "window": 4,
    }
    gradient = torch.randn(18, 4, 8, dtype=torch.float64)
    ours = exact_attention.solve(inputs, ("q", "k", "v"), [gradient])
    theirs = by_autograd(attention_reference)(inputs, ("q", "k", "v"), [gradient])
    for one, other in zip(
        (*ours.outputs, *ours.gradients), (*theirs.outputs, *theirs.gradients), strict=True
    ):
        assert torch.allclose(one, other)


def test_pairs_that_a_query_sees_are_counted():
    from bench.cuda.attention import Shape

    assert Shape("x", (4,)).pairs == 10
    assert Shape("x", (4,), window=2).pairs == 7
    assert Shape("x", (4, 2), (-1, 0)).pairs == 10 + 5 + 6


# -- goals -----------------------------------------------------------------------------------------


def test_goals():
    record = Record("ops", "x", "y", "", OURS, (2.0,), 8.0, "B", roofline=0.9, peak_bytes=100.0)
    assert judged(record, Share(0.9))["met"] and not judged(record, Share(0.91))["met"]
    assert judged(record, Rate(4.0, "B"))["met"] and not judged(record, Rate(4.1, "B"))["met"]
    assert judged(record, Within(2.0, 100))["met"] and not judged(record, Within(2.0, 99))["met"]
    assert not judged(record, Within(1.9))["met"]
    peer = Record("ops", "x", "y", "", "peer", (6.0,))
    assert faster(record, peer, 3.0, "peer")["met"] and not faster(record, peer, 3.1, "p")["met"]
    assert faster(record, None, 3.0, "peer") == {"goal": ">= 3x as fast as peer"}
    assert judged(record, None) == {}


def test_the_rates_of_a_run_are_measured_once_and_handed_on():
    said = []
    assert worker.run(order("ceilings", only="copy"), HOST, lambda k, **w: said.append((k, w)))
    rates = dict(said)["rates"]["rates"]
    assert rates["copy"] > 0 and rates["product"] > 0
    again = []
    given = order("ceilings", only="copy", rates=rates)
    assert worker.run(given, HOST, lambda k, **w: again.append(k))
    assert "rates" not in again
    assert ceilings.NAME == "ceilings"


# -- the worker ------------------------------------------------------------------------------------


def test_an_error_of_a_case_is_a_record():
    def breaks(context):
        yield Record("ops", "a", "b", "", OURS, (1.0,))
        raise ValueError("it broke\nin two lines")

    case = Case("ops", "a", "b", breaks)
    found = list(worker.guarded(case, Context(HOST, "tiny")))
    assert found[0].rounds and found[1].note == "ERROR: ValueError: it broke"


def test_a_section_that_cannot_be_imported_is_an_error(monkeypatch):
    monkeypatch.setitem(sections.MODULES, "ops", "bench.cuda.nowhere")
    (record,) = records_of("ops", rates={"copy": 1.0})
    assert record.note.startswith("ERROR: ModuleNotFoundError")


def test_cases_are_dealt_out_and_large_ones_go_to_the_first():
    def case(name, large=False):
        return Case("check", name, "", lambda _: iter(()), large=large)

    cases = [case("a"), case("b"), case("big", large=True), case("c")]
    dealt = [
        [one.name for one in worker.dealt(cases, order("check", part=part, parts=2))]
        for part in range(2)
    ]
    assert dealt == [["a", "c", "big"], ["b"]]
    left = worker.dealt(cases, order("check", done=(cases[0].key,), only="a"))
    assert left == []


def test_no_case_begins_when_the_time_is_over():
    case = Case("ops", "a", "b", lambda _: iter([1 / 0]), seconds=5.0)
    (record,) = worker.guarded(case, Context(HOST, "tiny", deadline=time.time() + 1))
    assert record.note == "left out: the section's time is over"

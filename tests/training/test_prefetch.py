"""Batches in one buffer: what is unpacked is what was packed, and where the kernels expect it."""

from __future__ import annotations

import pytest
import torch

from fastllm.data.packing import pack_groups, pack_pairs, pack_sequences
from fastllm.training import prefetch
from fastllm.training.grpo_passes import GRPOBatch
from fastllm.training.prefetch import ALIGNMENT, Bytes, Placement, pack, unpack


def sft():
    return pack_sequences([[1, 2, 3], [4], [5, 6, 7, 8]], [[1, 1, 1], [1], [0, 0, 1, 1]])


def pairs():
    return pack_pairs([([1, 2, 3], [1, 2, 4, 5]), ([6], [7])], margins=[0.5, None])


def grpo():
    return GRPOBatch(
        tokens=pack_groups([[1, 2], [3]], [[4], [5, 6], [7]], [0, 0, 1]),
        advantages=torch.tensor([1.0, -1.0, 0.5]),
        lengths=torch.tensor([1, 2, 1]),
        weights=torch.ones(3),
        sampler_logp=torch.tensor([-0.1, -0.2, -0.3, -0.4]),
        old_logp=None,
        skipped=7,
    )


BATCHES = {
    "sft": sft,
    "pairs": pairs,
    "no margin": lambda: pack_pairs([([1, 2], [1, 3])]),
    "nothing": lambda: pack_groups([], [], []),
    "grpo": grpo,
}


def tensors(batch):
    """Every tensor of a batch by name, those of its layouts too."""
    found = {}
    for name, value in vars(batch).items():
        if isinstance(value, torch.Tensor):
            found[name] = value
        elif hasattr(value, "tables"):
            found |= {f"{name}.{key}": table for key, table in value.tables().items()}
        elif hasattr(value, "layout"):
            found |= {f"{name}.{key}": inner for key, inner in tensors(value).items()}
    return found


def with_schedules(layout, last):
    for one in (layout, last):
        _ = one.starts, one.query_starts, one.prefix
        one.schedule("tiles", lambda host: (host.starts[:-1], host.query_rows))


@pytest.mark.parametrize("kind", BATCHES)
def test_what_is_unpacked_is_what_was_packed(kind):
    batch = BATCHES[kind]()
    sent = Placement("cpu", with_schedules).send_parcel(batch)().batch
    expected, found = tensors(batch), tensors(sent)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    others = {n: v for n, v in vars(batch).items() if isinstance(v, int | bool | None)}
    assert others == {name: getattr(sent, name) for name in others}


@pytest.mark.parametrize("kind", BATCHES)
def test_everything_lies_in_the_one_buffer(kind):
    parcel = Placement("cpu", with_schedules).send_parcel(BATCHES[kind]())()
    begin = parcel.buffer.data_ptr()
    for name, tensor in tensors(parcel.batch).items():
        offset = tensor.data_ptr() - begin
        inside = 0 <= offset <= parcel.bytes.size - tensor.nbytes and offset % ALIGNMENT == 0
        assert inside or not tensor.numel(), name
        assert tensor.is_contiguous()


def test_parts_lie_apart_and_aligned():
    given = [torch.arange(3), torch.empty(0), torch.rand(200), torch.tensor([True]), torch.ones(2)]
    layout = Bytes.of(given)
    starts = [first for *_, first in layout.parts]
    sizes = [tensor.nbytes for tensor in given]
    for first, size, following in zip(starts, sizes, [*starts[1:], layout.size], strict=True):
        assert first % ALIGNMENT == 0 and first + size <= following
    buffer = torch.zeros(layout.size, dtype=torch.uint8)
    layout.fill(buffer, given)
    for view, tensor in zip(layout.views(buffer), given, strict=True):
        assert view.dtype == tensor.dtype and torch.equal(view, tensor)


def test_equal_sizes_have_equal_places():
    """A buffer of one batch can be filled with another's: what a graph reads."""
    other = pack_sequences([[9, 2, 3], [4], [5, 9, 7, 8]], [[1, 1, 1], [1], [0, 0, 1, 1]])
    first, second = (Placement("cpu").send_parcel(batch)() for batch in (sft(), other))
    assert first.bytes == second.bytes and hash(first.bytes) == hash(second.bytes)
    again = unpack(first.batch, first.bytes, first.buffer)
    first.buffer.copy_(second.buffer)
    assert torch.equal(again.input_ids, other.input_ids)
    longer = Placement("cpu").send_parcel(pack_sequences([[1] * 9], [[1] * 9]))()
    assert longer.bytes != first.bytes


def test_slices_are_packed_as_they_read():
    """The sides of a pair are every other element."""
    batch = pairs()
    assert not batch.chosen.is_contiguous()
    layout, buffer = pack(batch)
    there = unpack(batch, layout, buffer)
    assert torch.equal(there.chosen, batch.chosen) and there.margin.tolist() == [0.5, 0.0]


def test_the_selection_comes_along():
    """`select` on the device finds what was made on the host: it reads no rows there."""
    sent = Placement("cpu", with_schedules).send_parcel(sft())().batch
    selected = sent.layout.select(sent.rows)
    assert selected is sent.layout.select(sent.rows)
    assert torch.equal(selected.query_starts, sft().layout.select(sft().rows).query_starts)
    assert selected is not sent.layout.select(sent.rows.clone())


@pytest.mark.parametrize("kind", ["sft", "rm", "grpo"])
def test_training_is_the_same_from_a_buffer(
    make, kind, metrics, fingerprint, tmp_path, monkeypatch
):
    plain = make(kind, run="plain")
    plain.train()
    monkeypatch.setattr(
        prefetch.Placement, "send", lambda self, batch: lambda: self.send_parcel(batch)().batch
    )
    packed = make(kind, run="packed")
    packed.train()
    assert fingerprint(plain.model) == fingerprint(packed.model)
    assert metrics(tmp_path / "plain") == metrics(tmp_path / "packed")


@pytest.mark.cuda
@pytest.mark.parametrize("kind", BATCHES)
def test_a_copy_beside_the_computation_arrives_whole(kind):
    place, batch = Placement("cuda", with_schedules), BATCHES[kind]()
    for _ in range(50):  # the memory of the batches before is used again
        parcel = place.send_parcel(batch)()
        found = {name: tensor.clone() for name, tensor in tensors(parcel.batch).items()}
        del parcel
    for name, tensor in tensors(batch).items():
        assert found[name].is_cuda and torch.equal(found[name].cpu(), tensor), name

"""Attention and its gradients in fp64, a block of queries at a time, by the formulas.

The definition in `fastllm.ops` keeps all probabilities, which at 16k tokens is more than a GPU has.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastllm.layout import NO_PREFIX, PackedLayout

from .exact import Inputs, Right, widened

# Probabilities at a time.
ELEMENTS = 1 << 28


def solve(inputs: Inputs, _: tuple[str, ...], gradients: Sequence[Tensor]) -> Right:
    """The output, and the gradients of q, k and v."""
    layout: PackedLayout = inputs["layout"]
    asking = layout.query_rows.long()

    def whole(t: Tensor) -> Tensor:
        """A row for every token; those that do not ask have no gradient either."""
        room = t.new_zeros((layout.total_tokens, *t.shape[1:]), dtype=torch.float64)
        return room.index_copy_(0, asking, widened(t))

    q, k, v = whole(inputs["q"]), widened(inputs["k"]), widened(inputs["v"])
    dout = whole(gradients[0]) if gradients else None
    found = _Solution(q, k, v, dout)
    for segment in range(layout.num_segments):
        seen = _rows(layout, segment)
        if layout.prefix_of[segment] != NO_PREFIX:
            seen = torch.cat((_rows(layout, layout.prefix_of[segment]), seen))
        seen = seen.to(q.device)
        own = layout.lengths[segment]
        for asked in seen[len(seen) - own :].split(max(1, ELEMENTS // max(1, len(seen)))):
            found.add(asked, seen, layout.positions.long(), inputs.get("window"))
    back = () if dout is None else (found.dq[asking], found.dk, found.dv)
    return Right((found.out[asking],), back)


def _rows(layout: PackedLayout, segment: int) -> Tensor:
    return torch.arange(layout.offsets[segment], layout.offsets[segment + 1])


class _Solution:
    def __init__(self, q: Tensor, k: Tensor, v: Tensor, dout: Tensor | None) -> None:
        self.q, self.k, self.v, self.dout = q, k, v, dout
        self.out, self.dq = torch.full_like(q, float("nan")), torch.zeros_like(q)
        self.dk, self.dv = torch.zeros_like(k), torch.zeros_like(v)
        self.scale = q.shape[-1] ** -0.5
        self.share = q.shape[1] // k.shape[1]

    def add(self, asked: Tensor, seen: Tensor, positions: Tensor, window: int | None) -> None:
        """What some queries of a segment see, and give back, one head after another."""
        distance = positions[asked][:, None] - positions[seen]
        hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
        for head in range(self.q.shape[1]):
            source = head // self.share
            q, k, v = self.q[asked, head], self.k[seen, source], self.v[seen, source]
            p = (q @ k.t() * self.scale).masked_fill_(hidden, -torch.inf).softmax(-1)
            out = p @ v
            self.out[asked, head] = out
            if self.dout is None:
                continue
            dout = self.dout[asked, head]
            self.dv[seen, source] += p.t() @ dout
            ds = p * (dout @ v.t() - (dout * out).sum(-1, keepdim=True)) * self.scale
            self.dq[asked, head] = ds @ k
            self.dk[seen, source] += ds.t() @ q

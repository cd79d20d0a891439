"""Norms and rotation of queries and keys, there and back, on the raw kernels.

Where the heads are normalised, what the projections made is kept and its norm and rotation are
computed again for the backward pass: together they cost one pass over memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from ..ops.rms_norm import as_weight
from ..ops.rope import one_launch, rotate


@dataclass
class HeadTurn:
    """What happens to the heads between their projections and attention."""

    raw: SimpleNamespace
    rotary: tuple[Tensor, Tensor]
    positions: Tensor
    """Of the queries."""
    k_positions: Tensor | None
    """Of the keys, where they are of other tokens."""
    norms: tuple[Tensor, Tensor] | None
    """Weights of the norms of the queries and the keys."""
    eps: float

    def there(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """q [N, H, D], k [T, K, D] as attention reads them."""
        if self.norms is None:
            return rotate(self.raw.rope, q, k, *self._angles)
        if one_launch(self.raw.rope):
            return rotate(self.raw.rope, q, k, *self._angles, *self.norms, eps=self.eps)
        q, k = (self._normed(x, norm)[0] for x, norm in zip((q, k), self.norms, strict=True))
        return rotate(self.raw.rope, q, k, *self._angles)

    def back(
        self, dq: Tensor, dk: Tensor, q: Tensor, k: Tensor, weight_grads: tuple[bool, bool]
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Gradients of q, k and the weights of their norms.

        Args:
            dq, dk: of what attention read.
            q, k: what `there` was given; only looked at where there are norms.
            weight_grads: for which of the norms a gradient is wanted.
        """
        if self.norms is None:
            return *rotate(self.raw.rope, dq, dk, *self._angles, inverse=True), None, None
        if not one_launch(self.raw.rope):
            dq, dk = rotate(self.raw.rope, dq, dk, *self._angles, inverse=True)
            dq, dq_norm = self._norm_back(dq, q, self.norms[0], weight_grads[0])
            dk, dk_norm = self._norm_back(dk, k, self.norms[1], weight_grads[1])
            return dq, dk, dq_norm, dk_norm
        given = dq, dk, q, k, *self._angles, *self.norms, self.eps, any(weight_grads)
        dq, dk, found = self.raw.rope.backward(*given)
        dq_norm, dk_norm = (
            found[i].to(norm.dtype) if weight_grads[i] else None
            for i, norm in enumerate(self.norms)
        )
        return dq, dk, dq_norm, dk_norm

    @property
    def _angles(self) -> tuple[Any, ...]:
        return *self.rotary, self.positions, self.k_positions

    def _normed(self, x: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
        """Every head of x over its root mean square, and that [T * heads]."""
        kernels = self.raw.rms_norm
        weight = as_weight(norm, x.dtype, kernels)
        y, _, rstd = kernels.forward(x.view(-1, x.shape[2]), weight, self.eps, None)
        return y.view_as(x), rstd

    def _norm_back(
        self, dy: Tensor, x: Tensor, norm: Tensor, weight_grad: bool
    ) -> tuple[Tensor, Tensor | None]:
        kernels, rows = self.raw.rms_norm, x.view(-1, x.shape[2])
        rstd, weight = self._normed(x, norm)[1], as_weight(norm, x.dtype, kernels)
        dx, dnorm = kernels.backward(dy.view_as(rows), None, rows, weight, rstd, weight_grad)
        return dx.view_as(x), dnorm.to(norm.dtype) if weight_grad else None

"""A reward model's head, its pairwise loss and what is logged of it: one launch, one for gradients.

A batch has few scored rows, so the cost is the launches and the wait for memory, not the traffic:
one program reads all rows, keeps their scores, and goes on with the pairs. Beyond what one
processor reads in a few microseconds, the scores get a launch of their own, on all processors.

Which pairs a row belongs to is found by comparing every row with every pair: each sum then has a
fixed order, also where a row is part of several pairs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import config
from .launch import launch, on_tensor_device
from .numerics import narrow
from .pairwise_loss import pair_loss

TUNABLE = {
    "reward_scores_kernel": {
        "ROWS": (4, 8, 16),
        "BLOCK": (128, 256, 512),
        "STAGES": (1, 2, 3),
        "num_warps": (2, 4, 8),
        "num_stages": (1,),
    },
    "reward_loss_kernel": {
        "ROWS": (16, 32, 64, 128),
        "BLOCK": (128, 256, 512),
        "STAGES": (1, 2, 3, 4),
        "num_warps": (8, 16, 32),
        "num_stages": (1,),
    },
    "reward_backward_kernel": {
        "ROWS": (16, 32, 64),
        "BLOCK": (32, 64, 128),
        "num_warps": (2, 4, 8),
        "num_stages": (1,),
    },
}
# What one processor reads while a second launch would start: 5 us at 90 GB/s.
_BYTES_OF_ONE_PROGRAM = 1 << 19


@on_tensor_device
def forward(
    hidden: Tensor,
    weight: Tensor,
    chosen: Tensor,
    rejected: Tensor,
    margin: Tensor | None,
    centering: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss of `pairwise_loss.forward` on scores hidden weight.

    Args:
        hidden: [N, C], rows of any stride; weight: [C].
        chosen, rejected: row of each side of each pair [P], int64; margin: [P], fp32, or None.

    Returns:
        The loss []; the scores [N]; over the pairs, how many are in the right order, the sum of
        chosen - rejected, over the scores the smallest, over the pairs the sum of
        (chosen + rejected) / 2, over the scores the largest [5]; and the gradient of the loss with
        respect to the scores [N]. All fp32.
    """
    rows, channels = hidden.shape
    loss = torch.empty((), dtype=torch.float32, device=hidden.device)
    metrics = torch.empty(5, dtype=torch.float32, device=hidden.device)
    scores = torch.empty(rows, dtype=torch.float32, device=hidden.device)
    dscores = torch.empty_like(scores)
    scored = rows * channels * hidden.element_size() > _BYTES_OF_ONE_PROGRAM
    if scored:
        constants = config("reward_scores_kernel", hidden.dtype, channels)
        launch(
            reward_scores_kernel,
            (-(-rows // constants["ROWS"]),),
            hidden,
            weight,
            scores,
            hidden.stride(0),
            channels,
            rows,
            **constants,
        )
    launch(
        reward_loss_kernel,
        (-(-rows // COMPARED.value) if scored else 1,),
        hidden,
        weight,
        chosen,
        rejected,
        margin,
        loss,
        scores,
        metrics,
        dscores,
        hidden.stride(0),
        channels,
        rows,
        chosen.numel(),
        centering,
        SCORED=scored,
        **config("reward_loss_kernel", hidden.dtype, rows),
    )
    return loss, scores, metrics, dscores


@on_tensor_device
def backward(
    dloss: Tensor, dscores: Tensor, hidden: Tensor, weight: Tensor, needs_weight: bool
) -> tuple[Tensor, Tensor]:
    """dloss times the gradients.

    Args:
        dloss: scalar, fp32; dscores: what `forward` returned [N].
        hidden, weight: as given to `forward`.

    Returns:
        dhidden [N, C]; dweight [C], fp32, empty unless `needs_weight`.
    """
    rows, channels = hidden.shape
    dhidden = torch.empty((rows, channels), dtype=hidden.dtype, device=hidden.device)
    size = channels if needs_weight else 0
    dweight = torch.empty(size, dtype=torch.float32, device=hidden.device)
    constants = config("reward_backward_kernel", hidden.dtype, rows)
    launch(
        reward_backward_kernel,
        (-(-channels // constants["BLOCK"]),),
        dloss,
        dscores,
        hidden,
        weight,
        dhidden,
        dweight,
        hidden.stride(0),
        channels,
        rows,
        NEEDS_WEIGHT=needs_weight,
        **constants,
    )
    return dhidden, dweight


# Rows and pairs that are compared at a time.
COMPARED = tl.constexpr(128)
PAIRS = tl.constexpr(64)


@triton.jit(do_not_specialize=["num_rows"])
def reward_scores_kernel(
    hidden_ptr,
    weight_ptr,
    scores_ptr,
    row_stride,
    channels,
    num_rows,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * ROWS
    last = tl.minimum(first + ROWS, num_rows)
    write_scores(
        hidden_ptr, weight_ptr, scores_ptr, row_stride, channels, first, last, ROWS, BLOCK, STAGES
    )


@triton.jit(do_not_specialize=["num_rows", "num_pairs", "centering"])
def reward_loss_kernel(
    hidden_ptr,
    weight_ptr,
    chosen_ptr,
    rejected_ptr,
    margin_ptr,
    loss_ptr,
    scores_ptr,
    metrics_ptr,
    dscores_ptr,
    row_stride,
    channels,
    num_rows,
    num_pairs,
    centering,
    SCORED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    centering = tl.cast(centering, tl.float32)
    if not SCORED:
        write_scores(
            hidden_ptr, weight_ptr, scores_ptr, row_stride, channels, 0, num_rows,
            ROWS, BLOCK, STAGES,
        )  # fmt: skip
        tl.debug_barrier()  # every thread may read every score

    for first in range(program * COMPARED, num_rows, programs * COMPARED):
        rows = first + tl.arange(0, COMPARED)
        dscores = tl.zeros((COMPARED,), tl.float32)
        for first_pair in range(0, num_pairs, PAIRS):
            chosen, rejected, mask, better, worse, margin = pairs_from(
                first_pair, chosen_ptr, rejected_ptr, margin_ptr, scores_ptr, num_pairs
            )
            _, dchosen, drejected = pair_loss(better, worse, better - worse - margin, centering)
            of_chosen = tl.where(rows[:, None] == chosen[None, :], dchosen[None, :], 0.0)
            of_rejected = tl.where(rows[:, None] == rejected[None, :], drejected[None, :], 0.0)
            both = tl.where(mask[None, :], of_chosen + of_rejected, 0.0)
            dscores += tl.sum(both, axis=1)
        tl.store(dscores_ptr + rows, dscores / num_pairs, mask=rows < num_rows)

    if program == 0:
        losses = tl.zeros((PAIRS,), tl.float32)
        right = tl.zeros((PAIRS,), tl.float32)
        gaps = tl.zeros((PAIRS,), tl.float32)
        means = tl.zeros((PAIRS,), tl.float32)
        for first_pair in range(0, num_pairs, PAIRS):
            chosen, rejected, mask, better, worse, margin = pairs_from(
                first_pair, chosen_ptr, rejected_ptr, margin_ptr, scores_ptr, num_pairs
            )
            gap = better - worse
            loss, _, _ = pair_loss(better, worse, gap - margin, centering)
            losses += tl.where(mask, loss, 0.0)
            right += tl.where(mask & (gap > 0), 1.0, 0.0)
            gaps += tl.where(mask, gap, 0.0)
            means += tl.where(mask, better + worse, 0.0)
        smallest = tl.full((COMPARED,), float("inf"), tl.float32)
        largest = tl.full((COMPARED,), float("-inf"), tl.float32)
        for first_row in range(0, num_rows, COMPARED):
            row = first_row + tl.arange(0, COMPARED)
            score = tl.load(scores_ptr + row, mask=row < num_rows, other=float("nan"))
            smallest, largest = tl.minimum(smallest, score), tl.maximum(largest, score)
        tl.store(loss_ptr, tl.sum(losses, axis=0) / num_pairs)
        tl.store(metrics_ptr, tl.sum(right, axis=0))
        tl.store(metrics_ptr + 1, tl.sum(gaps, axis=0))
        tl.store(metrics_ptr + 2, tl.min(smallest, axis=0))
        tl.store(metrics_ptr + 3, tl.sum(means, axis=0) * 0.5)
        tl.store(metrics_ptr + 4, tl.max(largest, axis=0))


@triton.jit(do_not_specialize=["num_rows"])
def reward_backward_kernel(
    dloss_ptr,
    dscores_ptr,
    hidden_ptr,
    weight_ptr,
    dhidden_ptr,
    dweight_ptr,
    row_stride,
    channels,
    num_rows,
    NEEDS_WEIGHT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    columns = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < channels
    dloss = tl.load(dloss_ptr).to(tl.float32)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in range(0, num_rows, ROWS):
        rows = first + tl.arange(0, ROWS).to(tl.int64)
        mask = (rows < num_rows)[:, None] & inside[None, :]
        dscores = dloss * tl.load(dscores_ptr + rows, mask=rows < num_rows, other=0.0)
        if NEEDS_WEIGHT:
            hidden = hidden_ptr + rows[:, None] * row_stride + columns[None, :]
            total += dscores[:, None] * tl.load(hidden, mask=mask, other=0.0).to(tl.float32)
        dhidden = narrow(dscores[:, None] * weight[None, :], dhidden_ptr.dtype.element_ty)
        tl.store(dhidden_ptr + rows[:, None] * channels + columns[None, :], dhidden, mask=mask)
    if NEEDS_WEIGHT:
        tl.store(dweight_ptr + columns, tl.sum(total, axis=0), mask=inside)


@triton.jit
def write_scores(
    hidden_ptr,
    weight_ptr,
    scores_ptr,
    row_stride,
    channels,
    first_row,
    last_row,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Scores of some rows; one loop over all tiles, so that the next one is always on its way."""
    tiles = tl.cdiv(channels, BLOCK)
    score = tl.zeros((ROWS,), tl.float32)
    for step in tl.range(0, tl.cdiv(last_row - first_row, ROWS) * tiles, num_stages=STAGES):
        tile = step % tiles
        rows = first_row + (step // tiles) * ROWS + tl.arange(0, ROWS).to(tl.int64)
        columns = tile * BLOCK + tl.arange(0, BLOCK)
        mask = (rows < last_row)[:, None] & (columns < channels)[None, :]
        pointers = hidden_ptr + rows[:, None] * row_stride + columns[None, :]
        hidden = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + columns, mask=columns < channels, other=0.0).to(tl.float32)
        score += tl.sum(hidden * weight[None, :], axis=1)
        tl.store(scores_ptr + rows, score, mask=rows < last_row)  # the last one stays
        score = tl.where(tile + 1 < tiles, score, 0.0)


@triton.jit
def pairs_from(first, chosen_ptr, rejected_ptr, margin_ptr, scores_ptr, num_pairs):
    """Rows, mask, scores and margins of some pairs."""
    pairs = first + tl.arange(0, PAIRS)
    mask = pairs < num_pairs
    chosen = tl.load(chosen_ptr + pairs, mask=mask, other=0)
    rejected = tl.load(rejected_ptr + pairs, mask=mask, other=0)
    margin = tl.zeros((PAIRS,), tl.float32)
    if margin_ptr is not None:
        margin = tl.load(margin_ptr + pairs, mask=mask, other=0.0).to(tl.float32)
    better = tl.load(scores_ptr + chosen, mask=mask, other=0.0)
    worse = tl.load(scores_ptr + rejected, mask=mask, other=0.0)
    return chosen, rejected, mask, better, worse, margin

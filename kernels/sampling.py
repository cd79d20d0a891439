"""Drawing one token for each row of logits, and moving the rows on to their next token.

The logits are read once: programs of a few thousand tokens each leave the sums of a softmax, and a
second kernel finds among them where the cumulative distribution passes a row's uniform number. How
a row is divided depends on the vocabulary alone, so a row draws the same token in any company.
Nothing waits for the host: a CUDA graph can replay it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import config
from .launch import launch, on_tensor_device
from .numerics import LN2, LOG2E, LOWEST

# The constants of SplitMix64 (Steele, Lea and Flood, 2014).
GOLDEN = tl.constexpr(0x9E3779B97F4A7C15)
MIX_1 = tl.constexpr(0xBF58476D1CE4E5B9)
MIX_2 = tl.constexpr(0x94D049BB133111EB)

# Tokens of a block of the cache.
CACHE_BLOCK = tl.constexpr(64)

TUNABLE = {
    "softmax_sums_kernel": {"BLOCK": (2048, 4096, 8192), "num_warps": (4, 8)},
    "pick_kernel": {"num_warps": (4, 8)},
}


@on_tensor_device
def draw(
    logits: Tensor,
    temperature: Tensor,
    repetition_penalty: Tensor,
    key: Tensor,
    count: Tensor,
    min_count: Tensor,
    stop_tokens: Tensor,
    seen: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw one token for each row.

    Args:
        logits: [B, V], fp32.
        temperature: [B], fp32; 0 takes the likeliest token.
        repetition_penalty: [B], fp32.
        key: stream of random numbers [B], int64.
        count: tokens drawn so far [B], int32.
        min_count: with fewer, no stop token is drawn [B], int32.
        stop_tokens: [B, S], int32; -1 where there is none.
        seen: tokens that the repetition penalty is for [B, V], uint8; [B, 0] for none.

    Returns:
        Tokens [B], int64; their log-probabilities under temperature alone [B], and under the
        distribution that they were drawn from [B], fp32: 0 where the likeliest was taken.
    """
    rows, vocabulary = logits.shape
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    logprobs = torch.empty((2, rows), dtype=torch.float32, device=logits.device)
    if not rows:
        return tokens, logprobs[0], logprobs[1]
    constants = config("softmax_sums_kernel", logits.dtype, vocabulary)
    block, penalised = constants["BLOCK"], seen.shape[1] > 0
    chunks = triton.cdiv(vocabulary, block)
    sums = torch.empty((4, rows, chunks), dtype=torch.float32, device=logits.device)
    likeliest = torch.empty((rows, chunks), dtype=torch.int32, device=logits.device)
    how = (
        temperature,
        repetition_penalty,
        count,
        min_count,
        stop_tokens,
        seen if penalised else None,
        sums,
        likeliest,
        rows,
        vocabulary,
        stop_tokens.shape[1],
        chunks,
    )
    launch(softmax_sums_kernel, (rows * chunks,), logits, *how, PENALISED=penalised, **constants)
    launch(
        pick_kernel,
        (rows,),
        logits,
        *how,
        key,
        tokens,
        logprobs,
        PENALISED=penalised,
        BLOCK=block,
        CHUNKS=triton.next_power_of_2(chunks),
        **config("pick_kernel", logits.dtype, vocabulary),
    )
    return tokens, logprobs[0], logprobs[1]


@on_tensor_device
def advance_(
    drawn: Tensor,
    logprobs: Tensor,
    sampling_logprobs: Tensor,
    used: Tensor,
    token: Tensor,
    state: Tensor,
    max_count: Tensor,
    stop_tokens: Tensor,
    tail_blocks: Tensor,
    seen: Tensor,
    out: Tensor,
) -> None:
    """Note what was drawn, and move the rows that have not ended to their next token.

    Args:
        drawn: [B], int64.
        logprobs, sampling_logprobs: [B], fp32.
        used: rows in use [1], int32; those after them do what the last one does.
        token: the newest token of each row [B], int64.
        state: [7, B], int32: position of that token, tokens of the tail with it, block and place
            where it goes, tokens drawn so far, 1 where the row has not ended, steps so far.
        max_count: the token that is the last one [B], int32.
        stop_tokens: tokens that end a row [B, S], int32; -1 where there is none.
        tail_blocks: [B, J], int32.
        seen: tokens that the repetition penalty is for [B, V], uint8, or [B, 0].
        out: gets the step's tokens and log-probabilities [steps, 3, B], int32 (the bits of fp32).
    """
    rows = drawn.numel()
    if not rows:
        return
    launch(
        advance_kernel,
        (triton.cdiv(rows, 128),),
        drawn,
        logprobs,
        sampling_logprobs,
        used,
        token,
        state,
        max_count,
        stop_tokens,
        tail_blocks,
        seen if seen.shape[1] else None,
        out,
        rows,
        stop_tokens.shape[1],
        tail_blocks.shape[1],
        seen.shape[1],
        PENALISED=seen.shape[1] > 0,
        BLOCK=128,
        num_warps=4,
        num_stages=1,
    )


@triton.jit(do_not_specialize=["num_rows", "num_stops", "num_chunks"])
def softmax_sums_kernel(
    logits_ptr,
    temperature_ptr,
    penalty_ptr,
    count_ptr,
    min_count_ptr,
    stops_ptr,
    seen_ptr,
    sums_ptr,
    likeliest_ptr,
    num_rows,
    vocabulary,
    num_stops,
    num_chunks,
    PENALISED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Maximum and sum of a chunk of a row, under temperature alone and as it is drawn from, and the
    likeliest of its tokens."""
    program = tl.program_id(0).to(tl.int64)
    row, chunk = program // num_chunks, (program % num_chunks).to(tl.int32)
    tokens = chunk * BLOCK + tl.arange(0, BLOCK)
    z, scores = read_scores(
        logits_ptr, temperature_ptr, penalty_ptr, count_ptr, min_count_ptr, stops_ptr, seen_ptr,
        row, tokens, vocabulary, num_stops, PENALISED,
    )  # fmt: skip
    top, total = softmax_sum(z)
    place, size = row * num_chunks + chunk, num_rows * num_chunks
    tl.store(sums_ptr + place, top)
    tl.store(sums_ptr + size + place, total)
    top, total = softmax_sum(scores)
    tl.store(sums_ptr + 2 * size + place, top)
    tl.store(sums_ptr + 3 * size + place, total)
    tl.store(likeliest_ptr + place, chunk * BLOCK + tl.argmax(scores, axis=0))


@triton.jit(do_not_specialize=["num_rows", "num_stops", "num_chunks"])
def pick_kernel(
    logits_ptr,
    temperature_ptr,
    penalty_ptr,
    count_ptr,
    min_count_ptr,
    stops_ptr,
    seen_ptr,
    sums_ptr,
    likeliest_ptr,
    num_rows,
    vocabulary,
    num_stops,
    num_chunks,
    key_ptr,
    tokens_ptr,
    logprobs_ptr,
    PENALISED: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    greedy = tl.load(temperature_ptr + row) == 0
    chunks = tl.arange(0, CHUNKS)
    places, size = row * num_chunks + chunks, num_rows * num_chunks
    there = chunks < num_chunks
    _, _, lse_z = read_sums(sums_ptr + places, size, there)
    top, weights, lse = read_sums(sums_ptr + 2 * size + places, size, there)

    # The chunk in which the cumulative distribution passes the uniform number, then the token.
    share = uniform(tl.load(key_ptr + row), tl.load(count_ptr + row))
    target = share * tl.sum(weights, axis=0)
    chunk = passing(tl.cumsum(weights, axis=0), weights, target, chunks, CHUNKS)
    before = tl.sum(tl.where(chunks < chunk, weights, 0.0), axis=0)
    places_in = tl.arange(0, BLOCK)
    _, scores = read_scores(
        logits_ptr, temperature_ptr, penalty_ptr, count_ptr, min_count_ptr, stops_ptr, seen_ptr,
        row, chunk * BLOCK + places_in, vocabulary, num_stops, PENALISED,
    )  # fmt: skip
    p = tl.exp2((scores - top) * LOG2E)
    place = passing(tl.cumsum(p, axis=0) + before, p, target, places_in, BLOCK)
    score = tl.sum(tl.where(places_in == place, scores, 0.0), axis=0)

    tops = tl.load(sums_ptr + 2 * size + places, mask=there, other=float("-inf"))
    best = tl.argmax(tops, axis=0)
    likeliest = tl.load(likeliest_ptr + row * num_chunks + best)
    token = tl.where(greedy, likeliest, chunk * BLOCK + place)
    # Where logits are NaN any token would do, but one that there is.
    token = tl.minimum(token, vocabulary - 1)
    temperature = tl.where(greedy, 1.0, tl.load(temperature_ptr + row))
    z = tl.load(logits_ptr + row * vocabulary + token) * (1.0 / temperature)
    tl.store(tokens_ptr + row, token.to(tl.int64))
    tl.store(logprobs_ptr + row, z - lse_z)
    # NaN stays NaN, so that whoever reads it finds out.
    certain = tl.where(lse == lse, 0.0, lse)
    tl.store(logprobs_ptr + num_rows + row, tl.where(greedy, certain, score - lse))


@triton.jit(do_not_specialize=["num_rows", "num_stops", "num_columns"])
def advance_kernel(
    drawn_ptr,
    logprobs_ptr,
    sampling_logprobs_ptr,
    used_ptr,
    token_ptr,
    state_ptr,
    max_count_ptr,
    stops_ptr,
    tail_blocks_ptr,
    seen_ptr,
    out_ptr,
    num_rows,
    num_stops,
    num_columns,
    vocabulary,
    PENALISED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = rows < num_rows
    source = tl.minimum(rows, tl.load(used_ptr) - 1)
    drawn = tl.load(drawn_ptr + source, mask=there, other=0)
    step = tl.load(state_ptr + 6 * num_rows + rows, mask=there, other=0)
    to = out_ptr + step * 3 * num_rows + rows
    tl.store(to, drawn.to(tl.int32), mask=there)
    for which in tl.static_range(2):
        column = logprobs_ptr if which == 0 else sampling_logprobs_ptr
        logp = tl.load(column + source, mask=there, other=0.0)
        tl.store(to + (which + 1) * num_rows, logp.to(tl.int32, bitcast=True), mask=there)
    tl.store(state_ptr + 6 * num_rows + rows, step + 1, mask=there)

    count = tl.load(state_ptr + 4 * num_rows + rows, mask=there, other=0) + 1
    ended = count >= tl.load(max_count_ptr + rows, mask=there, other=0)
    for stop in range(0, num_stops):
        stops = tl.load(stops_ptr + rows * num_stops + stop, mask=there, other=-1)
        ended = ended | (stops == drawn)
    lives = there & (tl.load(state_ptr + 5 * num_rows + rows, mask=there, other=0) > 0)
    if PENALISED:
        tl.store(seen_ptr + rows * vocabulary + drawn, 1, mask=lives)
    # Who has ended draws his last token again and again, from the same keys.
    tl.store(state_ptr + 5 * num_rows + rows, 0, mask=there & ended)
    lives = lives & (ended == 0)
    tl.store(token_ptr + rows, drawn, mask=lives)
    position = tl.load(state_ptr + rows, mask=lives, other=0)
    tl.store(state_ptr + rows, position + 1, mask=lives)
    length = tl.load(state_ptr + num_rows + rows, mask=lives, other=0)
    tl.store(state_ptr + num_rows + rows, length + 1, mask=lives)
    column = tl.minimum(length // CACHE_BLOCK, num_columns - 1)
    blocks = tail_blocks_ptr + rows * num_columns + column
    tl.store(state_ptr + 2 * num_rows + rows, tl.load(blocks, mask=lives, other=0), mask=lives)
    tl.store(state_ptr + 3 * num_rows + rows, length % CACHE_BLOCK, mask=lives)
    tl.store(state_ptr + 4 * num_rows + rows, count, mask=lives)


@triton.jit
def read_scores(
    logits_ptr,
    temperature_ptr,
    penalty_ptr,
    count_ptr,
    min_count_ptr,
    stops_ptr,
    seen_ptr,
    row,
    tokens,
    vocabulary,
    num_stops,
    PENALISED: tl.constexpr,
):
    """Logits over the temperature, as they are and as a token is drawn from them."""
    temperature = tl.load(temperature_ptr + row)
    inverse = 1.0 / tl.where(temperature == 0, 1.0, temperature)
    there = tokens < vocabulary
    logits = tl.load(logits_ptr + row * vocabulary + tokens, mask=there, other=float("-inf")).to(
        tl.float32
    )
    scores = logits
    if PENALISED:
        penalty = tl.load(penalty_ptr + row)
        seen = tl.load(seen_ptr + row * vocabulary + tokens, mask=there, other=0)
        penalised = tl.where(logits < 0, logits * penalty, logits / penalty)
        scores = tl.where(seen != 0, penalised, logits)
    # Rows that are too short to end.
    bans = tl.where(tl.load(count_ptr + row) < tl.load(min_count_ptr + row), num_stops, 0)
    for stop in range(0, bans):
        banned = tl.load(stops_ptr + row * num_stops + stop)
        scores = tl.where(tokens == banned, float("-inf"), scores)
    return logits * inverse, scores * inverse


@triton.jit
def softmax_sum(scores):
    """Maximum of scores, and sum of their exponentials relative to it."""
    top = tl.max(scores, axis=0)
    # LOWEST: where nothing is possible, exp2(-inf) and not exp2(-inf - -inf).
    return top, tl.sum(tl.exp2((scores - tl.maximum(top, LOWEST)) * LOG2E), axis=0)


@triton.jit
def read_sums(ptr, size, there):
    """Of all chunks: the maximum, their sums relative to it, and the log-sum-exp."""
    tops = tl.load(ptr, mask=there, other=float("-inf"))
    top = tl.maximum(tl.max(tops, axis=0), LOWEST)
    weights = tl.load(ptr + size, mask=there, other=0.0) * tl.exp2((tops - top) * LOG2E)
    return top, weights, top + tl.log2(tl.sum(weights, axis=0)) * LN2


@triton.jit
def passing(cumulative, weights, target, places, SIZE: tl.constexpr):
    """The first place whose weight is not 0 and whose sum passes the target; where rounding leaves
    none, the last whose weight is not 0."""
    possible = weights > 0
    first = tl.min(tl.where(possible & (cumulative > target), places, SIZE), axis=0)
    last = tl.max(tl.where(possible, places, 0), axis=0)
    return tl.where(first < SIZE, first, last)


@triton.jit
def uniform(key, count):
    """The count-th number in [0, 1) of a stream: as many bits as an fp32 holds."""
    x = key.to(tl.uint64) + count.to(tl.uint64) * GOLDEN + GOLDEN
    x = (x ^ (x >> 30)) * MIX_1
    x = (x ^ (x >> 27)) * MIX_2
    x = x ^ (x >> 31)
    return (x >> 40).to(tl.int32).to(tl.float32) * (1.0 / 16777216.0)

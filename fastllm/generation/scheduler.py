"""Who runs: sequences join the batch and leave it at any token, within the cache's budget.

Sequences wait in the order in which they were asked for. When the cache is full, the one that
joined last gives its blocks back and waits, with the tokens that it has drawn, at the head of the
line. Each request fits the budget alone, so somebody always runs.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterator

import numpy as np

from .batch import RunningBatch
from .cache import BLOCK, BlockCache, blocks_of
from .prefill import Prefill
from .requests import Request, Sequence
from .transcript import Transcript

# A prefill for every row that comes free would stop the whole batch each time.
_REFILL_SHARE = 8


class Scheduler:
    """Decides who joins the running batch, who gets blocks, and who has to wait.

    Args:
        batch, cache, transcript: what the sequences run in.
        most_rows: sequences that run at a time; None for all.
        prefill_tokens: tokens computed in one pass; a longer prompt has a pass of its own.
    """

    def __init__(
        self,
        batch: RunningBatch,
        cache: BlockCache,
        transcript: Transcript,
        most_rows: int | None,
        prefill_tokens: int,
    ) -> None:
        self._batch, self._cache, self._transcript = batch, cache, transcript
        self._most_rows = sys.maxsize if most_rows is None else most_rows
        self._prefill_tokens = prefill_tokens
        self._waiting: deque[Sequence] = deque()
        self._stored: dict[int, Request] = {}
        self._joined = 0
        self._demand = self._longest_tail = self._longest_prompt = 0

    # -- requests ------------------------------------------------------------------------------

    def add(self, request: Request, keys: list[int]) -> None:
        """Put the sequences of a request in line, one for each key.

        Raises:
            ValueError: a sequence that would not fit the budget if it ran alone.
        """
        needed = request.prompt_blocks + request.tail_blocks
        if needed > self._cache.most_blocks:
            raise ValueError(
                f"cache_bytes: a prompt of {len(request.prompt)} tokens with max_new_tokens "
                f"{request.params.max_new_tokens} needs {needed * self._cache.block_bytes:,} "
                f"bytes; expected at least that, found {self._cache.most_bytes:,}"
            )
        request.not_begun = request.unfinished = len(keys)
        self._waiting.extend(Sequence(request, index, key) for index, key in enumerate(keys))
        self._demand += self._worst_case(request)
        self._longest_tail = max(self._longest_tail, request.tail_blocks)
        self._longest_prompt = max(self._longest_prompt, request.prompt_blocks)
        self._transcript.make_room(request.params.max_new_tokens)

    def drop(self, request: Request) -> None:
        """Forget a request: what waits and what runs."""
        self._waiting = deque(s for s in self._waiting if s.request is not request)
        request.not_begun = 0
        rows = [row for row, s in enumerate(self._batch.sequences) if s.request is request]
        if rows:
            self.leave(np.array(rows))
        self._discard(request)
        self._demand -= self._worst_case(request)
        request.unfinished = 0

    # -- joining -------------------------------------------------------------------------------

    def join(self) -> tuple[Prefill, bool]:
        """Let waiting sequences join the batch where there is room.

        Returns:
            What has to be computed before they can draw a token, and whether anybody joined.
        """
        if not self._waiting or self._batch.size == self._most_rows:
            return Prefill(), False
        self._make_pool()
        joining = list(self._next_in_line())
        prefill = Prefill()
        for sequence in joining:
            self._waiting.popleft()
            self._seat(sequence, prefill)
        if joining:
            self._batch.regroup()
        return prefill, bool(joining)

    def _next_in_line(self) -> Iterator[Sequence]:
        """The sequences that may join now."""
        places = self._most_rows - self._batch.size
        running = self._batch.size > 0
        may_prefill = not running or places >= max(1, self._most_rows // _REFILL_SHARE)
        computed: set[Request] = set()
        stored: set[Request] = set()
        tokens, blocks = 0, self._headroom()
        for number, sequence in enumerate(self._waiting):
            request = sequence.request
            more_tokens = self._tokens_to_compute(sequence, computed)
            if number == places or (more_tokens and not may_prefill):
                return
            if tokens and more_tokens and tokens + more_tokens > self._prefill_tokens:
                return
            blocks += max(1, blocks_of(sequence.count - 1)) if request.tail_blocks else 0
            if request.blocks is None and request not in stored:
                blocks += request.prompt_blocks
            if blocks > self._cache.free_blocks:
                if running or number:
                    return
                self._discard_unused(but=request)
            if more_tokens:
                computed.add(request)
            stored.add(request)
            tokens += more_tokens
            yield sequence

    def _tokens_to_compute(self, sequence: Sequence, computed: set[Request]) -> int:
        request = sequence.request
        tail = max(sequence.count - 1, 0)
        if not (tail or _prompt_is_needed(sequence)) or (not tail and request in computed):
            return 0
        return tail + (0 if request in computed else len(request.prompt))

    def _headroom(self) -> int:
        """Blocks that the running sequences need within their next 64 tokens."""
        batch, rows = self._batch, slice(self._batch.size)
        return int(np.count_nonzero(batch.max_count[rows] - 1 > batch.owned[rows] * BLOCK))

    def _seat(self, sequence: Sequence, prefill: Prefill) -> None:
        """Give a sequence its row, and note what has to be computed for it."""
        request, batch = sequence.request, self._batch
        tail = max(sequence.count - 1, 0)
        needed = tail > 0 or _prompt_is_needed(sequence)
        if needed and request not in prefill.prompts:
            prefill.prompts.append(request)
            prefill.stored.append(request.blocks is not None)
        if request.blocks is None:
            request.blocks = self._cache.take(request.prompt_blocks)
            self._stored[request.id] = request
        row = batch.append(sequence, self._transcript.take(sequence.tokens))
        sequence.joined = self._joined
        self._joined += 1
        if tail:
            blocks = self._cache.take(blocks_of(tail))
            batch.tail_blocks[row, : len(blocks)] = blocks
            batch.owned[row] = len(blocks)
            prefill.returning.append((sequence, blocks))

    # -- room for the next tokens --------------------------------------------------------------

    def reserve(self, steps: int) -> tuple[int, int]:
        """Take blocks for the next tokens of every row, at most `steps`.

        Rows that joined last leave when there are not enough, until the next token of each of
        the others fits.

        Returns:
            How many tokens every row has room for, and how many rows had to leave.
        """
        batch, preempted = self._batch, 0
        missing = self._missing(steps)
        if missing.sum() > self._cache.free_blocks:
            # As far as everybody comes in the blocks that he has.
            room = batch.owned * BLOCK - batch.tail_length
            steps = max(1, min(steps, int(room[: batch.size].min())))
            while (missing := self._missing(steps)).sum() > self._cache.free_blocks:
                if not self._discard_unused():
                    self._preempt()
                    preempted += 1
        while (rows := np.flatnonzero(missing > 0)).size:
            batch.tail_blocks[rows, batch.owned[rows]] = self._cache.take(rows.size)
            batch.owned[rows] += 1
            missing[rows] -= 1
        return steps, preempted

    def _missing(self, steps: int) -> np.ndarray:
        """Blocks that each row lacks for so many more tokens, or those that it has left [B]."""
        batch, rows = self._batch, slice(self._batch.size)
        left = batch.max_count[rows] - batch.count[rows]
        ends = batch.tail_length[rows] + np.minimum(steps, left) + (BLOCK - 1)
        return np.maximum(ends // BLOCK - batch.owned[rows], 0)

    def _preempt(self) -> None:
        """The sequence that joined last waits, with its tokens, until there is room again."""
        batch = self._batch
        row = max(range(batch.size), key=lambda r: batch.sequences[r].joined)
        sequence = batch.sequences[row]
        sequence.tokens = self._transcript.of(int(batch.place[row]), int(batch.count[row]))
        self.leave(np.array([row]))
        self._waiting.appendleft(sequence)

    # -- leaving -------------------------------------------------------------------------------

    def leave(self, rows: np.ndarray) -> None:
        """Take rows out of the batch [n], ascending; all that they hold is free at once."""
        batch = self._batch
        for row in rows.tolist():
            self._cache.give_back(batch.tail_blocks[row, : batch.owned[row]])
            self._transcript.give_back(int(batch.place[row]))
        requests = [batch.sequences[row].request for row in rows.tolist()]
        batch.remove(rows)
        for request in requests:
            if not request.running and not request.not_begun:
                self._discard(request)

    def finished(self, sequence: Sequence) -> bool:
        """Count a sequence that has ended; whether it was the last one of its request."""
        request = sequence.request
        request.unfinished -= 1
        if not request.unfinished:
            self._demand -= self._worst_case(request)
        return not request.unfinished

    def _discard(self, request: Request) -> None:
        """Give back the blocks of a prompt."""
        request.logits = None
        if request.blocks is not None:
            self._cache.give_back(request.blocks)
            request.blocks = None
            del self._stored[request.id]

    def _discard_unused(self, but: Request | None = None) -> bool:
        """Give back the prompts that only sequences in line would continue; whether any was."""
        unused = [r for r in self._stored.values() if not r.running and r is not but]
        for request in unused:
            self._discard(request)
        return bool(unused)

    # -- the pool ------------------------------------------------------------------------------

    def _make_pool(self) -> None:
        """Room for the worst case of the requests, as far as the budget goes."""
        rows = self._most_rows
        at_once = rows * self._longest_tail + (rows + 1) * self._longest_prompt
        wanted = min(self._demand, at_once)
        if wanted > self._cache.capacity:
            # Half as much again: requests that come one by one do not copy the pool each time.
            ahead = min(self._cache.capacity * 3 // 2, at_once)
            self._cache.grow(max(wanted, ahead))

    @staticmethod
    def _worst_case(request: Request) -> int:
        copies = request.params.num_return_sequences
        return request.prompt_blocks + copies * request.tail_blocks


def _prompt_is_needed(sequence: Sequence) -> bool:
    """Whether a sequence cannot go on before its prompt is computed."""
    request = sequence.request
    return request.blocks is None or (sequence.count == 0 and request.logits is None)

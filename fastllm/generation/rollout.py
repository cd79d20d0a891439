"""The running batch: sequences join it from packed prefills and leave it when they end."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ..layout import PackedLayout
from ..model import Transformer
from ..ops.linear_logprob import wide_matmul
from .cache import DecodeAttend, KVCache, PrefillAttend
from .sampling import Draw, SamplingParams, sample, uniforms


@dataclass
class Sequences:
    """The state of B sequences: one tensor per property, one element per sequence."""

    index: Tensor
    """Place among the completions, int64."""
    key: Tensor
    """Key of the stream of random numbers, int64."""
    start: Tensor
    """Tokens of the prompt, int32."""
    group: Tensor
    """Number of the prompt in the cache, int32."""
    row: Tensor
    """Tail in the cache, int32; none of them until the sequence runs."""
    token: Tensor
    """The newest token, not yet in the cache, int64."""
    count: Tensor
    """Tokens drawn so far, int32."""
    seen: Tensor
    """Tokens that the repetition penalty is for [B, V], bool; [B, 0] without one."""

    def __len__(self) -> int:
        return self.index.numel()

    def pick(self, which: Tensor | slice) -> Sequences:
        return Sequences(*(getattr(self, field.name)[which] for field in fields(self)))

    def without(self, ended: Tensor) -> Sequences:
        return self.pick((~ended).nonzero().squeeze(1))

    def join(self, others: Sequences) -> Sequences:
        names = [field.name for field in fields(self)]
        return Sequences(*(torch.cat((getattr(self, n), getattr(others, n))) for n in names))


class Rollout:
    """Completes prompts in one batch that requests join and leave at any token.

    Args:
        model: the policy.
        prompts: token ids.
        keys: random stream of each sequence [prompts * copies], int64, prompt-major.
        copies: completions of each prompt.
        params: the distribution to draw from.
        max_new_tokens: longest completion.
        stop_token_ids: tokens that end a sequence.
        max_batch_size: sequences that run at a time; None for all.
        prefill_tokens: prompt tokens computed at a time; a longer prompt has a pass of its own.
    """

    def __init__(
        self,
        model: Transformer,
        prompts: Sequence[Sequence[int]],
        keys: Tensor,
        *,
        copies: int,
        params: SamplingParams,
        max_new_tokens: int,
        stop_token_ids: Sequence[int],
        max_batch_size: int | None,
        prefill_tokens: int,
    ) -> None:
        weight = model.model.embed_tokens.weight
        self._trunk, self._device = model.model, weight.device
        self._head = _head_weight(model)
        self._prompts, self._copies, self._keys = prompts, copies, keys
        self._params, self._max_new_tokens = params, max_new_tokens
        self._stops = torch.tensor(list(stop_token_ids), dtype=torch.int64, device=self._device)
        self._prefill_tokens = prefill_tokens
        rows = min(max_batch_size or len(keys), len(keys))
        self._cache = KVCache(rows, max_new_tokens - 1)
        self._refill_rows = max(1, rows // 8)
        self._waiting = deque(range(len(prompts)))
        self._ready, self._running = self._nobody(), self._nobody()
        self._longest = self._furthest = 0
        self._drawn: list[tuple[Tensor, Draw]] = []

    def run(self) -> list[tuple[Tensor, Draw]]:
        """Complete every prompt.

        Returns:
            Each step's tokens, with the sequences that they belong to: (index [B], Draw), in the
            order in which they were drawn.
        """
        while self._refill():
            self._decode()
        return self._drawn

    # -- joining -------------------------------------------------------------------------------

    def _refill(self) -> bool:
        """Let waiting sequences begin where there is room; whether any runs now."""
        self._begin()
        while self._waiting and not len(self._ready) and self._worth_a_prefill():
            self._prefill(self._next_prompts())
            self._begin()
        return len(self._running) > 0

    def _worth_a_prefill(self) -> bool:
        """A prefill for every row that comes free would stop the whole batch each time."""
        return self._cache.free_rows >= self._refill_rows or not len(self._running)

    def _next_prompts(self) -> list[int]:
        """The next prompts in line: as many as there is room for, within the token budget."""
        wanted = -(-self._cache.free_rows // self._copies)
        chosen = [self._waiting.popleft()]
        tokens = len(self._prompts[chosen[0]])
        while self._waiting and len(chosen) < wanted:
            tokens += len(self._prompts[self._waiting[0]])
            if tokens > self._prefill_tokens:
                break
            chosen.append(self._waiting.popleft())
        return chosen

    def _prefill(self, chosen: list[int]) -> None:
        """Compute prompts in one packed pass, each once, and draw every first token."""
        layout = PackedLayout([len(self._prompts[i]) for i in chosen], device=self._device)
        tokens = self._tensor([token for i in chosen for token in self._prompts[i]])
        last = layout.starts[1:].long() - 1
        attend = PrefillAttend(layout, last)
        logits = self._logits(self._trunk(tokens, attend, last))

        self._running.group = self._cache.keep_prompts(self._running.group)
        begun = self._sequences(chosen, layout, tokens)
        self._cache.append(attend.computed, layout.starts)
        ended = self._draw(begun, logits.repeat_interleave(self._copies, dim=0))
        self._ready = begun.without(ended)

    def _sequences(self, chosen: list[int], layout: PackedLayout, tokens: Tensor) -> Sequences:
        """The sequences of freshly computed prompts, which have no token yet."""
        index = self._tensor(chosen)[:, None] * self._copies
        index = (index + torch.arange(self._copies, device=self._device)).flatten()
        prompt = torch.arange(len(chosen), device=self._device).repeat_interleave(self._copies)
        nothing = torch.zeros_like(index)
        seen = torch.zeros(len(chosen), self._seen_width, dtype=torch.bool, device=self._device)
        if self._params.penalised:
            seen[layout.segments.long(), tokens] = True
        return Sequences(
            index=index,
            key=self._keys[index],
            start=layout.starts.diff()[prompt],
            group=prompt.int() + self._cache.num_prompts,
            row=nothing.int(),
            token=nothing,
            count=nothing.int(),
            seen=seen[prompt],
        )

    def _begin(self) -> None:
        """Give free rows to sequences that have their first token."""
        count = min(self._cache.free_rows, len(self._ready))
        if count == 0:
            return
        beginning, self._ready = (
            self._ready.pick(slice(count)),
            self._ready.pick(slice(count, None)),
        )
        beginning.row = self._cache.take_rows(count)
        self._running = self._running.join(beginning)
        self._measure()

    # -- one token for everybody ---------------------------------------------------------------

    def _decode(self) -> None:
        """Draw the next token of every running sequence."""
        running = self._running
        waiting = len(self._ready) + len(self._waiting) * self._copies
        running.row = self._cache.reserve(self._longest, running.row, waiting)
        attend = DecodeAttend(
            self._cache,
            group=running.group,
            rows=running.row,
            lengths=running.count,
            positions=running.start + running.count - 1,
            max_position=self._furthest,
        )
        ended = self._draw(running, self._logits(self._trunk(running.token, attend)))
        self._longest += 1
        self._furthest += 1
        if ended.any():
            self._cache.give_back(running.row[ended])
            self._running = running.without(ended)
            self._measure()

    def _draw(self, sequences: Sequences, logits: Tensor) -> Tensor:
        """Draw and record a token for each sequence; which of them end with it [B]."""
        uniform = uniforms(sequences.key, sequences.count)
        draw = sample(logits, self._params, uniform, sequences.seen)
        self._drawn.append((sequences.index, draw))
        sequences.token = draw.token_ids
        sequences.count = sequences.count + 1
        if self._params.penalised:
            sequences.seen.scatter_(1, draw.token_ids[:, None], True)
        stopped = (draw.token_ids[:, None] == self._stops).any(dim=1)
        return stopped | (sequences.count >= self._max_new_tokens)

    def _logits(self, hidden: Tensor) -> Tensor:
        """[N, C] -> [N, V] in fp32, as the trainer's `linear_logprob` forms them."""
        return wide_matmul(hidden, self._head.t())

    # -- bookkeeping ---------------------------------------------------------------------------

    def _measure(self) -> None:
        """Find how long the longest tail and the longest sequence are."""
        if len(self._running):
            count, start = self._running.count, self._running.start
            self._longest, self._furthest = torch.stack(
                (count.max(), (start + count).max())
            ).tolist()

    @property
    def _seen_width(self) -> int:
        return self._head.shape[0] if self._params.penalised else 0

    def _nobody(self) -> Sequences:
        wide, narrow = self._tensor([]), self._tensor([]).int()
        seen = torch.zeros(0, self._seen_width, dtype=torch.bool, device=self._device)
        return Sequences(wide, wide, narrow, narrow, narrow, wide, narrow, seen)

    def _tensor(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64).to(self._device, non_blocking=True)


def _head_weight(model: Transformer) -> Tensor:
    """The head in the dtype that its product is formed in, cast once and not at every token."""
    weight = model.lm_head.weight
    return weight.to(model.model.compute_dtype or weight.dtype)

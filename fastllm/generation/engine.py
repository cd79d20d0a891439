"""The engine: requests come and go while a batch draws tokens."""

from __future__ import annotations

import time
from collections.abc import Iterator
from collections.abc import Sequence as Many
from typing import Literal, get_args

import numpy as np
import torch

from ..model import Transformer
from .batch import Drawn, RunningBatch, TokenStep
from .cache import BlockCache
from .graphed_step import GraphedStep
from .native_step import NativeStep, Weights, why_not
from .prefill import Prefill
from .requests import Lists, Output, Request, Sequence, Stats, checked_prompt, checked_stops
from .sampling import SamplingParams, random_keys
from .scheduler import Scheduler
from .stopping import TextCodec, TextReader
from .token_step import OpByOpStep, draw, stopped
from .transcript import Transcript

StepName = Literal["auto", "ops", "graphs"]


class Engine:
    """Completes prompts in one batch that requests join and leave at any token.

    A prompt is computed and stored once however many sequences continue it, and a sequence leaves
    the batch with its last token. What it says depends on its seed, its request id and its number
    among the completions of its prompt, and not on what else is in the batch (up to the rounding
    of matrix products, whose order of summation may follow the batch size).

    Args:
        model: the language model; no gradients are recorded.
        tokenizer: for prompts that are text, the text of outputs, and stop strings.
        max_batch_size: sequences that run at a time, the others wait; None for all.
        cache_bytes: the most that keys and values may take. A sequence for which nothing is left
            waits with its tokens, and goes on later. None for what the requests can need, at most
            half of the memory that is free.
        prefill_tokens: prompt tokens computed in one pass, unless one prompt alone is longer.
        weights: "int8" rounds the weights for sampling; the trainer's stay as they are.
        step: "ops" for the token step made of single ops, "graphs" for the one replayed from CUDA
            graphs; "auto" for the one in C++ on the CPU and graphs on CUDA, else for single ops.

    Raises:
        ValueError: an option out of its range, or one that this model or machine cannot serve.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: TextCodec | None = None,
        *,
        max_batch_size: int | None = 256,
        cache_bytes: int | None = None,
        prefill_tokens: int = 8192,
        weights: Weights = "auto",
        step: StepName = "auto",
    ) -> None:
        for name, count in (
            ("max_batch_size", max_batch_size),
            ("prefill_tokens", prefill_tokens),
            ("cache_bytes", cache_bytes),
        ):
            if count is not None and count < 1:
                raise ValueError(f"{name}: expected at least 1, found {count}")
        config, weight = model.config, model.lm_head.weight
        self._model, self._tokenizer = model, tokenizer
        self._cache = BlockCache(
            config.num_hidden_layers,
            config.num_key_value_heads,
            config.head_dim,
            model.model.compute_dtype or weight.dtype,
            weight.device,
            cache_bytes,
        )
        self._batch = RunningBatch(config.vocab_size)
        self._transcript = Transcript()
        self._scheduler = Scheduler(
            self._batch, self._cache, self._transcript, max_batch_size, prefill_tokens
        )
        self._options = weights, step
        self._step = choose_step(model, self._cache, weights, step)
        self._requests: dict[int, Request] = {}
        self._watched_at, self._watched_rows = -1, list[int]()
        self._held: list[Output] = []
        self._next_id = 0
        self.stats = Stats()
        """What this engine did so far."""

    @property
    def model(self) -> Transformer:
        """What completes the prompts."""
        return self._model

    @property
    def description(self) -> str:
        """Which token step serves, and why."""
        return self._step.description

    # -- requests ------------------------------------------------------------------------------

    def add_request(
        self,
        prompt: Many[int] | str,
        params: SamplingParams | None = None,
        *,
        request_id: int | None = None,
    ) -> int:
        """Put a prompt in line.

        Args:
            prompt: token ids, or text where the engine has a tokenizer.
            params: how it is completed; a seed of None draws one from PyTorch's default generator.
            request_id: with the seed, the name of the random stream; None for the next number.

        Returns:
            The request id.

        Raises:
            ValueError: a prompt or an option that this model, tokenizer or cache cannot serve.
        """
        params = params or SamplingParams()
        if request_id is None:
            request_id = self._next_id
        if request_id in self._requests:
            raise ValueError(f"request_id: {request_id} is the id of an unfinished request")
        seed = int(torch.randint(1 << 62, ())) if params.seed is None else params.seed
        copies = params.num_return_sequences
        keys = random_keys(seed, torch.full((copies,), request_id), torch.arange(copies))
        if isinstance(prompt, str):
            if self._tokenizer is None:
                raise ValueError("prompt: expected token ids (there is no tokenizer), found text")
            prompt = self._tokenizer.encode(prompt)
        self.submit(request_id, prompt, params, keys.tolist(), "the prompt")
        return request_id

    def submit(
        self, request_id: int, prompt: Many[int], params: SamplingParams, keys: list[int], name: str
    ) -> None:
        """Put a prompt in line, with the random stream of each sequence.

        Args:
            name: what an error calls the prompt.
        """
        config = self._model.config
        if params.stop_strings and self._tokenizer is None:
            raise ValueError("stop_strings: expected a tokenizer that decodes, found none")
        ids = checked_prompt(prompt, params.max_new_tokens, config, name)
        request = Request(request_id, ids, params, checked_stops(params, config))
        self._scheduler.add(request, keys)
        self._requests[request_id] = request
        self._next_id = max(self._next_id, request_id + 1)

    def abort_request(self, request_id: int) -> None:
        """Forget a request; nothing more is heard of it, and its memory is free.

        Raises:
            ValueError: no such request, or it has ended.
        """
        if request_id not in self._requests:
            raise ValueError(
                f"abort_request: expected the id of an unfinished request, found {request_id}"
            )
        self._scheduler.drop(self._requests.pop(request_id))
        self._held = [output for output in self._held if output.request_id != request_id]

    def has_unfinished_requests(self) -> bool:
        """Whether `step` has more to tell."""
        return bool(self._requests or self._held)

    def update_weights(self) -> None:
        """Take notice that the model was trained; its weights are read again.

        Raises:
            RuntimeError: there are unfinished requests, whose keys the old weights computed.
        """
        if self._requests:
            raise RuntimeError(
                f"update_weights: expected no unfinished requests, found {len(self._requests)}"
            )
        if isinstance(self._step, GraphedStep):
            self._step.update_weights()
        else:
            self._step = choose_step(self._model, self._cache, *self._options)

    # -- tokens --------------------------------------------------------------------------------

    def step(self) -> list[Output]:
        """Draw the next token of everybody who runs.

        Returns:
            What is new, one output for each completion that has something new.

        Raises:
            RuntimeError: the model's logits are not finite.
        """
        held, self._held = self._held, []
        if not self._requests:
            return held
        finished = self.advance(1)
        news = [self._output(s, s.tokens.since(s.reported)) for s in finished if s.tokens]
        rows = slice(self._batch.size)
        places, counts = self._batch.place[rows].tolist(), self._batch.count[rows].tolist()
        for sequence, place, count in zip(self._batch.sequences, places, counts, strict=True):
            if count > sequence.reported:
                tokens = self._transcript.of(place, count, sequence.reported)
                news.append(self._output(sequence, tokens.since(0)))
        return held + news

    def stream(
        self, prompt: Many[int] | str, params: SamplingParams | None = None
    ) -> Iterator[Output]:
        """Complete one prompt, token by token, while other requests go on.

        What the others draw meanwhile is returned by the next `step`.
        """
        params = params or SamplingParams()
        request_id = self.add_request(prompt, params)
        unfinished = params.num_return_sequences
        try:
            while unfinished:
                news = self.step()
                mine = [output for output in news if output.request_id == request_id]
                self._held = [output for output in news if output.request_id != request_id]
                if not mine and request_id not in self._requests:
                    return
                for output in mine:
                    unfinished -= output.finish_reason is not None
                    yield output
        finally:
            if request_id in self._requests:
                self.abort_request(request_id)

    def advance(self, most: int) -> list[Sequence]:
        """Let who waits join, and draw tokens until somebody ends, at most `most` for each row.

        Returns:
            The sequences that ended, with all their tokens.
        """
        # Not inference_mode: what is cached here, such as the rotary tables, serves training too.
        with torch.no_grad():
            finished = self._begin()
            if self._batch.size:
                finished += self._decode(1 if self._watched() else most)
        stats, block_bytes = self.stats, self._cache.block_bytes
        stats.cache_bytes = max(stats.cache_bytes, self._cache.capacity * block_bytes)
        stats.peak_cache_bytes = max(stats.peak_cache_bytes, self._cache.most_used * block_bytes)
        return finished

    def _begin(self) -> list[Sequence]:
        """Seat who waits, and draw the first tokens."""
        started = time.perf_counter()
        prefill, joined = self._scheduler.join()
        if not joined:
            return []
        batch = self._batch
        if prefill.prompts:
            self._prefill(prefill)
        finished = []
        rows = np.flatnonzero(batch.count[: batch.size] == 0)
        if rows.size:
            requests = [batch.sequences[row].request for row in rows.tolist()]
            drawn = draw(batch, torch.stack([r.logits for r in requests]), rows)
            for request in requests:
                request.not_begun -= 1
                if not request.not_begun:
                    request.logits = None
            drawn = Drawn(*(column[None] for column in drawn))
            finished = self._note(rows, drawn, np.ones_like(rows))
        self.stats.prefill_tokens += prefill.num_tokens
        self.stats.prefill_seconds += time.perf_counter() - started
        return finished

    def _prefill(self, prefill: Prefill) -> None:
        with self._step.prefilling():
            hidden = prefill.run(self._model, self._cache)
        beginning = [request for request in prefill.prompts if request.not_begun]
        if beginning:
            for request, row in zip(beginning, self._step.logits(hidden), strict=True):
                request.logits = row

    def _decode(self, most: int) -> list[Sequence]:
        """Draw the next tokens of everybody who runs."""
        started = time.perf_counter()
        batch = self._batch
        left = batch.max_count[: batch.size] - batch.count[: batch.size]
        longest = left.max() if self._step.goes_on else left.min()
        steps, preempted = self._scheduler.reserve(min(most, int(longest)))
        self.stats.preemptions += preempted
        before = batch.count[: batch.size].copy()
        drawn = self._step(batch, steps)
        lengths = batch.count[: batch.size] - before
        finished = self._note(np.arange(batch.size), drawn, lengths)
        self.stats.steps += len(drawn.token_ids)
        self.stats.decode_tokens += int(lengths.sum())
        self.stats.decode_seconds += time.perf_counter() - started
        return finished

    def _note(self, rows: np.ndarray, drawn: Drawn, lengths: np.ndarray) -> list[Sequence]:
        """Record what these rows drew, so many tokens each; who ended leaves, and is returned."""
        batch = self._batch
        self._transcript.record(batch.place[rows], batch.count[rows], drawn, lengths)
        stops = stopped(batch)
        watched = np.intersect1d(self._watched(), rows) if self._watched() else ()
        for row in watched:
            stops[row] |= self._read(row)
        done = np.flatnonzero(stops | (batch.count[: batch.size] >= batch.max_count[: batch.size]))
        if not done.size:
            return []
        finished = []
        for row in done.tolist():
            sequence = batch.sequences[row]
            count = int(batch.count[row])
            sequence.tokens = self._transcript.of(int(batch.place[row]), count)
            sequence.finish_reason = "stop" if stops[row] else "length"
            if self._scheduler.finished(sequence):
                del self._requests[sequence.request.id]
            finished.append(sequence)
        self._scheduler.leave(done)
        return finished

    # -- text ----------------------------------------------------------------------------------

    def _watched(self) -> list[int]:
        """The rows whose text may end them."""
        if self._watched_at != self._batch.changes:
            self._watched_at = self._batch.changes
            self._watched_rows = [
                row
                for row, sequence in enumerate(self._batch.sequences)
                if sequence.request.params.stop_strings
            ]
        return self._watched_rows

    def _read(self, row: int) -> bool:
        """Read the newest token of a row; whether a stop string ends it."""
        sequence, batch = self._batch.sequences[row], self._batch
        reader = self._reader(sequence)
        return reader.read([int(batch.token[row])], batch.count[row] >= batch.min_count[row])

    def _reader(self, sequence: Sequence) -> TextReader:
        if sequence.reader is None:
            assert self._tokenizer is not None
            sequence.reader = TextReader(self._tokenizer, sequence.request.params.stop_strings)
        return sequence.reader

    def _output(self, sequence: Sequence, news: Lists) -> Output:
        """What nobody was told of a sequence yet."""
        sequence.reported += len(news[0])
        text = None
        if self._tokenizer is not None:
            reader = self._reader(sequence)
            if not sequence.request.params.stop_strings:
                reader.read(news[0])
            text = reader.tell(last=sequence.finish_reason is not None)
        return Output(sequence.request.id, sequence.index, *news, text, sequence.finish_reason)


def choose_step(
    model: Transformer, cache: BlockCache, weights: Weights, step: StepName
) -> TokenStep:
    """The fastest token step that serves, or the one that was asked for.

    Raises:
        ValueError: an unknown name, or weights that need a step which cannot serve here.
    """
    for name, found, known in (
        ("weights", weights, get_args(Weights)),
        ("step", step, get_args(StepName)),
    ):
        if found not in known:
            raise ValueError(f"{name}: expected one of {', '.join(known)}; found {found!r}")
    reason = why_not(model) if step == "auto" else f"step {step!r} was asked for"
    if reason is None:
        return NativeStep(model, cache, weights)
    if weights != "auto":
        raise ValueError(f"weights: {weights!r} needs the token step in C++, but {reason}")
    if step == "graphs" or (step == "auto" and cache.device.type == "cuda"):
        return GraphedStep(model, cache, reason)
    return OpByOpStep(model, cache, reason)

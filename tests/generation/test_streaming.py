"""The engine's own interface: requests added, stepped, streamed and aborted."""

from __future__ import annotations

import pytest
import torch

from fastllm.generation import Engine, SamplingParams, generate


class Letters:
    """A token for each letter."""

    def encode(self, text):
        return [ord(letter) - 64 for letter in text]

    def decode(self, ids):
        return "".join(chr(64 + i) for i in ids)


PARAMS = SamplingParams(max_new_tokens=12, seed=5, stop_token_ids=(7,), num_return_sequences=2)


def _expected(model, prompt, request_id, params=PARAMS):
    return generate(
        model, [prompt], params.max_new_tokens, num_return_sequences=2, seed=params.seed,
        stop_token_ids=params.stop_token_ids, request_ids=[request_id], tokenizer=Letters(),
    )  # fmt: skip


def _gathered(outputs):
    """The outputs of each completion, put together."""
    whole = {}
    for output in outputs:
        key = output.request_id, output.index
        ids, logprobs, sampling, text, reason = whole.setdefault(key, ([], [], [], [], []))
        assert not reason, "nothing follows the end"
        ids += output.token_ids
        logprobs += output.logprobs
        sampling += output.sampling_logprobs
        text.append(output.text)
        reason += [output.finish_reason] if output.finish_reason else []
    return whole


def _same(found, completion):
    ids, logprobs, sampling, text, reason = found
    assert ids == completion.token_ids and reason == [completion.finish_reason]
    assert logprobs == pytest.approx(completion.logprobs, abs=1e-5)
    assert sampling == pytest.approx(completion.sampling_logprobs, abs=1e-5)
    assert "".join(text) == completion.text


def test_a_stream_is_the_completion_in_pieces(build):
    model = build()
    engine = Engine(model, Letters())
    outputs = list(engine.stream("ABC", PARAMS))
    assert not engine.has_unfinished_requests()
    assert max(len(output.token_ids) for output in outputs) <= 2
    whole = _gathered(outputs)
    for index, completion in enumerate(_expected(model, [1, 2, 3], 0)):
        _same(whole[0, index], completion)


def test_streams_side_by_side(build):
    model = build()
    engine = Engine(model, Letters())
    other = engine.add_request([9, 9], PARAMS, request_id=70)
    streams = {1: engine.stream([1], PARAMS), 2: engine.stream([2, 3], PARAMS)}
    outputs, names = [], {}
    while streams:
        for name, stream in list(streams.items()):
            output = next(stream, None)
            if output is None:
                del streams[name]
            else:
                outputs.append(output)
                names.setdefault(name, output.request_id)
                assert output.request_id == names[name]
    while engine.has_unfinished_requests():
        outputs += engine.step()
    whole = _gathered(outputs)
    assert len(whole) == 6
    for request_id, prompt in (other, [9, 9]), (names[1], [1]), (names[2], [2, 3]):
        for index, completion in enumerate(_expected(model, prompt, request_id)):
            _same(whole[request_id, index], completion)


def test_every_output_has_something_new(build, prompts):
    engine = Engine(build(), max_batch_size=3)
    for prompt in prompts:
        engine.add_request(prompt, PARAMS)
    while engine.has_unfinished_requests():
        outputs = engine.step()
        assert all(output.token_ids and output.text is None for output in outputs)
        keys = [(output.request_id, output.index) for output in outputs]
        assert len(set(keys)) == len(keys)
    assert engine.step() == []


def test_an_aborted_request_is_gone_at_once(build, prompts):
    model = build()
    engine = Engine(model, max_batch_size=5)
    params = SamplingParams(max_new_tokens=20, seed=5, stop_token_ids=(), num_return_sequences=2)
    ids = [engine.add_request(prompt, params) for prompt in prompts]
    outputs = engine.step()
    for gone in ids[0], ids[2], ids[4]:  # running, half of it waiting, waiting
        engine.abort_request(gone)
    used = engine._cache.used_blocks
    assert used == sum(r.blocks is not None for r in engine._requests.values()) + int(
        engine._batch.owned[: engine._batch.size].sum()
    )
    while engine.has_unfinished_requests():
        new = engine.step()
        assert not {ids[0], ids[2], ids[4]} & {output.request_id for output in new}
        outputs += new
    assert engine._cache.used_blocks == 0
    whole = _gathered(o for o in outputs if o.request_id in (ids[1], ids[3]))
    for request_id in ids[1], ids[3]:
        expected = generate(
            model, [prompts[request_id]], 20, num_return_sequences=2, seed=5, stop_token_ids=[],
            request_ids=[request_id],
        )  # fmt: skip
        assert [whole[request_id, i][0] for i in range(2)] == [c.token_ids for c in expected]
    with pytest.raises(ValueError, match="expected the id of an unfinished request, found 0"):
        engine.abort_request(ids[0])


def test_a_stream_that_nobody_reads_to_its_end_is_aborted(build):
    engine = Engine(build())
    stream = engine.stream([1, 2], PARAMS)
    next(stream)
    stream.close()
    assert not engine.has_unfinished_requests() and engine._cache.used_blocks == 0


def test_request_ids(build):
    engine = Engine(build(max_position_embeddings=200))
    assert engine.add_request([1]) == 0
    assert engine.add_request([1], request_id=7) == 7
    assert engine.add_request([1]) == 8
    with pytest.raises(ValueError, match="7 is the id of an unfinished request"):
        engine.add_request([1], request_id=7)


def test_text_needs_a_tokenizer(build):
    with pytest.raises(ValueError, match="expected token ids"):
        Engine(build()).add_request("AB")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_batch_size": 0}, "max_batch_size: expected at least 1, found 0"),
        ({"prefill_tokens": 0}, "prefill_tokens: expected at least 1, found 0"),
        ({"cache_bytes": 0}, "cache_bytes: expected at least 1, found 0"),
        ({"weights": "int4"}, "weights: expected one of auto, int8; found 'int4'"),
        ({"step": "fast"}, "step: expected one of auto, ops, graphs; found 'fast'"),
        ({"step": "graphs"}, "step: 'graphs' needs a CUDA device, the model is on cpu"),
        ({"step": "ops", "weights": "int8"}, "'int8' needs the token step in C.*asked for"),
    ],
)
def test_options_that_cannot_be_served(build, options, message):
    with pytest.raises(ValueError, match=message):
        Engine(build(), **options)


def test_the_engine_says_which_step_serves(build):
    assert Engine(build(), step="ops").description == "op by op on cpu: step 'ops' was asked for"


def test_weights_that_were_trained(build, prompts):
    model, other = build(seed=0), build(seed=1)
    engine = Engine(model)
    list(engine.stream(prompts[0], PARAMS))
    with torch.no_grad():
        for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
            mine.copy_(theirs)
    engine.update_weights()
    whole = _gathered(engine.stream(prompts[0], PARAMS))
    expected = _expected(other, prompts[0], 1)
    assert [whole[1, i][0] for i in range(2)] == [c.token_ids for c in expected]
    engine.add_request(prompts[0], PARAMS)
    with pytest.raises(RuntimeError, match="expected no unfinished requests, found 1"):
        engine.update_weights()

"""Stop strings: found in the text wherever tokens and characters are cut."""

from __future__ import annotations

import random

import pytest

from fastllm.generation import Engine, SamplingParams, generate
from fastllm.generation.stopping import TextReader


class Bytes:
    """A token for each byte."""

    def encode(self, text):
        return list(text.encode())

    def decode(self, ids):
        return bytes(ids).decode(errors="replace")


class Pieces:
    """Tokens that are pieces of text."""

    def __init__(self, *pieces):
        self.pieces = pieces

    def encode(self, text):
        raise NotImplementedError

    def decode(self, ids):
        return "".join(self.pieces[i] for i in ids)


def _read(reader, ids):
    """Feed tokens until the text ends: tokens read, and what was told of the text."""
    told = ""
    for number, token in enumerate(ids, 1):
        ended = reader.read([token])
        told += reader.tell(last=ended or number == len(ids))
        if ended:
            break
    assert told == reader.text
    return number, told


@pytest.mark.parametrize(
    ("pieces", "stops", "tokens", "text"),
    [
        (["ab", "cd", "ef"], ["cd"], 2, "ab"),
        (["ab", "cd", "ef"], ["bc"], 2, "a"),
        (["ab", "cd", "ef"], ["bcde"], 3, "a"),
        (["ab", "cd", "ef"], ["abcdef"], 3, ""),
        (["abcdef"], ["bc"], 1, "a"),
        (["ab", "cd", "ef"], ["x", "de", "cd"], 2, "ab"),
        (["aa", "ab", "x"], ["aab"], 2, "a"),
        (["a", "aab"], ["b", "aa"], 2, ""),
        (["ab", "cd"], ["dc"], 2, "abcd"),
        (["end", "."], ["end!"], 2, "end."),
    ],
)
def test_a_stop_string_ends_the_text_before_it(pieces, stops, tokens, text):
    reader = TextReader(Pieces(*pieces), stops)
    assert _read(reader, range(len(pieces))) == (tokens, text)


def test_what_may_begin_a_stop_string_is_held_back():
    reader = TextReader(Pieces("one <", "st", "ar>", " <stop", ">"), ["<stop>"])
    told = []
    for token in range(5):
        ended = reader.read([token])
        told.append(reader.tell(last=ended))
    assert told == ["one ", "", "<star>", " ", ""] and ended
    assert reader.text == "one <star> "


def test_stop_strings_do_not_count_before_they_may():
    reader = TextReader(Pieces("a;", "b", "c;", "d"), [";"])
    assert not reader.read([0], may_stop=False)
    assert not reader.read([1]), "the one before does not count later either"
    assert reader.read([2])
    assert reader.text == "a;bc"


def test_characters_are_told_when_they_are_complete():
    text = "né→𝄞!"
    reader = TextReader(Bytes())
    told = []
    for byte in text.encode():
        reader.read([byte])
        told.append(reader.tell(last=False))
    assert told == ["n", "", "é", "", "", "→", "", "", "", "𝄞", "!"]


def test_bytes_that_are_no_text():
    reader = TextReader(Bytes(), ["ok"])
    assert _read(reader, [0xFF, 0x80, 0x61, 0xE2, 0x82]) == (5, "��a�")
    assert _read(TextReader(Bytes(), ["ok"]), [0xE2, 0x6F, 0x6B, 0x61]) == (3, "�")


def test_any_cut_gives_the_same_text():
    rng = random.Random(0)
    alphabet = "ab→é𝄞 \n"
    for _ in range(200):
        text = "".join(rng.choice(alphabet) for _ in range(rng.randrange(1, 30)))
        stops = ["".join(rng.choice(alphabet) for _ in range(rng.randrange(1, 4))) for _ in "12"]
        found = [at for stop in stops if (at := text.find(stop)) >= 0]
        _, told = _read(TextReader(Bytes(), stops), list(text.encode()))
        ends = [at + len(stop) for stop in stops if (at := text.find(stop)) >= 0]
        if not found:
            assert told == text
            continue
        # The stop string that is complete first ends the text, at the first place that it has.
        first = min(ends)
        begins = [at for stop in stops if (at := text[:first].find(stop)) >= 0]
        assert told == text[: min(begins)]


# -- in the engine -----------------------------------------------------------------------------


@pytest.fixture
def model(build):
    return build(vocab_size=256)


def test_completions_end_at_stop_strings_and_keep_their_tokens(model, prompts):
    options = {"num_return_sequences": 3, "seed": 2, "tokenizer": Bytes(), "temperature": 2.0}
    free = generate(model, prompts, 40, **options)
    assert all(c.text == Bytes().decode(c.token_ids) for c in free)
    stops = [free[0].text[5:7], free[4].text[9:11], free[7].text[20:21]]
    cut = generate(model, prompts, 40, stop_strings=stops, **options)
    assert {c.finish_reason for c in cut} == {"stop", "length"}
    for whole, found in zip(free, cut, strict=True):
        length = len(found.token_ids)
        assert found.token_ids == whole.token_ids[:length]
        assert len(found.logprobs) == len(found.sampling_logprobs) == length
        assert not any(stop in found.text for stop in stops)
        drawn = Bytes().decode(found.token_ids)
        if found.finish_reason == "stop":
            assert drawn.startswith(found.text)
            assert any(stop in drawn for stop in stops)
            before = Bytes().decode(found.token_ids[:-1])
            assert not any(stop in before.rstrip("\ufffd") for stop in stops)
        else:
            assert drawn == found.text and length == 40
    # Others in the batch, and how many tokens a step draws, change nothing.
    alone = generate(model, prompts[:1], 40, stop_strings=stops, **options)
    assert [(c.token_ids, c.text) for c in alone] == [(c.token_ids, c.text) for c in cut[:3]]


def test_min_new_tokens(model, prompts):
    options = {"num_return_sequences": 4, "seed": 2, "tokenizer": Bytes(), "temperature": 2.0}
    stops = list(range(0, 256, 3))
    early = generate(model, prompts, 30, stop_token_ids=stops, **options)
    assert min(len(c.token_ids) for c in early) < 12
    late = generate(model, prompts, 30, stop_token_ids=stops, min_new_tokens=12, **options)
    for completion in late:
        assert not set(completion.token_ids[:12]) & set(stops)
        assert completion.finish_reason == "length" or len(completion.token_ids) > 12
    free = generate(model, prompts, 30, **options)
    stop = free[0].text[3]
    cut = generate(model, prompts, 30, stop_strings=[stop], min_new_tokens=12, **options)
    assert all(len(c.token_ids) >= 12 for c in cut)
    assert any(c.finish_reason == "stop" for c in cut)
    assert stop in cut[0].text[:5], "too early to end it"


def test_stop_strings_need_a_tokenizer(model):
    with pytest.raises(ValueError, match="stop_strings: expected a tokenizer"):
        generate(model, [[1]], 4, stop_strings=["a"])
    with pytest.raises(ValueError, match="stop_strings: expected a tokenizer"):
        Engine(model).add_request([1], SamplingParams(stop_strings=("a",)))

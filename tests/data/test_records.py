"""Raw records to typed ones: every form, every alias, every fault."""

from __future__ import annotations

import logging

import pytest

from fastllm.data.errors import DataError
from fastllm.data.examples import Example
from fastllm.data.records import preference_records, prompt_records, sft_records

USER = [{"role": "user", "content": "Hi"}]
REPLY = [{"role": "assistant", "content": "Hello"}]


@pytest.mark.parametrize(
    ("record", "prompt", "completion"),
    [
        ({"text": "abc"}, None, "abc"),
        ("abc", None, "abc"),
        ({"messages": USER + REPLY}, None, USER + REPLY),
        ({"prompt": "p", "completion": "c"}, "p", "c"),
        ({"prompt": "", "completion": ""}, "", ""),
        ({"prompt": USER, "completion": REPLY}, USER, REPLY),
        ({"prompt": [], "completion": REPLY}, [], REPLY),
        (Example("p", "r"), "p", "r"),
        (("p", "r"), "p", "r"),
        ({"question": "q", "answer": "a"}, "q", "a"),
        ({"instruction": "i", "output": "o"}, "i", "o"),
        ({"instruction": "i", "input": "x", "output": "o"}, "i\n\nx", "o"),
        ({"instruction": "i", "input": "", "output": "o"}, "i", "o"),
        ({"prompt": "p", "response": "r"}, "p", "r"),
        ({"prompt": "p", "completion": "c", "answer": "a"}, "p", "c"),
        ({"text": None, "prompt": "p", "completion": "c"}, "p", "c"),
        ({"text": "t", "prompt": None, "messages": None}, None, "t"),
    ],
)
def test_sft_forms(record, prompt, completion):
    (read,) = sft_records([record])
    assert (read.prompt, read.completion, read.origin) == (prompt, completion, "items[0]")
    assert read.input_ids is None


def test_aliases_are_logged_once(write, caplog):
    path = write("gsm.jsonl", *[{"question": "q", "answer": "a"}] * 3)
    with caplog.at_level(logging.INFO, "fastllm"):
        sft_records(path)
    assert caplog.messages == [f"{path}: reading 'question' as 'prompt', 'answer' as 'completion'"]


def test_own_names_are_not_logged(caplog):
    with caplog.at_level(logging.INFO, "fastllm"):
        sft_records([{"prompt": "p", "completion": "c"}])
    assert not caplog.messages


@pytest.mark.parametrize(
    ("record", "mask"),
    [
        ({"input_ids": [1, 2, 3]}, None),
        ({"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}, [False, True, True]),
        ({"input_ids": [1, 2, 3], "completion_mask": [0, 0, 1]}, [False, False, True]),
        (
            {"input_ids": [1, 2, 3], "completion_mask": [0, 1, 1], "assistant_masks": [1, 1, 0]},
            [False, True, False],
        ),
    ],
)
def test_tokenised_sft(record, mask):
    (read,) = sft_records([record])
    assert (read.input_ids, read.loss_mask) == ([1, 2, 3], mask)


def test_token_ids_may_be_arrays():
    numpy = pytest.importorskip("numpy")
    torch = pytest.importorskip("torch")
    record = {"input_ids": torch.tensor([1, 2]), "labels": numpy.array([-100, 2])}
    (read,) = sft_records([record])
    assert read.input_ids == [1, 2]
    assert all(type(token) is int for token in read.input_ids)


SFT_FAULTS = [
    ({}, r"expected 'text', 'messages' or 'prompt' and 'completion' \(found an empty record\)"),
    ({"body": "x"}, r"expected 'text', 'messages' or .* \(found 'body'\)"),
    ({"prompt": "p"}, r"missing 'completion' \(found 'prompt'\)"),
    ({"prompt": "p", "completion": None}, r"missing 'completion' \(found 'prompt'\)"),
    ({"completion": "c"}, r"missing 'prompt' \(found 'completion'\)"),
    (
        {"prompt": "p", "chosen": "a", "rejected": "b"},
        r"expected 'text', .*found 'prompt', 'chosen'",
    ),
    ({"text": 5}, r"'text' must be a string or a list of messages, found int"),
    ({"text": USER}, r"'text' must be a string, found a list of messages"),
    ({"text": "a\ud800"}, r"'text' holds half a surrogate pair \(\\ud800\)"),
    ({"messages": "hi"}, r"'messages' must be a list of messages, found str"),
    ({"messages": []}, r"'messages' must be a list of messages, found an empty list"),
    ({"messages": ["hi"]}, r"messages\[0\] must be a message with 'role' and 'content', found str"),
    ({"messages": [*USER, {"content": "x"}]}, r"messages\[1\]: missing 'role'"),
    ({"messages": [{"role": 5, "content": "x"}]}, r"messages\[0\]: 'role' must be a string"),
    ({"messages": [{"role": "user"}]}, r"messages\[0\]: missing 'content'"),
    ({"messages": [{"role": "user", "content": 5}]}, r"'content' must be a string, found int"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
        r"messages\[0\]: 'content' must be text; blocks of type 'image' are not supported",
    ),
    ({"messages": [{"role": "user", "content": "\udc00"}]}, r"half a surrogate pair"),
    (
        {"prompt": "p", "completion": REPLY},
        r"cannot be mixed: 'prompt' is a string, 'completion' is a list of messages",
    ),
    ({"prompt": "p", "completion": []}, r"'completion' must be .*, found an empty list"),
    ({"messages": USER, "tools": "{"}, r"'tools' is not JSON"),
    ({"messages": USER, "tools": 5}, r"'tools' must be a list of schemas, found int"),
    ({"messages": USER, "chat_template_kwargs": [1]}, r"'chat_template_kwargs' must be an object"),
    ({"input_ids": []}, r"'input_ids' must hold token ids, found an empty list"),
    ({"input_ids": "12"}, r"'input_ids' must be a list of integers, found str"),
    ({"input_ids": [1, "2"]}, r"'input_ids' must be a list of integers, found str in it"),
    ({"input_ids": [1, -2]}, r"'input_ids' holds the negative token id -2"),
    (
        {"input_ids": [1, 2], "labels": [1]},
        r"'labels' must be as long as 'input_ids' \(2\), found 1",
    ),
    ({"input_ids": [1, 2], "labels": [1, 7]}, r"labels\[1\] is 7, expected input_ids\[1\] = 2"),
    ({"input_ids": [1], "completion_mask": [2]}, r"'completion_mask' must hold 0 and 1 only"),
]


@pytest.mark.parametrize(("record", "message"), SFT_FAULTS)
def test_sft_faults(record, message):
    with pytest.raises(DataError, match=r"^items\[1\]: .*" + message):
        sft_records([{"text": "fine"}, record])


def test_a_tool_call_needs_no_content():
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    (read,) = sft_records([{"messages": [*USER, call], "tools": '[{"name": "f"}]'}])
    assert read.completion == [*USER, call]
    assert read.template.tools == [{"name": "f"}]


@pytest.mark.parametrize(
    ("record", "prompt", "margin"),
    [
        ({"chosen": "c", "rejected": "r"}, None, None),
        ({"prompt": "p", "chosen": "c", "rejected": "r"}, "p", None),
        ({"prompt": None, "chosen": "c", "rejected": "r", "margin": None}, None, None),
        ({"chosen": "c", "rejected": "r", "margin": 2}, None, 2.0),
        (("p", "c", "r"), "p", None),
    ],
)
def test_preference_forms(record, prompt, margin):
    (read,) = preference_records([record])
    assert (read.prompt, read.chosen, read.rejected, read.margin) == (prompt, "c", "r", margin)


def test_conversational_preference():
    (read,) = preference_records([{"prompt": USER, "chosen": REPLY, "rejected": REPLY}])
    assert (read.prompt, read.chosen) == (USER, REPLY)


@pytest.mark.parametrize("infix", ["", "input_"])
def test_tokenised_preference(infix):
    record = {f"chosen_{infix}ids": [1, 2], f"rejected_{infix}ids": [1, 3], "margin": 0.5}
    (read,) = preference_records([record])
    assert (read.chosen_ids, read.rejected_ids, read.margin) == ([1, 2], [1, 3], 0.5)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"chosen": "c"}, "missing 'rejected'"),
        ({"rejected": "r"}, "missing 'chosen'"),
        (
            {"chosen": 4, "rejected": "r"},
            "'chosen' must be a string or a list of messages, found int",
        ),
        ({"chosen": [], "rejected": "r"}, "'chosen' must be .*, found an empty list"),
        ({"chosen": "c", "rejected": REPLY}, "strings and messages cannot be mixed"),
        ({"prompt": USER, "chosen": "c", "rejected": "r"}, "strings and messages cannot be mixed"),
        ({"chosen_ids": [1]}, "missing 'rejected_ids'"),
        (
            {"chosen": "c", "rejected": "r", "margin": "1"},
            "'margin' must be a finite number, found '1'",
        ),
        ({"chosen": "c", "rejected": "r", "margin": True}, "'margin' must be a finite number"),
        ({"chosen": "c", "rejected": "r", "margin": float("nan")}, "'margin' must be .*found nan"),
    ],
)
def test_preference_faults(write, record, message):
    with pytest.raises(DataError, match=rf"^pairs\[1\]: {message}"):
        preference_records([{"chosen": "c", "rejected": "r"}, record])


def test_a_missing_key_names_file_and_line(write):
    path = write("pairs.jsonl", *[{"chosen": "c", "rejected": "r"}] * 16, {"chosen": "c"})
    with pytest.raises(DataError, match=r"pairs\.jsonl:17: missing 'rejected'$"):
        preference_records(path)


def test_prompts_keep_their_other_columns(caplog):
    source = [{"prompt": "p", "answer": "42", "level": 3}, "plain", {"question": "q", "x": None}]
    with caplog.at_level(logging.INFO, "fastllm"):
        first, second, third = prompt_records(source)
    assert (first.prompt, first.columns) == ("p", {"answer": "42", "level": 3})
    assert (second.prompt, second.columns) == ("plain", {})
    assert (third.prompt, third.columns) == ("q", {"x": None})
    assert caplog.messages == ["prompts: reading 'question' as 'prompt'"]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"answer": "42"}, r"missing 'prompt' \(found 'answer'\)"),
        ({"prompt": 5}, "'prompt' must be a string or a list of messages, found int"),
        ({"prompt": ["hi"]}, r"prompt\[0\] must be a message with 'role' and 'content', found str"),
    ],
)
def test_prompt_faults(record, message):
    with pytest.raises(DataError, match=rf"^prompts\[0\]: {message}"):
        prompt_records([record])


def test_real_files(real_data):
    sft = sft_records(real_data("gsm8k_train.jsonl.gz"))
    assert len(sft) == 7473
    assert sft[0].prompt.startswith("Natalia sold clips")
    assert "####" in sft[0].completion
    pairs = preference_records(real_data("gsm8k_solution_pairs.jsonl.gz"))
    assert len(pairs) == 1950
    assert pairs[0].prompt is not None
    implicit = preference_records(real_data("hh_harmless_pairs.jsonl.gz"))
    assert len(implicit) == 1800
    assert all(pair.prompt is None for pair in implicit)

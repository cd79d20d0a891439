"""Chat templates: transformers' rules, the sandbox, and what the assistant wrote."""

from __future__ import annotations

import datetime
import importlib.util
from pathlib import Path

import pytest

from fastllm.data import chat
from fastllm.data.errors import DataError
from fastllm.data.tokenizer import Tokenizer

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
USER = [{"role": "user", "content": "Hi"}]
CHAT = [
    *USER,
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "Ciao"},
]

MARKED = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}"
    "{% else %}[{{ m.content }}]{% endif %}{% endfor %}"
)
UNMARKED = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}"
    "{{ m.content }}{{ eos_token }}\n{% else %}[{{ m.content }}]{% endif %}{% endfor %}"
)


def rendered(template, messages=USER, **kwargs):
    return chat.render(template, messages, TOKENS, **kwargs)


def test_the_default_template(byte_tokenizer):
    text = byte_tokenizer.render_chat(CHAT[:3], add_generation_prompt=True)
    assert text == (
        "<|im_start|>user\nHi<eos>\n<|im_start|>assistant\nHello<eos>\n"
        "<|im_start|>user\nBye<eos>\n<|im_start|>assistant\n"
    )
    prompt = byte_tokenizer.apply_chat_template(CHAT[:3], add_generation_prompt=True)
    whole = byte_tokenizer.apply_chat_template(CHAT)
    assert whole[: len(prompt)] == prompt
    assert byte_tokenizer.decode(whole[len(prompt) :], False) == "Ciao<eos>\n"


def test_blocks_are_trimmed():
    assert rendered("  {% if true %}\n  x\n  {% endif %}\ny") == "  x\ny"


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ {'b': '<é>', 'a': 1} | tojson }}", '{"b": "<é>", "a": 1}'),
        ("{{ [1] | tojson(indent=2) }}", "[\n  1\n]"),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{% set n = namespace(x=1) %}{% set n.x = n.x + 1 %}{{ n.x }}", "2"),
        ("{{ dict(a=1).a }}", "1"),
        ("{{ strftime_now('%Y') }}", str(datetime.datetime.now().year)),
        ("{{ tools is none }}{{ documents is none }}{{ add_generation_prompt }}", "TrueTrueFalse"),
        ("{{ unknown }}{{ messages[0]['content'].strip() | upper }}", "HI"),
        ("{{ bos_token }}", "<s>"),
        ("{% generation %}a{% endgeneration %}b", "ab"),
    ],
)
def test_rules_of_transformers(template, text):
    assert rendered(template) == text


def test_tools_and_further_variables():
    template = "{{ tools | tojson }} {{ enable_thinking }}"
    assert (
        rendered(template, tools=[{"name": "f"}], enable_thinking=False) == '[{"name": "f"}] False'
    )


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('Only user turns') }}", "Only user turns"),
        ("{{ messages[0].content + 1 }}", "cannot render these messages"),
        ("{{ ''.__class__.__mro__ }}", "unsafe|undefined"),
        ("{{ messages.append(1) }}", "cannot render these messages"),
        ("{{ dict.__call__.__globals__ }}", "unsafe|undefined"),
        ("{{ raise_exception.__globals__.x }}", "unsafe|undefined"),
        ("{{ namespace.__init__.__globals__ }}", "unsafe|undefined"),
        ("{% set n = namespace(__class__=1) %}", "cannot hold the name '__class__'"),
        ("{% set n = namespace() %}{% set n.__x__ = 1 %}", "cannot hold the name '__x__'"),
        ("{% for i in range(1000000000) %}{% endfor %}", "cannot render these messages"),
        ("{% if %}", "the chat template is not valid"),
        ("{% generation %}", "the chat template is not valid"),
    ],
)
def test_faults_and_escapes(template, message):
    with pytest.raises(DataError, match=message):
        rendered(template)


def test_a_template_sees_plain_values_only():
    class Text(str):
        def escape(self):
            return "escaped"

    messages = [{"role": "user", "content": Text("Hi"), "image": object()}]
    assert (
        rendered("{{ messages[0].image }}{{ messages[0].content.escape }}", messages) == "<object>"
    )


def test_the_marks_are_no_text():
    with pytest.raises(DataError, match=r"U\+FDD0"):
        rendered("{{ messages[0].content }}", [{"role": "user", "content": "\ufdd0"}])


@pytest.mark.parametrize("template", [MARKED, UNMARKED])
def test_what_the_assistant_wrote(template):
    text, spans = chat.render_with_spans(template, CHAT, TOKENS)
    assert [text[start:end] for start, end in spans] == ["Hello</s>", "Ciao</s>"]
    assert text == rendered(template, CHAT)


def test_turns_that_cannot_be_located():
    # As templates do that take the reasoning out of earlier turns.
    template = (
        "{% for m in messages %}{% if loop.last %}{{ m.content }}{% else %}"
        "{{ m.content[:1] }}{% endif %}{% endfor %}"
    )
    with pytest.raises(DataError, match=r"no \{% generation %\} marks"):
        chat.render_with_spans(template, CHAT, TOKENS)


def test_turns_without_an_end(hf_folder):
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    tokenizer = Tokenizer.from_pretrained(hf_folder(template))
    with pytest.raises(DataError, match=r"no special token after what .* \('assistant: Hello'\)"):
        tokenizer.apply_chat_template_with_mask(CHAT[:2])


@pytest.mark.parametrize(
    ("offsets", "spans", "mask"),
    [
        ([], [], []),
        ([(0, 2), (2, 4), (4, 6)], [(2, 4)], [0, 1, 0]),
        ([(0, 2), (2, 4), (4, 6)], [(3, 5)], [0, 1, 1]),
        ([(0, 2), (2, 4), (4, 6)], [(0, 2), (4, 6)], [1, 0, 1]),
        ([(0, 1), (1, 2), (1, 2), (2, 3)], [(1, 2)], [0, 1, 1, 0]),
        ([(0, 1), (1, 2)], [(1, 1)], [0, 0]),
        ([(0, 1), (1, 2)], [(1, 9)], [0, 1]),
    ],
)
def test_token_mask(offsets, spans, mask):
    assert chat.token_mask(offsets, spans) == [bit == 1 for bit in mask]


@pytest.mark.parametrize("template", [MARKED, UNMARKED])
def test_the_end_of_the_turn_is_the_assistants(hf_folder, template):
    tokenizer = Tokenizer.from_pretrained(hf_folder(template))
    ids, mask = tokenizer.apply_chat_template_with_mask(CHAT)
    assert ids == tokenizer.apply_chat_template(CHAT)
    assert ids.count(tokenizer.bos_token_id) == 1
    spoken = [token for token, own in zip(ids, mask, strict=True) if own]
    assert tokenizer.decode(spoken, skip_special_tokens=False) == "Hello</s>Ciao</s>"


def test_where_the_template_is_kept(hf_folder):
    folder = hf_folder()
    with pytest.raises(DataError, match="no chat template, which messages need; put a chat_templ"):
        Tokenizer.from_pretrained(folder).apply_chat_template(USER)
    (folder / "chat_template.json").write_text('{"chat_template": "second"}')
    assert Tokenizer.from_pretrained(folder).render_chat(USER) == "second"
    (folder / "chat_template.jinja").write_text("first")
    assert Tokenizer.from_pretrained(folder).render_chat(USER) == "first"


def test_named_templates(hf_folder):
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    assert Tokenizer.from_pretrained(hf_folder(named)).render_chat(USER) == "yes"


def trl_templates():
    spec = importlib.util.find_spec("trl")  # importing it takes longer than all tests here
    if spec is None:
        pytest.skip("trl, whose templates these are, is not installed")
    return sorted(Path(spec.origin).parent.glob("chat_templates/*.jinja"))


def test_templates_in_the_wild(conversations):
    """The same text and the same assistant spans as transformers, for every template of TRL."""
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    differing = []
    compared = 0
    for path in trl_templates():
        template = path.read_text(encoding="utf-8")
        for messages in conversations:
            try:
                (text,), (spans,) = utils.render_jinja_template(
                    [messages],
                    chat_template=template,
                    return_assistant_tokens_mask=True,
                    **TOKENS,
                )
            except Exception:  # a template that does not take such a conversation
                with pytest.raises(DataError):
                    chat.render(template, messages, TOKENS)
                continue
            compared += 1
            if chat.render(template, messages, TOKENS) != text:
                differing.append(f"{path.name}: text")
            elif chat.has_generation_marks(template):
                ours = chat.render_with_spans(template, messages, TOKENS)[1]
                if ours != [tuple(span) for span in spans]:
                    differing.append(f"{path.name}: {ours} {spans}")
    assert not differing
    assert compared > 50

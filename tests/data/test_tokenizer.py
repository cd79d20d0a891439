"""The tokenizer: round trips, saved folders, foreign folders, the choice of one."""

from __future__ import annotations

import json
import logging

import pytest

from fastllm.data import tokenizer as tokenizer_module
from fastllm.data.errors import DataError
from fastllm.data.tokenizer import Tokenizer, choose_tokenizer

TRICKY = [
    "",
    " ",
    "\n\n\tx  y ",
    "café 日本語 😀👍🏽 \u0301",
    "0 12 345 6789",
    "\x00\x7f\x80\xff\u2028",
    "<eos> in the text <pad><bos>",
    "a" * 5000,
]


def test_bytes_are_ids_less_the_special_tokens(byte_tokenizer):
    every_byte = "".join(map(chr, range(128))) + "é😀"
    assert byte_tokenizer.encode(every_byte) == [4 + byte for byte in every_byte.encode()]
    assert byte_tokenizer.vocab_size == 260


def test_own_special_tokens(own_tokenizer):
    specials = (own_tokenizer.pad_token_id, own_tokenizer.bos_token_id, own_tokenizer.eos_token_id)
    assert specials == (0, 1, 2)
    assert own_tokenizer.encode("a<eos>")[-1] == own_tokenizer.eos_token_id
    assert own_tokenizer.decode([1, *own_tokenizer.encode("a"), 2, 0]) == "a"
    assert own_tokenizer.decode([2], skip_special_tokens=False) == "<eos>"
    assert not own_tokenizer.adds_eos


@pytest.mark.parametrize("text", TRICKY)
def test_round_trip(own_tokenizer, text):
    ids = own_tokenizer.encode(text)
    assert own_tokenizer.decode(ids, skip_special_tokens=False) == text
    assert own_tokenizer.encode(text, add_special_tokens=True) == ids
    assert own_tokenizer.encode_batch([text, "b"])[0] == ids
    assert own_tokenizer.decode_batch([ids], skip_special_tokens=False) == [text]


def test_digits_stand_alone(bpe_tokenizer):
    assert [bpe_tokenizer.decode([token]) for token in bpe_tokenizer.encode("4096")] == list("4096")


def test_training_shortens_texts_and_is_deterministic(texts, byte_tokenizer, bpe_tokenizer):
    text = texts[0]
    assert len(bpe_tokenizer.encode(text)) < 0.6 * len(byte_tokenizer.encode(text))
    assert 300 < bpe_tokenizer.vocab_size <= 400
    assert Tokenizer.train(texts, 400).fingerprint == bpe_tokenizer.fingerprint


def test_a_vocabulary_without_room_for_the_bytes(texts):
    with pytest.raises(DataError, match=r"vocab_size must be at least 260 .* found 100"):
        Tokenizer.train(texts, 100)


def test_saved_and_stored_tokenizers_are_the_same(own_tokenizer, tmp_path, conversations):
    own_tokenizer.save_pretrained(tmp_path / "a")
    loaded = Tokenizer.from_pretrained(tmp_path / "a")
    stored = Tokenizer.from_json(own_tokenizer.to_json())
    for other in (loaded, stored, Tokenizer.from_pretrained(tmp_path / "a" / "tokenizer.json")):
        assert other.fingerprint == own_tokenizer.fingerprint
        assert other.special_tokens == own_tokenizer.special_tokens
        assert other.encode_batch(TRICKY) == own_tokenizer.encode_batch(TRICKY)
        assert other.apply_chat_template(conversations[1]) == own_tokenizer.apply_chat_template(
            conversations[1]
        )
    loaded.save_pretrained(tmp_path / "b")
    for path in (tmp_path / "a").iterdir():
        assert (tmp_path / "b" / path.name).read_bytes() == path.read_bytes()


def test_transformers_reads_what_we_save(own_tokenizer, tmp_path, texts, conversations):
    transformers = pytest.importorskip("transformers")
    own_tokenizer.save_pretrained(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert len(theirs) == own_tokenizer.vocab_size
    for name in ("pad", "bos", "eos"):
        assert getattr(theirs, f"{name}_token_id") == getattr(own_tokenizer, f"{name}_token_id")
    for text in [*texts[:3], *TRICKY]:
        ids = own_tokenizer.encode(text)
        assert theirs(text)["input_ids"] == ids
        assert theirs.decode(ids, skip_special_tokens=True) == own_tokenizer.decode(ids)
    for messages in conversations:
        ids, mask = own_tokenizer.apply_chat_template_with_mask(messages)
        expected = theirs.apply_chat_template(
            messages, return_dict=True, return_assistant_tokens_mask=True
        )
        assert ids == expected["input_ids"]
        assert mask == [bit == 1 for bit in expected["assistant_masks"]]


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"pad_token": "[PAD]"},
        {"bos_token": None, "eos_token": None},
        {"add_bos_token": True, "add_eos_token": True},
        {"add_bos_token": False, "add_eos_token": False},
        {
            "added_tokens_decoder": {
                "400": {
                    "content": "<new>",
                    "lstrip": False,
                    "normalized": False,
                    "rstrip": True,
                    "single_word": False,
                    "special": True,
                }
            }
        },
    ],
    ids=["plain", "added pad", "no specials", "bos and eos", "neither", "added token"],
)
def test_foreign_folders_as_transformers_reads_them(hf_folder, config):
    transformers = pytest.importorskip("transformers")
    folder = hf_folder(**config)
    ours, theirs = (
        Tokenizer.from_pretrained(folder),
        transformers.AutoTokenizer.from_pretrained(folder),
    )
    for name in ("pad", "bos", "eos"):
        assert getattr(theirs, f"{name}_token_id") == getattr(ours, f"{name}_token_id")
    for text in ["A fox.", "[INST] x [/INST] <tool> y</s>", "<new>  z", *TRICKY]:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text, add_special_tokens=True) == theirs(text)["input_ids"]


def test_foreign_files_are_copied_byte_for_byte(hf_folder, tmp_path):
    folder = hf_folder()
    (folder / "tokenizer.model").write_bytes(b"\xff\x00binary")
    (folder / "added_tokens.json").write_bytes(b"{ }\r\n")
    tokenizer = Tokenizer.from_pretrained(folder)
    tokenizer.save_pretrained(tmp_path / "copy")
    Tokenizer.from_json(tokenizer.to_json()).save_pretrained(tmp_path / "stored")
    for copy in ("copy", "stored"):
        names = {path.name for path in (tmp_path / copy).iterdir()}
        assert names == {path.name for path in folder.iterdir()}
        for name in names:
            assert (tmp_path / copy / name).read_bytes() == (folder / name).read_bytes()


def test_special_tokens_of_the_model_config(hf_folder):
    folder = hf_folder(bos_token=None, eos_token=None)
    (folder / "config.json").write_text('{"eos_token_id": [1, 2], "bos_token_id": 0}')
    tokenizer = Tokenizer.from_pretrained(folder)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1, None)
    assert Tokenizer.from_json(tokenizer.to_json()).eos_token_id == 1


def test_one_bos_only(hf_folder):
    tokenizer = Tokenizer.from_pretrained(hf_folder())
    bos = tokenizer.bos_token_id
    assert tokenizer.encode("<s>fox", add_special_tokens=True).count(bos) == 1
    assert tokenizer.encode("fox", add_special_tokens=True).count(bos) == 1
    assert tokenizer.encode("fox").count(bos) == 0


def test_knows_whether_it_adds_eos(hf_folder):
    assert Tokenizer.from_pretrained(hf_folder(frame=["$A", "</s>"])).adds_eos


def test_fingerprints_differ_where_ids_do(own_tokenizer, bpe_tokenizer, texts):
    assert own_tokenizer.fingerprint != Tokenizer.train(texts, 300).fingerprint
    packed = json.loads(bpe_tokenizer.to_json())
    del packed["special_tokens"]["pad_token"]
    config = json.loads(packed["files"]["tokenizer_config.json"])
    del config["pad_token"]
    packed["files"]["tokenizer_config.json"] = json.dumps(config)
    del packed["files"]["special_tokens_map.json"]
    assert Tokenizer.from_json(json.dumps(packed)).fingerprint != bpe_tokenizer.fingerprint


def test_description(byte_tokenizer, bpe_tokenizer, tmp_path):
    assert byte_tokenizer.description == "byte tokenizer, 260 tokens, built in"
    size = bpe_tokenizer.vocab_size
    assert bpe_tokenizer.description == f"BPE tokenizer, {size} tokens, trained on the data"
    byte_tokenizer.save_pretrained(tmp_path)
    assert Tokenizer.from_pretrained(tmp_path).description == (
        f"byte tokenizer, 260 tokens, {tmp_path}"
    )


def test_folders_without_a_tokenizer(tmp_path):
    with pytest.raises(DataError, match=r"nowhere: no such folder or file"):
        Tokenizer.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"no tokenizer\.json, found no tokenizer file$"):
        Tokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(DataError, match=r"found tokenizer\.model; save it again with transformers"):
        Tokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b"\xff\xfe", b'{"model": {"type": "?"}}'])
def test_damaged_files(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(DataError, match=r"tokenizer\.json: the tokenizer failed"):
        Tokenizer.from_pretrained(tmp_path)


def test_damaged_config(byte_tokenizer, tmp_path):
    byte_tokenizer.save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(DataError, match=r"tokenizer_config\.json: not JSON"):
        Tokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"files": {"../x": "y"}, "source": "s", "special_tokens": {}}'],
)
def test_damaged_json(text):
    with pytest.raises(DataError, match=r"not a stored tokenizer"):
        Tokenizer.from_json(text)


def test_half_a_surrogate_pair_is_a_data_error(byte_tokenizer):
    with pytest.raises(DataError, match="encoding: the tokenizer failed"):
        byte_tokenizer.encode("a\ud800")


def test_a_panic_in_rust_is_a_data_error(byte_tokenizer, tmp_path):
    """A regular expression that backtracks without end; pyo3 raises a BaseException for it."""
    byte_tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    config["pre_tokenizer"] = {
        "type": "Split",
        "pattern": {"Regex": "(a+)+$"},
        "behavior": "Isolated",
        "invert": False,
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(config), encoding="utf-8")
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    with pytest.raises(DataError, match="encoding: the tokenizer failed"):
        tokenizer.encode("a" * 40 + "b")


def test_the_choice_of_a_tokenizer(byte_tokenizer, tmp_path, monkeypatch, texts, caplog):
    caplog.set_level(logging.INFO, "fastllm")

    def choice(**arguments):
        caplog.clear()
        chosen = choose_tokenizer(**arguments)
        (line,) = caplog.messages
        assert chosen.description in line
        return chosen, line

    folder = tmp_path / "model"
    Tokenizer.train(texts, 300).save_pretrained(folder)
    assert choice(tokenizer=byte_tokenizer, model_folder=folder)[0] is byte_tokenizer
    assert choice(tokenizer="bytes", model_folder=folder)[0].vocab_size == 260
    assert choice(tokenizer=str(folder))[0].vocab_size == 300
    assert choice(tokenizer="bpe", texts=texts, vocab_size=310)[0].vocab_size == 310
    chosen, line = choice(model_folder=folder, texts=texts)
    assert (chosen.vocab_size, "the model's own" in line) == (300, True)
    chosen, line = choice(texts=texts, model_folder=tmp_path)
    assert chosen.vocab_size == 260
    assert "bytes of text are too few to train BPE" in line
    monkeypatch.setattr("fastllm.data.tokenizer.MIN_BYTES_FOR_BPE", 1000)
    chosen, line = choice(texts=iter(texts), vocab_size=320)
    assert (chosen.vocab_size, "bytes of text)" in line) == (320, True)
    assert choice()[0].vocab_size == 260


def test_choices_that_cannot_be_met(tmp_path):
    with pytest.raises(DataError, match="'bpe' is trained on texts, and there are none"):
        choose_tokenizer("bpe")
    with pytest.raises(DataError, match="nowhere: no such folder or file"):
        choose_tokenizer(tmp_path / "nowhere")


def test_many_texts_are_encoded_in_portions(own_tokenizer, monkeypatch):
    whole = own_tokenizer.encode_batch(TRICKY, add_special_tokens=True)
    monkeypatch.setattr(tokenizer_module, "_TEXTS_AT_ONCE", 2)
    assert own_tokenizer.encode_batch(TRICKY, add_special_tokens=True) == whole
    given = iter([*TRICKY, 5])  # a fault in the last portion
    portions = own_tokenizer.encode_each(given, add_special_tokens=True)
    assert [next(portions) for _ in range(2)] == whole[:2]

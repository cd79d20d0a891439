"""Records to token ids: loss masks, EOS, the length rules and their counts, TRL's own ids."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest

from fastllm.data.encoding import encode_preferences, encode_prompts, encode_sft
from fastllm.data.errors import DataError
from fastllm.data.records import preference_records, prompt_records, sft_records
from fastllm.data.tokenizer import Tokenizer, choose_tokenizer

USER = [{"role": "user", "content": "Hi"}]
REPLY = [{"role": "assistant", "content": "Hello"}]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}"
    "{% else %}[INST]{{ m.content }}[/INST]{% endif %}{% endfor %}"
)


def sft(source, tokenizer, **options):
    return encode_sft(sft_records(source), tokenizer, **options)[0]


def in_loss(sequence, tokenizer):
    chosen = [
        token for token, own in zip(sequence.input_ids, sequence.loss_mask, strict=True) if own
    ]
    return tokenizer.decode(chosen, skip_special_tokens=False)


def whole(ids, tokenizer):
    return tokenizer.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize(
    ("record", "options", "text", "loss"),
    [
        ("abc", {}, "abc<eos>", "bc<eos>"),
        ("abc<eos>", {}, "abc<eos>", "bc<eos>"),
        (("ab", "cd"), {}, "abcd<eos>", "cd<eos>"),
        (("ab", "cd"), {"completion_only_loss": True}, "abcd<eos>", "cd<eos>"),
        (("ab", "cd"), {"completion_only_loss": False}, "abcd<eos>", "bcd<eos>"),
        (("ab", ""), {}, "ab<eos>", "<eos>"),
        (("", "cd"), {}, "cd<eos>", "d<eos>"),
        (
            {"prompt": USER, "completion": REPLY},
            {},
            "<|im_start|>user\nHi<eos>\n<|im_start|>assistant\nHello<eos>\n",
            "Hello<eos>\n",
        ),
        (
            {"messages": USER + REPLY},
            {"assistant_only_loss": True},
            "<|im_start|>user\nHi<eos>\n<|im_start|>assistant\nHello<eos>\n",
            "Hello<eos>",
        ),
        (
            {"prompt": USER + REPLY + USER, "completion": REPLY},
            {"assistant_only_loss": True},
            "<|im_start|>user\nHi<eos>\n<|im_start|>assistant\nHello<eos>\n" * 2,
            "Hello<eos>",
        ),
    ],
)
def test_what_carries_loss(byte_tokenizer, record, options, text, loss):
    (sequence,) = sft([record], byte_tokenizer, **options)
    assert whole(sequence.input_ids, byte_tokenizer) == text
    assert in_loss(sequence, byte_tokenizer) == loss


def test_messages_without_options_carry_loss_everywhere(byte_tokenizer):
    (sequence,) = sft([{"messages": USER + REPLY}], byte_tokenizer)
    assert sequence.loss_mask.tolist() == [False] + [True] * (len(sequence.input_ids) - 1)


@pytest.mark.parametrize("options", [{}, {"assistant_only_loss": True}])
def test_own_masks_of_tokenised_records_hold(byte_tokenizer, options):
    records = [
        {"input_ids": [5, 6, 7], "labels": [-100, -100, 7]},
        {"input_ids": [5, 6, 7], "completion_mask": [0, 1, 0]},
        {"input_ids": [5, 6, 7]},
    ]
    sequences = sft(records, byte_tokenizer, **options)
    assert [sequence.loss_mask.tolist() for sequence in sequences] == [
        [False, False, True],
        [False, True, False],
        [False, True, True],
    ]
    assert all(sequence.input_ids.tolist() == [5, 6, 7] for sequence in sequences)


def test_pad_that_is_eos_takes_nothing_from_the_loss(hf_folder):
    tokenizer = Tokenizer.from_pretrained(hf_folder(pad_token="</s>"))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    (sequence,) = sft([("a", "b")], tokenizer)
    assert sequence.input_ids.tolist().count(tokenizer.eos_token_id) == 1
    assert sequence.loss_mask[-1]


def test_sequences_are_cut_at_the_end_and_counted(byte_tokenizer, caplog):
    records = sft_records([("ab", "cdefgh"), ("abcdefgh", "i"), ("a", "b")])
    with caplog.at_level(logging.INFO, "fastllm"):
        sequences, summary = encode_sft(records, byte_tokenizer, max_length=5)
    assert [whole(s.input_ids, byte_tokenizer) for s in sequences] == ["abcde", "ab<eos>"]
    assert [in_loss(s, byte_tokenizer) for s in sequences] == ["cde", "b<eos>"]
    assert (summary.read, summary.kept, summary.truncated, summary.without_loss) == (3, 2, 1, 1)
    assert (summary.tokens, summary.loss_tokens) == (8, 5)
    assert (summary.shortest, summary.longest) == (3, 5)
    assert caplog.messages == [
        "kept 2 of 3 sequences; 1 cut to 5 tokens; 1 with no token that carries loss dropped; "
        "8 tokens, 3 to 5 each"
    ]


def test_no_limit(byte_tokenizer):
    (sequence,) = sft(["a" * 3000], byte_tokenizer, max_length=None)
    assert len(sequence.input_ids) == 3001


def test_a_prompt_that_ends_inside_a_token_is_noted(bpe_tokenizer, caplog):
    prompt, completion = "The lazy d", "og, and the dog"
    assert len(bpe_tokenizer.encode(" dog")) < len(bpe_tokenizer.encode(" d")) + 1
    (sequence,) = sft([(prompt, completion)], bpe_tokenizer)
    assert whole(sequence.input_ids, bpe_tokenizer) == prompt + completion + "<eos>"
    assert in_loss(sequence, bpe_tokenizer) == " dog, and the dog<eos>"
    assert "1 of 1 prompts end in other tokens once the completion follows" in caplog.text


@pytest.mark.parametrize(
    ("record", "options", "message"),
    [
        ("abc", {"completion_only_loss": True}, r"items\[0\]: completion_only_loss needs 'prompt'"),
        (("a", "b"), {"assistant_only_loss": True}, r"items\[0\]: assistant_only_loss needs"),
        ({"messages": USER}, {"assistant_only_loss": True}, r"items\[0\]: .*says nothing"),
        ({"input_ids": [1, 260]}, {}, r"items\[0\]: token id 260 is outside the vocabulary of 260"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}]}, {},
         r"items\[0\]: the chat template cannot render"),
        (("a" * 50, "b"), {"max_length": 9}, r"none of the 1 sequences \(52 to 52 tokens\) "),
    ],
)  # fmt: skip
def test_sft_faults(byte_tokenizer, record, options, message):
    with pytest.raises(DataError, match=message):
        sft([record], byte_tokenizer, **options)


def test_messages_need_a_template(hf_folder):
    tokenizer = Tokenizer.from_pretrained(hf_folder())
    with pytest.raises(DataError, match=r"items\[0\]: .*no chat template"):
        sft([{"messages": USER + REPLY}], tokenizer)


def test_a_tokenizer_without_eos_is_noted(hf_folder, caplog):
    tokenizer = Tokenizer.from_pretrained(hf_folder(eos_token=None))
    (sequence,) = sft(["fox"], tokenizer)
    assert tokenizer.decode(sequence.input_ids) == "fox"
    assert "never learns to stop" in caplog.text


@pytest.mark.parametrize(
    ("record", "chosen", "rejected"),
    [
        ({"chosen": "good", "rejected": "bad"}, "good<eos>", "bad<eos>"),
        ({"chosen": "good<eos>", "rejected": "bad"}, "good<eos>", "bad<eos>"),
        (("ask ", "good", "bad"), "ask good<eos>", "ask bad<eos>"),
        (
            {"chosen": USER + REPLY, "rejected": USER},
            "<|im_start|>user\nHi<eos>\n<|im_start|>assistant\nHello<eos>\n",
            "<|im_start|>user\nHi<eos>\n",
        ),
    ],
)
def test_pairs(byte_tokenizer, record, chosen, rejected):
    (pair,), _ = encode_preferences(preference_records([record]), byte_tokenizer)
    assert whole(pair.chosen, byte_tokenizer) == chosen
    assert whole(pair.rejected, byte_tokenizer) == rejected


def test_long_pairs_are_dropped_whole_and_counted(byte_tokenizer, caplog):
    source = [
        {"chosen": "a" * 9, "rejected": "b", "margin": 0.5},
        {"chosen": "a" * 10, "rejected": "b"},
        {"chosen": "a", "rejected": "b" * 10},
        {"chosen": "a", "rejected": "a"},
        {"chosen_ids": [4] * 10, "rejected_ids": [5]},
    ]
    with caplog.at_level(logging.INFO, "fastllm"):
        pairs, summary = encode_preferences(preference_records(source), byte_tokenizer, 10)
    assert [len(pair.chosen) for pair in pairs] == [10, 2, 10]
    assert [pair.margin for pair in pairs] == [0.5, None, None]
    assert (summary.kept, summary.too_long, summary.identical) == (3, 2, 1)
    assert caplog.messages == [
        "kept 3 of 5 pairs; 2 longer than 10 tokens dropped; 1 with equal sides, which teach "
        "nothing; 27 tokens, 2 to 10 each"
    ]


def test_no_pair_fits(byte_tokenizer):
    records = preference_records([("p", "a" * 20, "b"), ("p", "a", "b" * 30)])
    with pytest.raises(
        DataError, match=r"none of the 2 pairs .* = 8: .* have 22 to 32 tokens; rai"
    ):
        encode_preferences(records, byte_tokenizer, max_length=8)


def test_tokenised_pairs_stay_in_the_vocabulary(byte_tokenizer):
    records = preference_records([{"chosen_ids": [1], "rejected_ids": [999]}])
    with pytest.raises(DataError, match=r"pairs\[0\]: token id 999 is outside the vocabulary"):
        encode_preferences(records, byte_tokenizer)


def test_prompts(byte_tokenizer):
    records = prompt_records([{"prompt": "12+35=", "answer": "47"}, {"prompt": USER}])
    (first, second), summary = encode_prompts(records, byte_tokenizer)
    assert whole(first.input_ids, byte_tokenizer) == "12+35="
    assert (first.prompt, first.columns) == ("12+35=", {"answer": "47"})
    assert whole(second.input_ids, byte_tokenizer) == (
        "<|im_start|>user\nHi<eos>\n<|im_start|>assistant\n"
    )
    assert (summary.kept, summary.longest) == (2, len(second.input_ids))


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("abcdef", r"prompts\[1\]: the prompt has 6 tokens and at most 5 are allowed"),
        ("", r"prompts\[1\]: the prompt is empty"),
    ],
)
def test_prompt_faults(byte_tokenizer, prompt, message):
    with pytest.raises(DataError, match=message):
        encode_prompts(prompt_records(["abcde", prompt]), byte_tokenizer, max_length=5)


def test_a_prompt_never_ends_in_a_token_that_the_tokenizer_adds(hf_folder):
    tokenizer = Tokenizer.from_pretrained(hf_folder(frame=("<s>", "$A", "</s>")))
    (prompt,), _ = encode_prompts(prompt_records(["fox"]), tokenizer)
    assert whole(prompt.input_ids, tokenizer) == "<s>fox"
    (sequence,) = sft([("fox", " jumps")], tokenizer)
    assert whole(sequence.input_ids, tokenizer) == "<s>fox jumps</s>"
    assert in_loss(sequence, tokenizer) == " jumps</s>"


def test_generated_tokens_continue_the_sft_prompt(own_tokenizer):
    """The ids that GRPO continues are the ids that SFT put before the completion."""
    for prompt, completion in [("12+35=", "47"), ("Hi\n", "there"), (USER, REPLY)]:
        record = {"prompt": prompt, "completion": completion}
        (sequence,) = sft([record], own_tokenizer)
        (encoded,), _ = encode_prompts(prompt_records([record]), own_tokenizer)
        start = sequence.loss_mask.tolist().index(True)
        assert sequence.input_ids[:start].tolist() == encoded.input_ids


@pytest.fixture
def both_tokenizers(hf_folder):
    transformers = pytest.importorskip("transformers")
    folder = hf_folder(TEMPLATE)
    return Tokenizer.from_pretrained(folder), transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize(
    ("columns", "assistant_only"),
    [
        ([{"text": "The fox."}, {"text": "A dog.</s>"}], False),
        (
            [
                {"prompt": "The fox", "completion": " jumps."},
                {"prompt": "A dog", "completion": "ma"},
            ],
            False,
        ),
        ([{"messages": USER + REPLY}, {"messages": USER + REPLY + USER + REPLY}], False),
        ([{"messages": USER + REPLY}, {"messages": USER + REPLY + USER + REPLY}], True),
        ([{"prompt": USER, "completion": REPLY}], False),
        ([{"prompt": USER + REPLY + USER, "completion": REPLY}], True),
    ],
    ids=["text", "completion", "messages", "assistant", "chat completion", "chat assistant"],
)
def test_sft_ids_and_labels_are_those_of_trl(both_tokenizers, columns, assistant_only):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    ours, theirs = both_tokenizers
    config = SimpleNamespace(
        assistant_only_loss=assistant_only,
        max_length=40,
        truncation_mode="keep_start",
        dataset_text_field="text",
        dataset_num_proc=None,
        shuffle_dataset=False,
    )
    trainer = object.__new__(trl.SFTTrainer)
    trainer._tokenizer, trainer.chat_template = theirs, None
    trainer.completion_only_loss = "prompt" in columns[0]
    prepared = trainer._prepare_dataset(
        datasets.Dataset.from_list(columns), theirs, config, False, None, "train"
    )
    sequences = sft(columns, ours, max_length=40, assistant_only_loss=assistant_only)
    assert [sequence.input_ids.tolist() for sequence in sequences] == prepared["input_ids"][:]
    for sequence, labels in zip(sequences, prepared["labels"], strict=True):
        assert sequence.loss_mask[1:].tolist() == [label != -100 for label in labels[1:]]


@pytest.mark.parametrize(
    "columns",
    [
        [{"chosen": "A fox jumps.", "rejected": "A dog.</s>"}],
        [{"prompt": "The fox", "chosen": " jumps.", "rejected": " sleeps, and sleeps, and sle"}],
        [{"prompt": USER, "chosen": REPLY, "rejected": REPLY + USER}],
    ],
    ids=["implicit", "explicit", "conversational"],
)
@pytest.mark.parametrize("max_length", [12, 1024])
def test_preference_ids_are_those_of_trl(both_tokenizers, columns, max_length):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    ours, theirs = both_tokenizers
    columns = [*columns, {**columns[0], "chosen": columns[0]["rejected"]}]
    config = SimpleNamespace(max_length=max_length, dataset_num_proc=None)
    trainer = object.__new__(trl.RewardTrainer)
    prepared = trainer._prepare_dataset(
        datasets.Dataset.from_list(columns), theirs, config, "train"
    )
    try:
        pairs, _ = encode_preferences(preference_records(columns), ours, max_length)
    except DataError:
        pairs = []
    assert [pair.chosen.tolist() for pair in pairs] == prepared["chosen_ids"][:]
    assert [pair.rejected.tolist() for pair in pairs] == prepared["rejected_ids"][:]


def test_real_data(real_data):
    records = sft_records(real_data("gsm8k_train.jsonl.gz"))
    tokenizer = choose_tokenizer(texts=[f"{r.prompt}{r.completion}" for r in records])
    assert tokenizer.vocab_size == 4096
    sequences, summary = encode_sft(records[:1000], tokenizer)
    assert (summary.kept, summary.truncated) == (1000, 0)
    assert in_loss(sequences[0], tokenizer) == f"{records[0].completion}<eos>"
    pairs = preference_records(real_data("hh_harmless_pairs.jsonl.gz"))
    encoded, summary = encode_preferences(pairs, tokenizer)
    assert summary.kept + summary.too_long == 1800
    assert tokenizer.decode(encoded[0].chosen) == pairs[0].chosen

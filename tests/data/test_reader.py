"""Files and lists to raw records: what is accepted, and what each fault says."""

from __future__ import annotations

import contextlib
import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastllm.data.errors import DataError
from fastllm.data.examples import Example, format_example
from fastllm.data.reader import read_records

PAIR = {"chosen": "good", "rejected": "bad"}


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "x.ndjson", "X.JSONL"])
def test_reads_json_lines(write, name):
    path = write(name, PAIR, {"chosen": "a", "rejected": "b"})
    records = read_records(path)
    assert records == [PAIR, {"chosen": "a", "rejected": "b"}]
    assert [record.origin for record in records] == [f"{path}:1", f"{path}:2"]
    assert read_records(Path(path)) == records


@pytest.mark.parametrize("name", ["x.json", "x.json.gz"])
def test_reads_a_json_list(write, name):
    path = write(name, "\ufeff[\n", json.dumps(PAIR), "]\n")
    (record,) = read_records(path)
    assert record == PAIR
    assert record.origin == f"{path}[0]"


def test_json_lines_may_be_named_json(write):
    path = write("x.json", PAIR, PAIR)
    assert [record.origin for record in read_records(path)] == [f"{path}:1", f"{path}:2"]


def test_accepts_bom_crlf_blank_lines_and_no_last_newline(write):
    line = json.dumps(PAIR)
    path = write("x.jsonl", "\ufeff", line, "\r\n", "\r\n", "  \n", line)
    assert [record.origin for record in read_records(path)] == [f"{path}:1", f"{path}:4"]


def test_keeps_line_separators_and_nul_inside_strings(write):
    record = {"text": "a\u2028b\x85c\x00d"}
    path = write("x.jsonl", json.dumps(record, ensure_ascii=False) + "\n", PAIR)
    assert read_records(path) == [record, PAIR]


def test_reads_surrogate_pairs(write):
    path = write("x.jsonl", '{"text": "\\ud83d\\ude00"}\n')
    assert read_records(path) == [{"text": "😀"}]


FAULTS = {
    "not JSON": (
        '{"chosen": "a" "rejected"}\n',
        r":3: not JSON \(Expecting ',' delimiter at column",
    ),
    "cut off": ('{"chosen": "a', r":3: not JSON \(Unterminated string starting at at column 12\)"),
    "list": ("[1]\n", r":3: expected a JSON object, found list; a file that holds one list is"),
    "number": ("5\n", r":3: expected a JSON object, found int"),
    "NaN": ('{"margin": NaN}\n', r":3: NaN is not JSON; a number must be finite"),
    "infinity": ('{"margin": -Infinity}\n', r":3: -Infinity is not JSON"),
    "too large": ('{"margin": 1e999}\n', r":3: the number 1e999 is too large"),
    "long integer": (f'{{"margin": {"9" * 5000}}}\n', r":3: Exceeds the limit"),
    "surrogate": ('{"text": "a\\ud800b"}\n', r":3: half a surrogate pair \(\\ud800\) is not text"),
    "surrogate key": ('{"\\uDC00": 1}\n', r":3: half a surrogate pair"),
    "deep": ('{"a": ' + "[" * 100_000 + "\n", r":3: nested too deeply"),
    "twice": ('{"text": "a", "text": "b"}\n', r":3: the key 'text' appears twice"),
    "UTF-8": (b'{"text": "\xff"}\n', r":3: not UTF-8 \(byte 0xff at column 11\)"),
    "UTF-16": ("{}".encode("utf-16"), r":3: not UTF-8"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_name_file_and_line(write, fault):
    line, message = FAULTS[fault]
    path = write("x.jsonl", PAIR, "\n", line)
    with pytest.raises(DataError, match=message) as caught:
        read_records(path)
    assert str(caught.value).startswith(f"{path}:3: ")
    assert "\n" not in str(caught.value)


@given(
    st.lists(
        st.one_of(
            st.binary(max_size=20),
            st.text(max_size=20).map(lambda text: text.encode("utf-8", "surrogatepass")),
            st.sampled_from([b'{"a": ', b"[", b"]", b"}", b'"\\ud800"', b"1e400", b"NaN", b'"a"']),
            st.just(json.dumps(PAIR).encode()),
        ),
        max_size=6,
    ),
    st.sampled_from([b"", b"\n", b","]),
)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_whatever_the_file_holds_only_data_errors(tmp_path_factory, parts, separator):
    folder = tmp_path_factory.getbasetemp()
    for name in ("any.jsonl", "any.json", "any.jsonl.gz"):
        (folder / name).write_bytes(separator.join(parts))
        with contextlib.suppress(DataError):
            assert all(isinstance(record, dict) for record in read_records(folder / name))


def test_faults_of_a_json_list(write):
    with pytest.raises(DataError, match=r"x\.json\[1\]: expected a JSON object, found int"):
        read_records(write("x.json", "[{}, 3]"))
    with pytest.raises(DataError, match=r"x\.json: not JSON \(.* at line 2 column 2\)"):
        read_records(write("x.json", '[{"a": 1},\n }]'))
    with pytest.raises(DataError, match=r"x\.json: expected a list of records, found str"):
        read_records(write("x.json", '"text"'))


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "x.json"])
@pytest.mark.parametrize("content", ["", "\n\n", "\ufeff"])
def test_empty_file(write, name, content):
    with pytest.raises(DataError, match="empty file, no records"):
        read_records(write(name, content))


def test_empty_json_list(write):
    with pytest.raises(DataError, match="empty file, no records"):
        read_records(write("x.json", "[]"))


def test_files_that_cannot_be_read(tmp_path, write):
    with pytest.raises(DataError, match=r"none\.jsonl: cannot be read \(No such file"):
        read_records(tmp_path / "none.jsonl")
    with pytest.raises(
        DataError, match=r"expected a name ending in \.jsonl, \.jsonl\.gz or \.json"
    ):
        read_records(write("x.parquet", "PAR1"))
    with pytest.raises(DataError, match="not a data file"):
        read_records(tmp_path)
    folder = tmp_path / "folder.jsonl"
    folder.mkdir()
    with pytest.raises(DataError, match=r"folder\.jsonl: cannot be read \(Is a directory"):
        read_records(folder)


@pytest.mark.parametrize("damage", ["plain", "cut", "flipped"])
def test_damaged_gzip(tmp_path, damage):
    lines = "".join(json.dumps({"text": f"{n} {n * n}"}) + "\n" for n in range(5000)).encode()
    data = bytearray(gzip.compress(lines))
    if damage == "flipped":
        data[len(data) // 2] ^= 0xFF
    content = {"plain": lines, "cut": bytes(data[: len(data) // 2]), "flipped": bytes(data)}
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(content[damage])
    with pytest.raises(DataError, match=r"x\.jsonl\.gz"):
        read_records(path)


def test_reads_from_memory():
    source = (item for item in [PAIR, Example("p", "r"), ("p", "r"), ("p", "c", "r"), "text"])
    records = read_records(source, name="items")
    assert records == [
        PAIR,
        {"prompt": "p", "completion": "r"},
        {"prompt": "p", "completion": "r"},
        {"prompt": "p", "chosen": "c", "rejected": "r"},
        {"text": "text"},
    ]
    assert [record.origin for record in records] == [f"items[{index}]" for index in range(5)]


def test_does_not_change_what_it_is_given():
    pair = dict(PAIR)
    read_records([pair])[0]["more"] = 1
    assert pair == PAIR


def test_reads_a_hugging_face_dataset():
    datasets = pytest.importorskip("datasets")
    dataset = datasets.Dataset.from_list([PAIR, PAIR])
    assert read_records(dataset, "pairs") == [PAIR, PAIR]
    with pytest.raises(DataError, match="one split of a DatasetDict"):
        read_records(datasets.DatasetDict({"train": dataset}))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([], r"pairs: empty, no records"),
        (5, r"pairs: expected a path or a list of records, found int"),
        (PAIR, r"pairs: expected a list of records, found one dict .* chosen, rejected"),
        ([PAIR, 5], r"pairs\[1\]: expected a dict, .* found int"),
        ([("a",)], r"pairs\[0\]: expected a dict, .* found tuple"),
        ([("a", 5)], r"pairs\[0\]: expected a dict, .* found tuple"),
        ([None], r"pairs\[0\]: expected a dict, .* found NoneType"),
    ],
)
def test_faults_of_what_is_in_memory(source, message):
    with pytest.raises(DataError, match=message):
        read_records(source, "pairs")


def test_the_response_follows_the_prompt_directly():
    assert format_example(Example("2 + 2 = ", "4")) == "2 + 2 = 4"


def test_records_need_no_heavy_import():
    code = (
        "import sys, fastllm.data.records as r; "
        "r.sft_records(['a']); "
        "heavy = {'torch', 'tokenizers', 'jinja2', 'numpy'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])

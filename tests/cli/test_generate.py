"""`fastllm generate`: records in the order of the prompts, streams, and the best of several."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fastllm.cli import main
from fastllm.cli.generate import Records
from fastllm.data.encoding import EncodedPrompt
from fastllm.generation import Completion


def generated(policy: Path, out: Path, *argv: str) -> list[dict[str, Any]]:
    """The records of one run of the command."""
    command = ["generate", "--model", str(policy), "--out", str(out), "--overwrite"]
    assert main([*command, "--max_new_tokens=6", *argv]) == 0
    return [json.loads(line) for line in out.open()]


@pytest.fixture
def data(work: Any) -> str:
    """Prompts of different lengths, with a column of their own."""
    return work.write(
        "prompts.jsonl", *({"prompt": "1+" * (i % 3) + f"{i}=", "id": i} for i in range(9))
    )


def test_records_come_in_the_order_of_the_prompts(policy: Path, tmp_path: Path, data: str) -> None:
    rows = generated(policy, tmp_path / "out.jsonl", "--data", data, "--num-return-sequences", "2")
    assert [row["id"] for row in rows] == [i // 2 for i in range(18)]
    assert not (tmp_path / "out.jsonl.part").exists()


def test_a_completion_is_written_as_soon_as_those_before_it_are() -> None:
    prompts = [EncodedPrompt([1], {"id": i}, f"p{i}") for i in range(3)]
    completion = Completion([2], [-1.0], [-1.0], "stop", "c")
    written: list[int] = []
    records = Records(prompts, None, False, lambda record: written.append(record["id"]))
    records.add(1, [completion, completion])
    assert written == []
    records.add(0, [completion])
    assert written == [0, 1, 1]
    records.add(2, [completion])
    assert written == [0, 1, 1, 2]


def test_a_part_of_a_file_does_not_have_its_name(
    policy: Path, tmp_path: Path, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted after the first records, with an older file in place."""
    out = tmp_path / "out.jsonl"
    out.write_text("older\n")
    add, added = Records.add, []

    def interrupted(self: Records, index: int, completions: list[Completion]) -> None:
        add(self, index, completions)
        added.append(index)
        if len(added) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(Records, "add", interrupted)
    argv = ["generate", "--model", str(policy), "--data", data, "--out", str(out), "--overwrite"]
    assert main([*argv, "--max_new_tokens=6"]) == 130
    assert out.read_text() == "older\n"
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl.part").open()]
    assert [row["id"] for row in rows] == sorted(row["id"] for row in rows)


def test_a_stop_string_ends_the_text(policy: Path, tmp_path: Path) -> None:
    argv = ["--prompt", "1+1=", "--temperature=0"]
    (whole,) = generated(policy, tmp_path / "whole.jsonl", *argv)
    text = whole["completion"]
    assert len(text) > 2
    (cut,) = generated(policy, tmp_path / "cut.jsonl", *argv, "--stop", "a, b", "--stop", text[1])
    assert cut["finish_reason"] == "stop"
    assert cut["completion"] == text[: text.index(text[1])]


def test_texts_with_commas_are_one_prompt(policy: Path, tmp_path: Path) -> None:
    rows = generated(policy, tmp_path / "out.jsonl", "--prompt", "1, 2", "--prompt", "3")
    assert [row["prompt"] for row in rows] == ["1, 2", "3"]


def test_a_stream_is_the_same_text(policy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["generate", "--model", str(policy), "--prompt", "1+1=", "--max_new_tokens=9"]
    printed = []
    for options in ([], ["--stream"]):
        assert main([*argv, "--seed=3", *options]) == 0
        printed.append(capsys.readouterr())
    assert printed[0].out == printed[1].out
    assert "prefill: 4 tokens" in printed[1].err and "decoding: " in printed[1].err


def test_completions_fit_the_room_that_each_prompt_leaves(
    work: Any, policy: Path, tmp_path: Path
) -> None:
    """The model has 64 positions: a long prompt must not shorten the others."""
    data = work.write("p.jsonl", {"prompt": "1" * 60, "id": 0}, {"prompt": "1+1=", "id": 1})
    argv = ["generate", "--model", str(policy), "--data", data, "--out", str(tmp_path / "o.jsonl")]
    assert main([*argv, "--min_new_tokens=1"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "o.jsonl").open()]
    assert [row["id"] for row in rows] == [0, 1]
    assert len(rows[0]["completion"]) <= 4


def test_the_best_is_the_one_that_scores_highest(
    policy: Path, reward_model: Path, tmp_path: Path, data: str
) -> None:
    argv = ["--data", data, "--num_return_sequences=5", "--reward_model", str(reward_model)]
    rows = generated(policy, tmp_path / "all.jsonl", *argv)
    best = generated(policy, tmp_path / "best.jsonl", *argv, "--best")
    assert [row["id"] for row in best] == list(range(9))
    for i, row in enumerate(best):
        scores = [other["score"] for other in rows[5 * i : 5 * i + 5]]
        assert row == rows[5 * i + scores.index(max(scores))]


def test_scores_are_those_of_the_score_command(
    policy: Path, reward_model: Path, tmp_path: Path, data: str
) -> None:
    argv = ["--data", data, "--reward_model", str(reward_model)]
    rows = generated(policy, tmp_path / "all.jsonl", *argv)
    # What text says again: bytes that are no characters would be other tokens.
    kept = [row for row in rows if row["completion"].isascii()]
    assert kept
    texts, again = tmp_path / "texts.jsonl", tmp_path / "again.jsonl"
    texts.write_text("".join(json.dumps(row) + "\n" for row in kept))
    argv = ["score", "--model", str(reward_model), "--data", str(texts), "--out", str(again)]
    assert main(argv) == 0
    scores = [json.loads(line)["score"] for line in again.open()]
    assert scores == pytest.approx([row["score"] for row in kept], abs=1e-5)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--prompt=a", "--best"], "--best needs --reward_model"),
        (["--prompt=a", "--cache-gb=0"], "--cache_gb: expected more than 0, found 0.0"),
        (["--prompt", "a", "b", "--stream"], "one completion of one --prompt"),
        (["--prompt=a", "--stream", "--num_return_sequences=2"], "one completion of one --prompt"),
        (["--data=x", "--stream"], "one completion of one --prompt"),
        (["--prompt=a", "--stream", "--out=x"], "it goes without --out"),
        (["--prompt=a", "--top_p=2"], r"top_p: expected a number in (0, 1], found 2.0"),
        (["--prompt=a", "--min_new_tokens=9", "--max_new_tokens=3"], "min_new_tokens: expected"),
        (["--prompt=a", "--weights=int4"], "--weights: expected one of auto, int8, found 'int4'"),
    ],
)
def test_mistakes_are_said_before_the_model_is_read(
    work: Any, argv: list[str], message: str
) -> None:
    status, line = work.failing(["generate", "--model=nowhere", *argv])
    assert status == 2
    assert message in line

"""Every mistake is one clear line with its exit code, and nothing is overwritten."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from fastllm.cli import main
from fastllm.cli.commands import Command
from fastllm.cli.options import UsageError

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["stf"], "unknown command 'stf'; did you mean sft?"),
        (["--quiet"], "unknown option '--quiet'"),
        (["sft"], "sft needs --data"),
        (["grpo"], "grpo needs --data, --policy"),
        (["sft", "--data=x", "--learning_rat=1"], "did you mean --learning_rate?"),
        (["rm", "--data=x", "--num_generations=4"], "unknown option --num_generations"),
        (["sft", "--data=x", "--max_steps=0"], "max_steps must be positive or -1, found 0"),
        (["sft", "--data=x", "--eval_fraction=2"], "eval_fraction must lie in [0, 1), found 2.0"),
        (["sft", "--data=x", "--lora_r=4"], "the --lora_ options need --use_peft"),
        (["sft", "--data=x", "--model=m", "--n_layer=4"], "--n_layer: for a model from scratch"),
        (["sft", "--data=x", "--config=none.yaml"], "--config: no such file: none.yaml"),
        (["grpo", "--data=x", "--policy=p"], "grpo needs --reward PATH or --reward_func"),
        (["generate", "--model=m"], "generate needs either --prompt or --data"),
        (["generate", "--model=m", "--prompt=a", "--data=x"], "either --prompt or --data"),
    ],
)
def test_usage_errors(work: Any, argv: list[str], message: str) -> None:
    status, line = work.failing(argv)
    assert status == 2
    assert message in line


BAD_FILES = {
    "missing key": ('{"prompt": "a", "chosen": "b"}\n', r"bad\.jsonl:1: missing 'rejected'"),
    "wrong type": (
        '{"chosen": "b", "rejected": 3}\n',
        r"bad\.jsonl:1: 'rejected' must be a string or a list of messages, found int",
    ),
    "empty": ("", r"bad\.jsonl: empty file"),
    "not JSON": (
        '{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": \n',
        r"bad\.jsonl:2: not JSON",
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_data_cites_file_and_line(work: Any, tmp_path: Path, case: str) -> None:
    text, message = BAD_FILES[case]
    (tmp_path / "bad.jsonl").write_text(text)
    out = tmp_path / "run"
    status, line = work.failing(
        ["rm", "--data", str(tmp_path / "bad.jsonl"), "--out", str(out), *work.quick]
    )
    assert status == 3
    assert re.search(message, line), line
    assert not out.exists()


def test_a_data_file_that_is_not_there(work: Any, tmp_path: Path) -> None:
    status, line = work.failing(
        ["sft", "--data", str(tmp_path / "no.jsonl"), "--out", str(tmp_path / "run")]
    )
    assert status == 3
    assert "no.jsonl" in line and "No such file" in line
    assert not (tmp_path / "run").exists()


def test_a_prompt_longer_than_the_model(work: Any, tmp_path: Path, policy: Path) -> None:
    data = work.write("long.jsonl", {"prompt": "1+1="}, {"prompt": "x" * 100})
    argv = ["grpo", "--data", data, "--policy", str(policy), "--out", str(tmp_path / "run")]
    argv += ["--reward_func", "fastllm.data.tasks:exact_match", "--max_completion_length=8"]
    status, line = work.failing(argv)
    assert status == 3
    assert "long.jsonl:2: the prompt has 100 tokens" in line
    assert not (tmp_path / "run").exists()


def test_a_reward_model_with_another_vocabulary(work: Any, tmp_path: Path, policy: Path) -> None:
    words = [{"chosen": f"word word {i}", "rejected": f"word words {i}"} for i in range(24)]
    pairs, other = work.write("words.jsonl", *words), tmp_path / "other"
    argv = ["rm", "--data", pairs, "--out", str(other), "--tokenizer=bpe", "--vocab_size=300"]
    assert main([*argv, *work.quick]) == 0
    data = work.write("prompts.jsonl", {"prompt": "1+1="}, {"prompt": "2+1="})
    argv = ["grpo", "--data", data, "--policy", str(policy), "--reward", str(other)]
    argv += ["--max_completion_length=8", "--out", str(tmp_path / "run")]
    status, line = work.failing(argv)
    assert status == 3
    assert "vocabular" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", ["sft", "grpo", "generate", "score"])
def test_a_folder_that_is_no_checkpoint(work: Any, tmp_path: Path, command: str) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "notes.txt").write_text("nothing here")
    model, out = str(tmp_path / "model"), str(tmp_path / "out")
    data = work.write("d.jsonl", {"prompt": "1+1=", "completion": "2"})
    argv = {
        "sft": ["sft", "--data", data, "--model", model, "--out", out],
        "grpo": ["grpo", "--data", data, "--policy", model, "--reward", model, "--out", out],
        "generate": ["generate", "--model", model, "--prompt", "a"],
        "score": ["score", "--model", model, "--data", data],
    }[command]
    status, line = work.failing(argv)
    assert status != 0
    assert "expected a run folder" in line and "notes.txt" in line
    assert not Path(out).exists()


def test_a_language_model_cannot_score(work: Any, policy: Path) -> None:
    data = str(ROOT / "examples/data/pairs.jsonl")
    status, line = work.failing(["score", "--model", str(policy), "--data", data])
    assert status == 2
    assert "expected a reward model" in line


def test_a_backend_that_cannot_serve(
    work: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTLLM_BACKEND", "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    argv = ["sft", "--data", work.sft(), "--out", str(tmp_path / "run"), *work.quick]
    status, line = work.failing(argv)
    assert status != 0
    assert "'triton' was requested but cannot serve" in line


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTLLM_DEBUG", "1")
    with pytest.raises(UsageError):
        main(["sft"])


def test_interruption_is_not_success(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(self: Command) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(Command, "load", interrupted)
    assert main(["env"]) == 130
    assert capsys.readouterr().err == "fastllm: interrupted\n"


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_a_run_is_never_overwritten_unasked(work: Any, policy: Path) -> None:
    before = contents(policy)
    argv = ["sft", "--data", work.sft(), "--out", str(policy), *work.quick]
    status, line = work.failing(argv)
    assert status == 2
    assert "holds a finished run" in line and "--resume auto" in line and "--overwrite" in line
    assert contents(policy) == before


def test_an_unfinished_run_is_kept_too(work: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "checkpoint-1").mkdir(parents=True)
    argv = ["rm", "--data", work.pairs(), "--out", str(run), *work.quick]
    status, line = work.failing(argv)
    assert status == 2
    assert "holds an unfinished run" in line


def test_overwrite_replaces_a_run(work: Any, tmp_path: Path) -> None:
    argv = ["sft", "--data", work.sft(), "--out", str(tmp_path / "run"), *work.quick]
    assert main(argv) == 0
    assert main([*argv, "--seed=1"]) == 2
    assert main([*argv, "--seed=1", "--overwrite"]) == 0
    assert json.loads((tmp_path / "run/run.json").read_text())["config"]["seed"] == 1


def test_resume_continues_a_run(work: Any, tmp_path: Path) -> None:
    argv = ["sft", "--data", work.sft(), "--out", str(tmp_path / "run"), *work.quick]
    assert main(argv) == 0
    assert main([*argv, "--max_steps=4", "--resume=auto"]) == 0
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    steps = [record["step"] for record in map(json.loads, lines) if "loss" in record]
    assert steps == [1, 2, 3, 4]


def test_overwrite_and_resume_exclude_each_other(work: Any, tmp_path: Path) -> None:
    argv = ["sft", "--data=x", "--out", str(tmp_path), "--resume=auto", "--overwrite"]
    status, line = work.failing(argv)
    assert (status, "choose one" in line) == (2, True)


def test_an_output_file_is_kept(work: Any, tmp_path: Path, policy: Path) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text("precious")
    argv = ["generate", "--model", str(policy), "--prompt", "1+1=", "--out", str(out)]
    status, line = work.failing(argv)
    assert (status, out.read_text()) == (2, "precious")
    assert "--overwrite" in line
    assert main([*argv, "--overwrite"]) == 0
    assert "precious" not in out.read_text()

"""What the commands do."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fastllm import RewardModel
from fastllm.cli import main
from fastllm.cli.options import UsageError


def test_a_run_reports_held_out_figures(
    work: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main(["rm", "--data", work.pairs(), "--out", str(out), *work.quick]) == 0
    printed = capsys.readouterr().out
    for word in ("held-out accuracy", "held-out loss", "tokens/s", str(out)):
        assert word in printed


def test_grpo_mixes_reward_models_and_functions(
    work: Any, tmp_path: Path, policy: Path, reward_model: Path
) -> None:
    (tmp_path / "mine.py").write_text(
        "def short(completions, **columns):\n    return [-float(len(c)) for c in completions]\n"
    )
    data = work.write(
        "prompts.jsonl", *({"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(8))
    )
    out = tmp_path / "run"
    argv = ["grpo", "--data", data, "--policy", str(policy), "--reward", str(reward_model)]
    argv += ["--reward_func", f"{tmp_path / 'mine.py'}:short", "fastllm.data.tasks:exact_match"]
    argv += ["--reward_weights", "1", "0.1", "2", "--num_generations=4", "--out", str(out)]
    argv += ["--max_completion_length=4", "--max_steps=2", "--logging_steps=1", "--device=cpu"]
    assert main(argv) == 0
    names = {name for line in (out / "metrics.jsonl").open() for name in json.loads(line)}
    assert {"rewards/short/mean", "rewards/exact_match/mean"} <= names


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("exact_match", "expected module:function, found 'exact_match'"),
        ("fastllm.data.tasks:exact", "fastllm.data.tasks has no function 'exact'"),
        ("no_such_module_here:f", "there is no module 'no_such_module_here'"),
        ("nowhere.py:f", "no such file: nowhere.py"),
    ],
)
def test_reward_functions_that_are_not_there(name: str, message: str) -> None:
    from fastllm.cli.train import load_function

    with pytest.raises(UsageError, match=re.escape(f"--reward_func: {message}")):
        load_function(name)


def test_lora_from_the_command_line(work: Any, tmp_path: Path, policy: Path) -> None:
    out = tmp_path / "run"
    argv = ["sft", "--data", work.sft(), "--model", str(policy), "--out", str(out)]
    argv += ["--use_peft", "--lora_r=2", "--lora_target_modules", "q_proj", "v_proj"]
    assert main([*argv, "--max_steps=1", "--device=cpu"]) == 0
    adapter = json.loads((out / "adapter_config.json").read_text())
    assert (adapter["r"], set(adapter["target_modules"])) == (2, {"q_proj", "v_proj"})


def test_generate_writes_records(work: Any, tmp_path: Path, policy: Path) -> None:
    data = work.write("p.jsonl", {"prompt": "1+1=", "id": 7}, {"prompt": "2+1=", "id": 8})
    argv = ["generate", "--model", str(policy), "--data", data, "--num_return_sequences=2"]
    argv += ["--max_new_tokens=3", "--seed=5"]
    rows = []
    for name in ("a.jsonl", "b.jsonl"):
        assert main([*argv, "--out", str(tmp_path / name)]) == 0
        rows.append([json.loads(line) for line in (tmp_path / name).open()])
    assert rows[0] == rows[1]  # the seed decides
    assert [row["id"] for row in rows[0]] == [7, 7, 8, 8]
    assert all(row["finish_reason"] in ("stop", "length") for row in rows[0])
    assert all(row["logprob"] < 0 for row in rows[0])


def test_generate_prints_text(policy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["generate", "--model", str(policy), "--prompt", "1+1=", "--temperature=0"]
    assert main([*argv, "--max_new_tokens=2"]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("1+1=")
    assert "tokens/s" in printed.err


def test_score_pairs(
    work: Any, tmp_path: Path, reward_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = work.pairs(), tmp_path / "scores.jsonl"
    argv = ["score", "--model", str(reward_model), "--data", data, "--out", str(out)]
    assert main([*argv, "--batch_size=5"]) == 0
    rows = [json.loads(line) for line in out.open()]
    right = sum(row["chosen_score"] > row["rejected_score"] for row in rows)
    printed = capsys.readouterr().out
    assert f"({right} of 24 pairs)" in printed
    assert "samples/s" in printed


def test_texts_and_pairs_score_alike(work: Any, tmp_path: Path, reward_model: Path) -> None:
    model = str(reward_model)
    texts = [{"prompt": f"{i}+1=", "completion": str(i + 1)} for i in range(24)]
    files = {
        "pairs": work.pairs(),
        "completions": work.write("texts.jsonl", *texts),
        "whole": work.write(
            "whole.jsonl", *({"text": t["prompt"] + t["completion"]} for t in texts)
        ),
    }
    scores = {}
    for name, data in files.items():
        out = tmp_path / f"{name}_scores.jsonl"
        assert main(["score", "--model", model, "--data", data, "--out", str(out)]) == 0
        rows = [json.loads(line) for line in out.open()]
        scores[name] = [row["chosen_score" if name == "pairs" else "score"] for row in rows]
    assert scores["completions"] == pytest.approx(scores["pairs"], abs=1e-5)
    assert scores["whole"] == pytest.approx(scores["pairs"], abs=1e-5)


def test_neighbours_that_complete_one_prompt_score_as_apart(
    work: Any, tmp_path: Path, reward_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And their prompt is computed once."""
    answers = ["1", "11", "1", "12", "", "2"]
    texts = [{"prompt": p, "completion": a} for p in ("1+2+3+4+5=", "7=") for a in answers]
    apart = [text for pair in zip(texts[:6], texts[6:], strict=True) for text in pair]
    computed, scores = [], []
    forward = RewardModel.score_rows
    monkeypatch.setattr(
        RewardModel,
        "score_rows",
        lambda self, ids, *rest: computed.append(len(ids)) or forward(self, ids, *rest),
    )
    for records in (texts, apart):
        data, out = work.write("texts.jsonl", *records), tmp_path / "scores.jsonl"
        argv = ["score", "--model", str(reward_model), "--data", data, "--out", str(out)]
        assert main([*argv, "--overwrite"]) == 0
        rows = [json.loads(line) for line in out.open()]
        scores.append({(row["prompt"], row["completion"]): row["score"] for row in rows})
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)
    assert computed[0] < 0.7 * computed[1]


def test_a_text_longer_than_the_reward_model_is_not_cut(work: Any, reward_model: Path) -> None:
    data = work.write("long.jsonl", {"text": "x" * 100})
    status, line = work.failing(["score", "--model", str(reward_model), "--data", data])
    assert status == 3
    assert "long.jsonl:1: 101 tokens, but the model reads at most 64" in line


def test_missing_kernels_are_said(
    policy: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastllm.ops import cpp

    monkeypatch.setattr(cpp, "available", lambda: False)
    monkeypatch.setattr(cpp, "reason", lambda: "C++ extension not built")
    argv = ["generate", "--model", str(policy), "--prompt", "1+1=", "--device=cpu"]
    assert main([*argv, "--max_new_tokens=1"]) == 0
    assert "ops run on PyTorch, slower: C++ extension not built" in capsys.readouterr().err


def test_sigterm_leaves_a_checkpoint_to_resume_from(work: Any, tmp_path: Path) -> None:
    out = tmp_path / "run"
    argv = ["sft", "--data", work.sft(), "--out", str(out), *work.quick, "--max_steps=100000"]
    command = [sys.executable, "-m", "fastllm", *argv, "--save_steps=100000"]
    root = Path(__file__).parents[2]
    run = subprocess.Popen(command, cwd=root, stderr=subprocess.PIPE, text=True)
    assert run.stderr is not None
    next(line for line in run.stderr if "step 3/" in line)
    run.send_signal(signal.SIGTERM)
    said = run.stderr.read()
    assert run.wait(60) == 143
    found = re.search(r"warning: ended by SIGTERM after step (\d+) of 100000; resume from", said)
    assert found is not None and "Traceback" not in said, said
    step = int(found[1])
    assert (out / f"checkpoint-{step}" / "manifest.json").is_file()
    assert main([*argv, "--resume", "auto", f"--max_steps={step + 2}"]) == 0
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").open()]
    assert steps[: step + 2] == list(range(1, step + 3))

"""The command line: help without torch, precedence, and every mistake in one line."""

from __future__ import annotations

import dataclasses
import inspect
import json
import logging
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest

from fastllm.cli import main
from fastllm.cli.commands import COMMANDS, Command
from fastllm.cli.config_file import read_config
from fastllm.cli.options import (
    Option,
    UsageError,
    attribute_docstrings,
    build_parser,
    convert,
    options_of,
    parse,
)
from fastllm.training.config import GRPOConfig, RewardConfig, SFTConfig

ROOT = Path(__file__).parent.parent
HELP_SECONDS = 0.5
SMALL = ["--n_layer=1", "--n_head=2", "--n_kv_head=1", "--n_embd=16", "--block_size=64"]
QUICK = [*SMALL, "--max_steps=2", "--logging_steps=1", "--device=cpu"]


@dataclasses.dataclass(kw_only=True)
class Parent:
    steps: int = 3
    """How many
    steps."""
    fast: bool = True


@dataclasses.dataclass(kw_only=True)
class Child(Parent):
    rate: float | None = None
    kind: Literal["a", "b"] = "a"
    """Which 100% kind."""
    weights: list[float] | None = None
    name: str = "x"


OPTIONS = options_of(Child, "all")


def parsed(*argv: str) -> dict[str, Any]:
    return parse(build_parser("test", "", OPTIONS), OPTIONS, argv)


def write_lines(path: Path, *records: object) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def pairs_file(folder: Path, count: int = 24) -> str:
    records = [
        {"prompt": f"{i}+1=", "chosen": str(i + 1), "rejected": str(i + 2)} for i in range(count)
    ]
    return write_lines(folder / "pairs.jsonl", *records)


def sft_file(folder: Path, count: int = 24) -> str:
    records = [{"prompt": f"{i}+1=", "completion": str(i + 1)} for i in range(count)]
    return write_lines(folder / "sft.jsonl", *records)


@pytest.fixture(scope="module", autouse=True)
def log_of_the_process() -> Iterator[None]:
    """A command sets up the log of its process; other tests share this one."""
    logger = logging.getLogger("fastllm")
    level, propagate, handlers = logger.level, logger.propagate, list(logger.handlers)
    yield
    logger.setLevel(level)
    logger.propagate, logger.handlers = propagate, handlers


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy of two steps, made by the command."""
    folder = tmp_path_factory.mktemp("policy")
    assert main(["sft", "--data", sft_file(folder), "--out", str(folder / "run"), *QUICK]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model of two steps, made by the command."""
    folder = tmp_path_factory.mktemp("reward")
    assert main(["rm", "--data", pairs_file(folder), "--out", str(folder / "run"), *QUICK]) == 0
    return folder / "run"


# -- help ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("argv", [[], *([name] for name in COMMANDS)])
def test_help_imports_no_torch(argv: list[str]) -> None:
    code = (
        f"import sys; from fastllm.cli import main; status = main({[*argv, '--help']}); "
        "heavy = {'torch', 'tokenizers', 'rich', 'yaml', 'numpy'} & set(sys.modules); "
        "assert not heavy, heavy; sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: fastllm")


def test_help_answers_at_once() -> None:
    def seconds() -> float:
        start = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "fastllm", "grpo", "--help"],
            cwd=ROOT,
            check=True,
            stdout=subprocess.DEVNULL,
        )
        return time.perf_counter() - start

    # The best of some tries: the others may have waited for a busy processor.
    assert min(seconds() for _ in range(5)) < HELP_SECONDS


def test_help_shows_each_field_with_its_docstring(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["grpo", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(GRPOConfig):
        assert re.search(rf"--(\[no-\])?{field.name}\b", text), field.name
    assert "Completions of each prompt (G). (default: 8)" in text
    assert "--no_packing" not in text.replace("--[no-]packing", "")
    assert "--max-steps" not in text  # taken, but shown once


def test_no_command_is_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "usage: fastllm" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    import fastllm

    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == fastllm.__version__


# -- options ---------------------------------------------------------------------------------------


def test_attribute_docstrings_are_inherited() -> None:
    assert attribute_docstrings(Child) == {
        "steps": "How many steps.",
        "kind": "Which 100% kind.",
    }


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--steps", "5"], {"steps": 5}),
        (["--steps=-1"], {"steps": -1}),
        (["--steps", "-1"], {"steps": -1}),
        (["--rate", "1e-5"], {"rate": 1e-5}),
        (["--rate", "3"], {"rate": 3.0}),
        (["--rate", "none"], {"rate": None}),
        (["--fast"], {"fast": True}),
        (["--no-fast"], {"fast": False}),
        (["--no_fast"], {"fast": False}),
        (["--fast", "false"], {"fast": False}),
        (["--fast=True"], {"fast": True}),
        (["--kind", "b"], {"kind": "b"}),
        (["--weights", "1", "0.5"], {"weights": [1.0, 0.5]}),
        (["--weights", "1,0.5"], {"weights": [1.0, 0.5]}),
        (["--weights", "null"], {"weights": None}),
        (["--name", "none"], {"name": "none"}),
        ([], {}),
    ],
)
def test_values_take_the_type_of_their_field(argv: list[str], expected: dict[str, Any]) -> None:
    given = parsed(*argv)
    assert given == expected
    assert [type(value) for value in given.values()] == [type(v) for v in expected.values()]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--steps", "many"], "--steps: expected an integer, found 'many'"),
        (["--steps", "1.5"], "--steps: expected an integer, found '1.5'"),
        (["--steps"], "argument --steps: expected one argument"),
        (["--rate", "high"], "--rate: expected a number, found 'high'"),
        (["--fast", "perhaps"], "--fast: expected true or false, found 'perhaps'"),
        (["--kind", "c"], "--kind: expected one of a, b, found 'c'"),
        (["--weights", "1,x"], "--weights: expected a list, each a number, found ['1,x']"),
        (["--step", "5"], "unknown option --step; did you mean --steps?"),
        (["--wieghts=1"], "unknown option --wieghts; did you mean --weights?"),
        (["--zzz"], "unknown option --zzz"),
        (["5"], "unexpected argument '5': options start with --"),
    ],
)
def test_mistakes_say_what_was_expected(argv: list[str], message: str) -> None:
    with pytest.raises(UsageError) as error:
        parsed(*argv)
    assert str(error.value) == message


def test_dashes_and_underscores_are_one() -> None:
    options = [Option(name="max_steps", hint=int)]
    parser = build_parser("test", "", options)
    for spelling in ("--max_steps", "--max-steps"):
        assert parse(parser, options, [spelling, "7"]) == {"max_steps": 7}


def test_every_option_of_every_command_has_a_type() -> None:
    for command in COMMANDS.values():
        for option in command.options():
            with pytest.raises(UsageError, match="expected"):
                convert({"a": "mapping"}, option.hint, option.name)


@pytest.mark.parametrize("name", ["sft", "rm"])
def test_defaults_shown_are_those_of_the_functions(name: str) -> None:
    from fastllm import train_rm, train_sft

    function = {"sft": train_sft, "rm": train_rm}[name]
    defaults = {p.name: p.default for p in inspect.signature(function).parameters.values()}
    shown = {option.name: option.default for option in COMMANDS[name].options()}
    for size in ("n_layer", "n_head", "n_kv_head", "n_embd", "vocab_size", "tokenizer"):
        assert shown[size] == defaults[size], size


def test_lora_defaults_shown_are_those_of_its_config() -> None:
    from fastllm.cli.train import LORA
    from fastllm.model.lora_config import LoraConfig

    shown = {option.name: option.default for option in COMMANDS["sft"].options()}
    config = LoraConfig()
    for option, field in LORA.items():
        if option != "lora_target_modules":
            assert shown[option] == getattr(config, field), option
    assert config == LoraConfig(target_modules="all-linear")


# -- the configuration file ------------------------------------------------------------------------


def config_file(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text)
    return path


def test_yaml_values_take_the_type_of_their_field(tmp_path: Path) -> None:
    path = config_file(tmp_path, "rate: 1e-5\nsteps: 4\nfast: no\nweights: [1, 0.5]\nkind: b\n")
    assert read_config(path, OPTIONS) == {
        "rate": 1e-5,  # which YAML 1.1 takes for a string
        "steps": 4,
        "fast": False,
        "weights": [1.0, 0.5],
        "kind": "b",
    }


def test_yaml_null_is_none_where_that_is_a_value(tmp_path: Path) -> None:
    assert read_config(config_file(tmp_path, "rate: null\n"), OPTIONS) == {"rate": None}
    with pytest.raises(UsageError, match="steps: expected an integer, found None"):
        read_config(config_file(tmp_path, "steps: null\n"), OPTIONS)


def test_an_empty_yaml_file_sets_nothing(tmp_path: Path) -> None:
    assert read_config(config_file(tmp_path, "# nothing\n"), OPTIONS) == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepps: 4\n", "unknown key 'stepps'; did you mean steps?"),
        ("steps: 1.5\n", "steps: expected an integer, found 1.5"),
        ("steps: true\n", "steps: expected an integer, found True"),
        ("steps: [1]\n", r"steps: expected an integer, found \[1\]"),
        ("- steps\n", "expected `key: value` lines, found a list"),
        ("steps: [1\n", "not YAML"),
    ],
)
def test_yaml_mistakes_name_the_file(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=rf"run\.yaml: {message}"):
        read_config(config_file(tmp_path, text), OPTIONS)


def test_the_command_line_wins_over_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def record(values: dict[str, Any]) -> int:
        seen.update(values)
        return 0

    monkeypatch.setattr(Command, "load", lambda self: record)
    path = config_file(tmp_path, "learning-rate: 1e-5\nmax_steps: 5\nout: from_yaml\n")
    argv = ["sft", "--data", "x.jsonl", "--config", str(path), "--max-steps", "7"]
    assert main(argv) == 0
    assert (seen["learning_rate"], seen["max_steps"]) == (1e-5, 7)
    assert seen["output_dir"] == Path("from_yaml")
    assert "num_train_epochs" not in seen  # the default is the config's own


def test_yaml_may_give_what_is_required(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Command, "load", lambda self: lambda values: 0)
    path = config_file(tmp_path, "data: x.jsonl\n")
    assert main(["sft", "--config", str(path)]) == 0
    assert main(["sft"]) == 2


# -- mistakes --------------------------------------------------------------------------------------


def run_failing(capsys: pytest.CaptureFixture[str], argv: list[str]) -> tuple[int, str]:
    """Exit code and the one line of an error."""
    status = main(argv)
    printed = capsys.readouterr()
    lines = [line for line in printed.err.splitlines() if line.startswith("fastllm: error: ")]
    assert len(lines) == 1, printed.err
    assert printed.err.splitlines()[-1] == lines[0]
    assert "Traceback" not in printed.err
    return status, lines[0].removeprefix("fastllm: error: ")


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
def test_usage_errors(capsys: pytest.CaptureFixture[str], argv: list[str], message: str) -> None:
    status, line = run_failing(capsys, argv)
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
def test_bad_data_cites_file_and_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    text, message = BAD_FILES[case]
    (tmp_path / "bad.jsonl").write_text(text)
    out = tmp_path / "run"
    status, line = run_failing(
        capsys, ["rm", "--data", str(tmp_path / "bad.jsonl"), "--out", str(out), *QUICK]
    )
    assert status == 3
    assert re.search(message, line), line
    assert not out.exists()


def test_a_data_file_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, line = run_failing(
        capsys, ["sft", "--data", str(tmp_path / "no.jsonl"), "--out", str(tmp_path / "run")]
    )
    assert status == 3
    assert "no.jsonl" in line and "No such file" in line
    assert not (tmp_path / "run").exists()


def test_a_prompt_longer_than_the_model(
    tmp_path: Path, policy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_lines(tmp_path / "long.jsonl", {"prompt": "1+1="}, {"prompt": "x" * 100})
    argv = ["grpo", "--data", data, "--policy", str(policy), "--out", str(tmp_path / "run")]
    argv += ["--reward_func", "fastllm.data.tasks:exact_match", "--max_completion_length=8"]
    status, line = run_failing(capsys, argv)
    assert status == 3
    assert "long.jsonl:2: the prompt has 100 tokens" in line
    assert not (tmp_path / "run").exists()


def test_a_reward_model_with_another_vocabulary(
    tmp_path: Path, policy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [{"chosen": f"word word {i}", "rejected": f"word words {i}"} for i in range(24)]
    pairs, other = write_lines(tmp_path / "words.jsonl", *words), tmp_path / "other"
    argv = ["rm", "--data", pairs, "--out", str(other), "--tokenizer=bpe", "--vocab_size=300"]
    assert main([*argv, *QUICK]) == 0
    data = write_lines(tmp_path / "prompts.jsonl", {"prompt": "1+1="}, {"prompt": "2+1="})
    argv = ["grpo", "--data", data, "--policy", str(policy), "--reward", str(other)]
    argv += ["--max_completion_length=8", "--out", str(tmp_path / "run")]
    status, line = run_failing(capsys, argv)
    assert status == 3
    assert "vocabular" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", ["sft", "grpo", "generate", "score"])
def test_a_folder_that_is_no_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "notes.txt").write_text("nothing here")
    model, out = str(tmp_path / "model"), str(tmp_path / "out")
    data = write_lines(tmp_path / "d.jsonl", {"prompt": "1+1=", "completion": "2"})
    argv = {
        "sft": ["sft", "--data", data, "--model", model, "--out", out],
        "grpo": ["grpo", "--data", data, "--policy", model, "--reward", model, "--out", out],
        "generate": ["generate", "--model", model, "--prompt", "a"],
        "score": ["score", "--model", model, "--data", data],
    }[command]
    status, line = run_failing(capsys, argv)
    assert status != 0
    assert "expected a run folder" in line and "notes.txt" in line
    assert not Path(out).exists()


def test_a_language_model_cannot_score(policy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = str(ROOT / "examples/data/pairs.jsonl")
    status, line = run_failing(capsys, ["score", "--model", str(policy), "--data", data])
    assert status == 2
    assert "expected a reward model" in line


def test_a_backend_that_cannot_serve(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTLLM_BACKEND", "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    argv = ["sft", "--data", sft_file(tmp_path), "--out", str(tmp_path / "run"), *QUICK]
    status, line = run_failing(capsys, argv)
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


# -- what is there is kept -------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_a_run_is_never_overwritten_unasked(
    tmp_path: Path, policy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(policy)
    argv = ["sft", "--data", sft_file(tmp_path), "--out", str(policy), *QUICK]
    status, line = run_failing(capsys, argv)
    assert status == 2
    assert "holds a finished run" in line and "--resume auto" in line and "--overwrite" in line
    assert contents(policy) == before


def test_an_unfinished_run_is_kept_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    (run / "checkpoint-1").mkdir(parents=True)
    argv = ["rm", "--data", pairs_file(tmp_path), "--out", str(run), *QUICK]
    status, line = run_failing(capsys, argv)
    assert status == 2
    assert "holds an unfinished run" in line


def test_overwrite_replaces_a_run(tmp_path: Path) -> None:
    argv = ["sft", "--data", sft_file(tmp_path), "--out", str(tmp_path / "run"), *QUICK]
    assert main(argv) == 0
    assert main([*argv, "--seed=1"]) == 2
    assert main([*argv, "--seed=1", "--overwrite"]) == 0
    assert json.loads((tmp_path / "run/run.json").read_text())["config"]["seed"] == 1


def test_resume_continues_a_run(tmp_path: Path) -> None:
    argv = ["sft", "--data", sft_file(tmp_path), "--out", str(tmp_path / "run"), *QUICK]
    assert main(argv) == 0
    assert main([*argv, "--max_steps=4", "--resume=auto"]) == 0
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    steps = [record["step"] for record in map(json.loads, lines) if "loss" in record]
    assert steps == [1, 2, 3, 4]


def test_overwrite_and_resume_exclude_each_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["sft", "--data=x", "--out", str(tmp_path), "--resume=auto", "--overwrite"]
    status, line = run_failing(capsys, argv)
    assert (status, "choose one" in line) == (2, True)


def test_an_output_file_is_kept(
    tmp_path: Path, policy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text("precious")
    argv = ["generate", "--model", str(policy), "--prompt", "1+1=", "--out", str(out)]
    status, line = run_failing(capsys, argv)
    assert (status, out.read_text()) == (2, "precious")
    assert "--overwrite" in line
    assert main([*argv, "--overwrite"]) == 0
    assert "precious" not in out.read_text()


# -- the commands ----------------------------------------------------------------------------------


def test_a_run_reports_held_out_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert main(["rm", "--data", pairs_file(tmp_path), "--out", str(out), *QUICK]) == 0
    printed = capsys.readouterr().out
    for word in ("held-out accuracy", "held-out loss", "tokens/s", str(out)):
        assert word in printed


def test_grpo_mixes_reward_models_and_functions(
    tmp_path: Path, policy: Path, reward_model: Path
) -> None:
    (tmp_path / "mine.py").write_text(
        "def short(completions, **columns):\n    return [-float(len(c)) for c in completions]\n"
    )
    data = write_lines(
        tmp_path / "prompts.jsonl", *({"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(8))
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


def test_lora_from_the_command_line(tmp_path: Path, policy: Path) -> None:
    out = tmp_path / "run"
    argv = ["sft", "--data", sft_file(tmp_path), "--model", str(policy), "--out", str(out)]
    argv += ["--use_peft", "--lora_r=2", "--lora_target_modules", "q_proj", "v_proj"]
    assert main([*argv, "--max_steps=1", "--device=cpu"]) == 0
    adapter = json.loads((out / "adapter_config.json").read_text())
    assert (adapter["r"], set(adapter["target_modules"])) == (2, {"q_proj", "v_proj"})


def test_generate_writes_records(tmp_path: Path, policy: Path) -> None:
    data = write_lines(
        tmp_path / "p.jsonl", {"prompt": "1+1=", "id": 7}, {"prompt": "2+1=", "id": 8}
    )
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
    tmp_path: Path, reward_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = pairs_file(tmp_path), tmp_path / "scores.jsonl"
    argv = ["score", "--model", str(reward_model), "--data", data, "--out", str(out)]
    assert main([*argv, "--batch_size=5"]) == 0
    rows = [json.loads(line) for line in out.open()]
    right = sum(row["chosen_score"] > row["rejected_score"] for row in rows)
    printed = capsys.readouterr().out
    assert f"({right} of 24 pairs)" in printed
    assert "samples/s" in printed


def test_texts_and_pairs_score_alike(tmp_path: Path, reward_model: Path) -> None:
    model = str(reward_model)
    texts = [{"prompt": f"{i}+1=", "completion": str(i + 1)} for i in range(24)]
    files = {
        "pairs": pairs_file(tmp_path),
        "completions": write_lines(tmp_path / "texts.jsonl", *texts),
        "whole": write_lines(
            tmp_path / "whole.jsonl", *({"text": t["prompt"] + t["completion"]} for t in texts)
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


def test_a_text_longer_than_the_reward_model_is_not_cut(
    tmp_path: Path, reward_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_lines(tmp_path / "long.jsonl", {"text": "x" * 100})
    status, line = run_failing(capsys, ["score", "--model", str(reward_model), "--data", data])
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


def test_env_as_json(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from fastllm import ops

    monkeypatch.setenv("FASTLLM_BACKEND", "torch")
    assert main(["env", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["variables"]["FASTLLM_BACKEND"] == "torch"
    assert set(facts["ops"]) == set(ops.OPS)
    assert facts["ops"]["rms_norm"]["cpu"].startswith("torch (requested: torch)")
    assert "cpu" in facts["devices"]


def test_env_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env"]) == 0
    printed = capsys.readouterr().out
    for word in ("versions:", "torch:", "threads:", "rms_norm on cpu:", "isa:"):
        assert word in printed


def test_python_dash_m() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fastllm", "sft", "--nonsense"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 2
    assert done.stderr.startswith("fastllm: error: unknown option --nonsense")


@pytest.mark.parametrize("config", [SFTConfig, RewardConfig, GRPOConfig])
def test_every_field_of_a_config_is_an_option(config: type) -> None:
    names = {SFTConfig: "sft", RewardConfig: "rm", GRPOConfig: "grpo"}
    options = {option.name for option in COMMANDS[names[config]].options()}
    assert {field.name for field in dataclasses.fields(config)} <= options

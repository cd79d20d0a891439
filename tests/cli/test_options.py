"""Options made from dataclasses, and the same options in a YAML file."""

from __future__ import annotations

import dataclasses
import inspect
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
    more: dict[str, Any] | None = None


OPTIONS = options_of(Child, "all")


def parsed(*argv: str) -> dict[str, Any]:
    return parse(build_parser("test", "", OPTIONS), OPTIONS, argv)


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
        (["--more", '{"a": [1, "b"]}'], {"more": {"a": [1, "b"]}}),
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
        (["--more", "a: 1"], "--more: expected an object (JSON), found 'a: 1'"),
        (["--more", "[1]"], "--more: expected an object (JSON), found '[1]'"),
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
                convert([{"a": "mapping"}], option.hint, option.name)


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


def config_file(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text)
    return path


def test_yaml_values_take_the_type_of_their_field(tmp_path: Path) -> None:
    text = "rate: 1e-5\nsteps: 4\nfast: no\nweights: [1, 0.5]\nkind: b\nmore:\n  a: 2\n"
    path = config_file(tmp_path, text)
    assert read_config(path, OPTIONS) == {
        "rate": 1e-5,  # which YAML 1.1 takes for a string
        "steps": 4,
        "fast": False,
        "weights": [1.0, 0.5],
        "kind": "b",
        "more": {"a": 2},
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

"""Options made from dataclasses: names, types, defaults and help are written once, there."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import difflib
import inspect
import itertools
import json
import sys
import types
import typing
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

_TRUE = ("true", "yes", "on")
_FALSE = ("false", "no", "off")
_NONE = ("none", "null")


class Verbatim(str):
    """In a list: a text that is taken as it is, where others are split at commas."""


class UsageError(ValueError):
    """A command line or a configuration file that asks for something that does not exist."""


@dataclass(frozen=True, kw_only=True)
class Option:
    """One option of a command, and one key of its configuration file."""

    name: str
    hint: Any = str
    """Its type: str, int, float, bool, Path, Literal[...], list[...], dict[...] (JSON on a command
    line), or one of them | None."""
    default: Any = None
    help: str = ""
    group: str = "options"
    aliases: tuple[str, ...] = ()
    metavar: str | None = None
    required: bool = False


class Parser(argparse.ArgumentParser):
    """argparse whose mistakes are UsageErrors and whose abbreviations are mistakes."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=_OneSpelling, **settings)

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


class _OneSpelling(argparse.HelpFormatter):
    """Help that shows an option once, though dashes are taken for underscores."""

    def __init__(self, prog: str, **settings: Any) -> None:
        super().__init__(prog, max_help_position=32, **settings)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        shown: list[str] = []
        for text in action.option_strings:
            if text.replace("-", "_") not in [other.replace("-", "_") for other in shown]:
                shown.append(text)
        if action.nargs == "?":
            return ", ".join(f"--[no-]{text[2:]}" for text in shown)
        values = "" if action.nargs == 0 else f" {self._format_args(action, '')}"
        return ", ".join(shown) + values


def options_of(config: type, group: str, skip: Iterable[str] = ()) -> list[Option]:
    """One option for each field of a dataclass; its help is the field's docstring."""
    hints, helps = typing.get_type_hints(config), attribute_docstrings(config)
    return [
        Option(
            name=field.name,
            hint=hints[field.name],
            default=field.default,
            help=helps.get(field.name, ""),
            group=group,
        )
        for field in dataclasses.fields(config)
        if field.name not in set(skip)
    ]


def attribute_docstrings(config: type) -> dict[str, str]:
    """The string below each field of a class and of its parents, on one line."""
    found: dict[str, str] = {}
    for parent in reversed(config.__mro__[:-1]):
        tree = ast.parse(inspect.getsource(sys.modules[parent.__module__]))
        body = next(
            node.body
            for node in tree.body
            if isinstance(node, ast.ClassDef) and node.name == parent.__name__
        )
        for field, below in itertools.pairwise(body):
            match field, below:
                case (
                    ast.AnnAssign(target=ast.Name(id=name)),
                    ast.Expr(value=ast.Constant(value=str(text))),
                ):
                    found[name] = " ".join(text.split())
    return found


def build_parser(command: str, summary: str, options: Sequence[Option]) -> Parser:
    """The parser of one command. What was not given is absent from its result."""
    parser = Parser(
        prog=f"fastllm {command}",
        usage=f"fastllm {command} [options]",
        description=summary,
        argument_default=argparse.SUPPRESS,
    )
    groups: dict[str, Any] = {}
    for option in options:
        if option.group not in groups:
            groups[option.group] = parser.add_argument_group(option.group)
        _add(groups[option.group], option)
    return parser


def _add(group: Any, option: Option) -> None:
    names = [f"--{name}" for name in (*option.aliases, option.name)]
    dashed = [name.replace("_", "-") for name in names if "_" in name]
    settings: dict[str, Any] = {"dest": option.name, "help": _help(option)}
    plain = _without_none(option.hint)
    if plain is bool:
        group.add_argument(*names, *dashed, nargs="?", const="true", **settings)
        negations = [f"--no-{name[2:]}" for name in (*names, *dashed)]
        negations += [f"--no_{name[2:]}" for name in names]
        settings["help"] = argparse.SUPPRESS
        group.add_argument(*negations, action="store_const", const="false", **settings)
    else:
        if typing.get_origin(plain) is list:
            settings |= {"nargs": "+", "action": "extend"}
        metavar = option.metavar or _metavar(plain)
        group.add_argument(*names, *dashed, metavar=metavar, **settings)


def _help(option: Option) -> str:
    default = option.default
    if option.required:
        note = "(required)"
    elif default is None or default is dataclasses.MISSING:
        note = ""
    else:
        note = f"(default: {str(default).lower() if isinstance(default, bool) else default})"
    return f"{option.help} {note}".strip().replace("%", "%%")


def _metavar(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return "{" + ",".join(str(choice) for choice in typing.get_args(hint)) + "}"
    if typing.get_origin(hint) is list:
        return _metavar(typing.get_args(hint)[0])
    if typing.get_origin(hint) is dict:
        return "JSON"
    return {int: "N", float: "X"}.get(hint, "TEXT")


def parse(parser: Parser, options: Sequence[Option], argv: Sequence[str]) -> dict[str, Any]:
    """The options given on a command line, each as its type asks.

    Raises:
        UsageError: an unknown option (naming the nearest one) or a value of the wrong type.
    """
    namespace, unknown = parser.parse_known_args(list(argv))
    if unknown:
        _unknown_argument(unknown[0], options)
    given = vars(namespace)
    return {
        option.name: convert(given[option.name], option.hint, f"--{option.name}")
        for option in options
        if option.name in given
    }


def _unknown_argument(argument: str, options: Sequence[Option]) -> NoReturn:
    if not argument.startswith("-"):
        raise UsageError(f"unexpected argument {argument!r}: options start with --")
    name = argument.split("=")[0]
    known = [spelling for option in options for spelling in (option.name, *option.aliases)]
    near = nearest(name.lstrip("-").replace("-", "_"), known, prefix="--")
    raise UsageError(f"unknown option {name}{near}")


def nearest(name: str, known: Sequence[str], prefix: str = "") -> str:
    """`; did you mean X?`, or nothing when no known name is near."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean {prefix}{close[0]}?" if close else ""


def convert(value: Any, hint: Any, name: str) -> Any:
    """A value from a command line (text) or a YAML file (typed) as `hint` asks.

    Raises:
        UsageError: saying for `name` what was expected and what was found.
    """
    only = value[0] if isinstance(value, list) and len(value) == 1 else value
    if _is_optional(hint) and (only is None or _word(only) in _NONE):
        return None
    hint = _without_none(hint)
    try:
        return _convert(value, hint)
    except (ValueError, TypeError) as error:
        expected = _expected(hint)
        raise UsageError(f"{name}: expected {expected}, found {value!r}") from error


def _convert(value: Any, hint: Any) -> Any:
    origin = typing.get_origin(hint)
    if origin is Literal:
        choices = {str(choice): choice for choice in typing.get_args(hint)}
        if str(value) not in choices:
            raise ValueError(value)
        return choices[str(value)]
    if origin is list:
        parts = value if isinstance(value, list) else [value]
        of = typing.get_args(hint)[0]
        if of is Verbatim:
            return [str(_convert(part, str)) for part in parts]
        pieces = [
            p for part in parts for p in (part.split(",") if isinstance(part, str) else [part])
        ]
        return [_convert(piece, of) for piece in pieces]
    if origin is dict:
        found = json.loads(value) if isinstance(value, str) else value
        if not isinstance(found, dict):
            raise TypeError(value)
        return found
    if hint is bool:
        return _convert_bool(value)
    if isinstance(value, bool | list | dict) or value is None:
        raise TypeError(value)
    if hint is int and isinstance(value, float):
        raise TypeError(value)
    return hint(value)


def _convert_bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if _word(value) not in _TRUE + _FALSE:
        raise ValueError(value)
    return _word(value) in _TRUE


def _word(value: Any) -> str:
    return value.lower() if isinstance(value, str) else ""


def _is_optional(hint: Any) -> bool:
    return type(None) in typing.get_args(hint) and typing.get_origin(hint) is not Literal


def _without_none(hint: Any) -> Any:
    if typing.get_origin(hint) not in (types.UnionType, typing.Union):
        return hint
    kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)]
    if len(kinds) != 1:
        raise TypeError(f"an option has one type, found {hint}")
    return kinds[0]


def _expected(hint: Any) -> str:
    origin = typing.get_origin(hint)
    if origin is Literal:
        return "one of " + ", ".join(str(choice) for choice in typing.get_args(hint))
    if origin is list:
        return f"a list, each {_expected(typing.get_args(hint)[0])}"
    if origin is dict:
        return "an object (JSON)"
    names = {bool: "true or false", int: "an integer", float: "a number"}
    return names.get(hint, "a text")

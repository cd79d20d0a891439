"""Where chat templates run: jinja2's immutable sandbox, with what transformers adds and no more."""

from __future__ import annotations

import json
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from fastllm.data.chat import BEGIN, END
from fastllm.data.errors import DataError

FAULTS = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)
"""What a template that does not fit its messages raises: jinja2's own errors and Python's."""


@lru_cache(maxsize=32)
def compiled(template: str) -> jinja2.Template:
    """Return a template ready to be rendered; `generation` blocks come out between marks."""
    version = tuple(int(part) for part in jinja2.__version__.split(".")[:3] if part.isdigit())
    if version < (3, 1, 6):
        raise DataError(
            f"chat templates need jinja2 >= 3.1.6, whose sandbox is closed; found "
            f"{jinja2.__version__} (pip install -U jinja2)"
        )
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(
        raise_exception=_raise_exception,
        strftime_now=lambda form: datetime.now().strftime(form),
        dict=_make_dict,
        namespace=_PublicNamespace,
    )
    try:
        return environment.from_string(template)
    except (jinja2.TemplateError, RecursionError) as error:
        raise DataError(f"the chat template is not valid: {error}") from error


class _Generation(Extension):
    """The `{% generation %}` block: its text, enclosed in marks."""

    tags = {"generation"}  # noqa: RUF012  # as jinja2 declares it

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Any) -> str:
        return f"{BEGIN}{caller()}{END}"


class _PublicNamespace(Namespace):
    """jinja2's namespace without underscore names, which lead to Python's internals."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # `self` is a name a template may use
        self, *rest = args
        for name in dict(*rest, **kwargs):
            _check_public(name)
        Namespace.__init__(self, *rest, **kwargs)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_public(name)
        super().__setitem__(name, value)


def _check_public(name: str) -> None:
    if name.startswith("_"):
        raise SecurityError(f"a namespace cannot hold the name {name!r}")


def _make_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )

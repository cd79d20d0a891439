"""`--config file.yaml`: the same options as on the command line, below them in precedence."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .options import Option, UsageError, convert, nearest


def read_config(path: Path, options: Sequence[Option]) -> dict[str, Any]:
    """The options of a YAML file.

    Raises:
        UsageError: no such file, not YAML, an unknown key (naming the nearest one), or a value
            of the wrong type.
    """
    import yaml

    if not path.is_file():
        raise UsageError(f"--config: no such file: {path}")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UsageError(f"{path}: not YAML ({' '.join(str(error).split())})") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UsageError(f"{path}: expected `key: value` lines, found a {type(content).__name__}")
    by_name = {
        spelling: option for option in options for spelling in (option.name, *option.aliases)
    }
    values: dict[str, Any] = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in by_name or name == "config":
            raise UsageError(f"{path}: unknown key {str(key)!r}{nearest(name, list(by_name))}")
        option = by_name[name]
        if option.name in values:
            raise UsageError(f"{path}: {option.name!r} is set twice")
        values[option.name] = convert(value, option.hint, f"{path}: {key}")
    return values

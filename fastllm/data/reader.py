"""Read raw records from files and from memory; every record knows where it came from."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, cast

from fastllm.data.errors import DataError
from fastllm.data.examples import Example

JSON_LINES_ENDINGS = (".jsonl", ".jsonl.gz", ".ndjson", ".ndjson.gz")
JSON_ENDINGS = (".json", ".json.gz")


class Record(dict[str, Any]):
    """A dict that remembers its origin (`pairs.jsonl:17` or `pairs[16]`) for error messages."""

    __slots__ = ("origin",)

    def __init__(self, columns: Mapping[str, Any], origin: str) -> None:
        super().__init__(columns)
        self.origin = origin


def read_records(source: Any, name: str = "records", string_column: str = "text") -> list[Record]:
    """Read records from a file or from memory.

    `source` is the path of a `.jsonl`, `.jsonl.gz` or `.json` file, a Hugging Face `Dataset`, or
    any iterable of dicts, `Example`s, (prompt, response) pairs, (prompt, chosen, rejected)
    triples or strings (which become the column `string_column`). `name` stands for the source in
    messages about records that come from memory. Raises DataError, citing `file:line` or
    `name[index]`, for anything that is not a record.
    """
    if isinstance(source, str | os.PathLike):
        return list(_read_file(Path(source)))
    if isinstance(source, Mapping):
        raise DataError(
            f"{name}: expected a list of records, found one {type(source).__name__} with the keys "
            f"{_listed(source)}; pass [record], or one split of a DatasetDict"
        )
    if not isinstance(source, Iterable):
        raise DataError(
            f"{name}: expected a path or a list of records, found {type(source).__name__}"
        )
    records = [
        _from_memory(item, f"{name}[{index}]", string_column) for index, item in enumerate(source)
    ]
    if not records:
        raise DataError(f"{name}: empty, no records")
    return records


def _from_memory(item: Any, origin: str, string_column: str) -> Record:
    match item:
        case Record():
            return item
        case Mapping():
            return Record(item, origin)
        case Example(prompt, response):
            return Record({"prompt": prompt, "completion": response}, origin)
        case str():
            return Record({string_column: item}, origin)
        case (str() as prompt, str() as response):
            return Record({"prompt": prompt, "completion": response}, origin)
        case (str() as prompt, str() as chosen, str() as rejected):
            return Record({"prompt": prompt, "chosen": chosen, "rejected": rejected}, origin)
    raise DataError(
        f"{origin}: expected a dict, an Example, a tuple of two or three strings or a string, "
        f"found {type(item).__name__}"
    )


def _read_file(path: Path) -> Iterator[Record]:
    name = path.name.lower()
    if not name.endswith(JSON_LINES_ENDINGS + JSON_ENDINGS):
        raise DataError(
            f"{path}: not a data file; expected a name ending in .jsonl, .jsonl.gz or .json"
        )
    empty = True
    try:
        with _open(path) as file:
            records = _parse_json if name.endswith(JSON_ENDINGS) else _parse_lines
            for record in records(file, path):
                empty = False
                yield record
    except OSError as error:
        # gzip reports damaged data as an OSError without a system error code.
        reason = error.strerror or f"damaged gzip file: {error}"
        raise DataError(f"{path}: cannot be read ({reason})") from error
    except (EOFError, zlib.error) as error:
        raise DataError(f"{path}: damaged gzip file ({error})") from error
    if empty:
        raise DataError(f"{path}: empty file, no records")


def _open(path: Path) -> BinaryIO:
    if path.name.lower().endswith(".gz"):
        return cast(BinaryIO, gzip.open(path, "rb"))
    return path.open("rb")


def _parse_lines(file: Iterable[bytes], path: Path) -> Iterator[Record]:
    # Lines end at "\n" only: JSON strings may hold other line separators unescaped.
    for number, line in enumerate(file, start=1):
        origin = f"{path}:{number}"
        text = (
            _decode(line, origin).removeprefix("\ufeff") if number == 1 else _decode(line, origin)
        )
        if text.strip():
            yield _object(_parse(text, origin), origin)


def _parse_json(file: BinaryIO, path: Path) -> Iterator[Record]:
    content = file.read()
    text = _decode(content, str(path)).removeprefix("\ufeff")
    if text.lstrip().startswith("{"):  # JSON lines under the name .json, as the Hub has many
        yield from _parse_lines(content.splitlines(keepends=True), path)
    elif text.strip():
        values = _parse(text, str(path))
        if not isinstance(values, list):
            raise DataError(f"{path}: expected a list of records, found {type(values).__name__}")
        for index, value in enumerate(values):
            origin = f"{path}[{index}]"
            yield _object(value, origin)


def _object(value: Any, origin: str) -> Record:
    if isinstance(value, dict):
        return Record(value, origin)
    hint = "; a file that holds one list is named .json" if isinstance(value, list) else ""
    raise DataError(f"{origin}: expected a JSON object, found {type(value).__name__}{hint}")


def _decode(line: bytes, origin: str) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{origin}: not UTF-8 (byte 0x{line[error.start]:02x} at column {error.start + 1})"
        ) from error


def _parse(text: str, origin: str) -> Any:
    try:
        value = _DECODER.decode(text.strip())
        if "\\ud" in text.lower():  # only an escape can smuggle half a surrogate pair into UTF-8
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        return value
    except json.JSONDecodeError as error:
        # The parser counts from the stripped text; a record of one line has no other offset.
        skipped = len(text) - len(text.lstrip())
        where = f"line {error.lineno} column" if error.lineno > 1 else "column"
        column = error.colno + (skipped if error.lineno == 1 else 0)
        raise DataError(f"{origin}: not JSON ({error.msg} at {where} {column})") from error
    except UnicodeEncodeError as error:
        surrogate = f"\\u{ord(error.object[error.start]):04x}"
        raise DataError(f"{origin}: half a surrogate pair ({surrogate}) is not text") from error
    except RecursionError as error:
        raise DataError(f"{origin}: nested too deeply") from error
    except ValueError as error:
        raise DataError(f"{origin}: {error}") from error


def _reject_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON; a number must be finite")


def _finite(digits: str) -> float:
    number = float(digits)
    if abs(number) == float("inf"):
        raise ValueError(f"the number {digits} is too large")
    return number


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    columns = dict(pairs)
    if len(columns) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} appears twice")
    return columns


_DECODER = json.JSONDecoder(
    parse_constant=_reject_constant, parse_float=_finite, object_pairs_hook=_without_duplicates
)


def _listed(keys: Iterable[Any]) -> str:
    return ", ".join(sorted(str(key) for key in keys)) or "none"

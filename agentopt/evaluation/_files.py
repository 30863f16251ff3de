"""Reads JSONL, JSON, CSV, TSV, Parquet and trace files into rows that know where they stand in their file.

The unit is a `Row`: its fields, and `place` ("tickets.jsonl, line 3"), which every later message about it begins with.
Nothing here knows what the columns mean.
"""

from __future__ import annotations

import csv
import difflib
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from agentopt.errors import UserError

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
TRACE_SUFFIX = ".trace.jsonl"
"""A recording: its calls are the rows."""
_FIELD_LIMIT = 2**31 - 1  # one CSV field may hold a whole document


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a file or an iterable. `text` is True where every value is text (CSV).

    What is in `hidden` may be the label and is never an input: what a recorded program answered, for example.
    """

    place: str
    fields: dict[str, Any]
    text: bool = False
    hidden: Mapping[str, Any] = field(default_factory=dict[str, Any])


def read_rows(path: Path) -> list[Row]:
    """All rows of a file, by its suffix.

    Raises:
        UserError: no such file, an unknown suffix, or content that is not what the suffix says (with its line).
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise UserError(
            f"{path}: cannot tell the format from {suffix or 'no suffix'!r}; expected {', '.join(SUFFIXES)}."
        )
    if not path.is_file():
        raise UserError(_missing(path))
    if path.name.lower().endswith(TRACE_SUFFIX):
        from agentopt.evaluation._captured import trace_rows

        return [Row(row.place, row.fields, hidden=row.hidden) for row in trace_rows(path)]
    try:
        if suffix == ".parquet":
            return list(_parquet(path))
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}).") from error
    if suffix in (".jsonl", ".ndjson"):
        return list(_jsonl(path, data))
    text = _decode(path, data)
    return list(_json(path, text) if suffix == ".json" else _csv(path, text, "\t" if suffix == ".tsv" else None))


def _missing(path: Path) -> str:
    if path.is_dir():
        return f"{path} is a folder; give the data file itself."
    folder = path.parent
    names = [entry.name for entry in folder.iterdir() if entry.is_file()] if folder.is_dir() else []
    close = difflib.get_close_matches(path.name, names, n=3)
    hint = f"; did you mean {' or '.join(str(folder / name) for name in close)}?" if close else "; check the path."
    return f"{path}: no such file{hint}"


def _decode(path: Path, data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise UserError(f"{path}, line {line}: found bytes that are not UTF-8; save the file as UTF-8.") from error


def _jsonl(path: Path, data: bytes) -> Iterator[Row]:
    # Split at line feeds only: other line separators are legal inside JSON strings.
    for number, raw in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not raw.strip():
            continue
        place = f"{path}, line {number}"
        try:
            value = json.loads(raw.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise UserError(f"{place}: found bytes that are not UTF-8; save the file as UTF-8.") from error
        except json.JSONDecodeError as error:
            raise UserError(
                f"{place}: invalid JSON at column {error.colno} ({error.msg}); expected one JSON object per line."
            ) from error
        except RecursionError as error:
            raise UserError(f"{place}: the JSON is nested too deep to read.") from error
        yield Row(place, _object(place, value))


def _json(path: Path, text: str) -> Iterator[Row]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}, line {error.lineno}: invalid JSON at column {error.colno} ({error.msg}); expected a list of "
            "objects; name the file .jsonl when it holds one object per line."
        ) from error
    except RecursionError as error:
        raise UserError(f"{path}: the JSON is nested too deep to read.") from error
    if not isinstance(value, list):
        raise UserError(f"{path}: found {_kind(value)}, expected a list of objects.")
    for index, item in enumerate(cast("list[object]", value), start=1):
        place = f"{path}, item {index}"
        yield Row(place, _object(place, item))


def _object(place: str, value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(
            f'{place}: found {_kind(value)}, expected an object such as {{"ticket": "...", "expected": "..."}}.'
        )
    return cast("dict[str, Any]", value)


def _kind(value: object) -> str:
    names: dict[type, str] = {
        list: "a list",
        str: "text",
        bool: "a boolean",
        int: "a number",
        float: "a number",
        dict: "an object",
    }
    return names.get(type(value), "null" if value is None else type(value).__name__)


def _csv(path: Path, text: str, delimiter: str | None) -> Iterator[Row]:
    first = text.partition("\n")[0]
    if delimiter is None:
        delimiter = ";" if ";" in first and "," not in first else ","
    previous = csv.field_size_limit(_FIELD_LIMIT)
    try:
        yield from _csv_rows(path, csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True))
    finally:
        csv.field_size_limit(previous)


def _csv_rows(path: Path, reader: Any) -> Iterator[Row]:
    header: list[str] | None = None
    line = 1
    try:
        for values in cast("Iterable[list[str]]", reader):
            place, line = f"{path}, line {line}", int(reader.line_num) + 1
            if not values:
                continue
            if header is None:
                header = _header(place, values)
            elif len(values) != len(header):
                raise UserError(
                    f"{place}: found {len(values)} fields, expected {len(header)} ({', '.join(header)}); "
                    "quote fields that hold the separator or a line break."
                )
            else:
                yield Row(place, dict(zip(header, values, strict=True)), text=True)
    except csv.Error as error:
        raise UserError(f"{path}, line {line}: invalid CSV ({error}); check the quotes.") from error


def _header(place: str, values: list[str]) -> list[str]:
    header = [value.strip() for value in values]
    if "" in header:
        raise UserError(f"{place}: column {header.index('') + 1} has no name; the first line must name every column.")
    repeated = [name for name in header if header.count(name) > 1]
    if repeated:
        raise UserError(f"{place}: the column name {repeated[0]!r} occurs twice; column names must differ.")
    return header


def _parquet(path: Path) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise UserError(
            f"{path}: reading Parquet needs pyarrow; install it with `pip install 'agentopt[parquet]'`."
        ) from error
    try:
        items: list[dict[str, Any]] = cast("Any", parquet).read_table(path).to_pylist()
    except cast("type[Exception]", cast("Any", pyarrow).ArrowException) as error:
        raise UserError(f"{path}: not a readable Parquet file ({str(error).splitlines()[0]}).") from error
    for index, item in enumerate(items, start=1):
        yield Row(f"{path}, row {index}", item)

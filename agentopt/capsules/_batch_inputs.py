"""The inputs of a batch: every file below a folder, or every row of a JSONL file, found first and read one by one."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from agentopt.errors import UserError

RECORDS = "capsules.jsonl"
"""The file of records in an output folder; the capsules' texts lie beside it under the names of their inputs."""


@dataclass(frozen=True, slots=True)
class BatchItem:
    """One input."""

    id: str
    """The path below the input folder, or the `id` of the row (its line number where it has none)."""
    text: str | None = None
    messages: tuple[dict[str, Any], ...] | None = None
    query: str | None = None

    @property
    def source(self) -> str | tuple[dict[str, Any], ...]:
        """What is to be compressed."""
        return self.messages if self.messages is not None else self.text or ""


@dataclass(frozen=True, slots=True)
class Entry:
    """Where one input is; its content is read when its turn comes."""

    id: str
    path: Path
    line: int = 0
    offset: int = 0
    length: int = 0


def entries(source: Path, target: Path) -> list[Entry]:
    """The inputs, in order.

    Raises:
        UserError: there is nothing to read there.
    """
    if source.is_dir():
        return _files(source, target)
    if not source.is_file():
        raise UserError(f"{source}: found no such file or folder, expected a folder of texts or a JSONL file.")
    found: list[Entry] = []
    seen: dict[str, int] = {}
    try:
        with source.open("rb") as file:
            offset = 0
            for number, line in enumerate(file, 1):
                if line.strip():
                    found.append(Entry(_free(_row_id(line, number), seen), source, number, offset, len(line)))
                offset += len(line)
    except OSError as error:
        raise UserError(f"{source}: {error.strerror or error}.") from error
    return found


def _files(source: Path, target: Path) -> list[Entry]:
    inside = target.resolve()
    found: list[Entry] = []
    for path in sorted(source.rglob("*")):
        below = path.relative_to(source)
        if any(part.startswith(".") for part in below.parts) or not path.is_file():
            continue
        if inside in (path.resolve(), *path.resolve().parents):
            continue  # an output below the inputs is no input
        found.append(Entry(below.as_posix(), path))
    if inside == source.resolve():
        raise UserError(f"{target}: the output folder is the input folder; name another one.")
    if any(entry.id == RECORDS for entry in found):
        raise UserError(f"{source / RECORDS}: an input has the name of the file of records; rename it.")
    return found


def _row_id(line: bytes, number: int) -> str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return str(number)
    given = cast("dict[str, Any]", row).get("id") if isinstance(row, dict) else None
    return str(number) if given is None or isinstance(given, dict | list) else str(given)


def _free(name: str, seen: dict[str, int]) -> str:
    """Two rows with one id are two inputs: the second is called ID#2."""
    seen[name] = seen.get(name, 0) + 1
    return name if seen[name] == 1 else _free(f"{name}#{seen[name]}", seen)


def read(entry: Entry) -> bytes:
    """The bytes of one input."""
    with entry.path.open("rb") as file:
        if not entry.line:
            return file.read()
        file.seek(entry.offset)
        return file.read(entry.length)


def item(entry: Entry, data: bytes) -> BatchItem:
    """One input as it is given to `make`.

    Raises:
        UserError: it is no UTF-8, or a row of another form.
    """
    rows = entry.line > 0
    place = f"{entry.path.name}, line {entry.line}" if rows else entry.path.name
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{place}: byte {error.start:,} is not UTF-8.") from error
    if not rows:
        return BatchItem(entry.id, text.removeprefix("\ufeff"))
    try:
        row: Any = json.loads(text.removeprefix("\ufeff"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: not JSON ({error}).") from error
    if not isinstance(row, dict):
        raise UserError(f'{place}: found {type(row).__name__}, expected {{"text": ...}} or {{"messages": [...]}}.')
    return _row_item(entry.id, cast("dict[str, Any]", row), place)


def _row_item(name: str, row: dict[str, Any], place: str) -> BatchItem:
    text, messages, query = row.get("text"), row.get("messages"), row.get("query")
    if query is not None and not isinstance(query, str):
        raise UserError(f"{place}: query: found {type(query).__name__}, expected text.")
    if isinstance(text, str) and messages is None:
        return BatchItem(name, text, query=query)
    if isinstance(messages, list) and text is None:
        return BatchItem(name, messages=tuple(cast("list[dict[str, Any]]", messages)), query=query)
    raise UserError(f"{place}: expected a field text or a list in messages, one of them; found {sorted(row)}.")

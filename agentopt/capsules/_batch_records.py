"""The records of a batch on disk: appended and synced, repaired after a kill, put in order at the end."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

from agentopt.errors import RunError, UserError

Record = dict[str, Any]
_HEAD = b'{"id":'  # how every record begins


class Unwritable(RunError):
    """A file of the output could not be written: the fault is not the input's."""


def unwritable(path: Path, error: OSError) -> Unwritable:
    """The error that says so."""
    return Unwritable(f"{path} could not be written ({error.strerror or error}); what is done stays: resume later.")


def open_journal(journal: Path) -> BinaryIO:
    """The file of records, to be appended to."""
    try:
        journal.parent.mkdir(parents=True, exist_ok=True)
        return journal.open("ab")
    except OSError as error:
        raise unwritable(journal, error) from error


def append(file: BinaryIO, records: Sequence[Record]) -> None:
    """Write records and return when they are on disk."""
    lines = [json.dumps(record, separators=(",", ":")).encode("ascii") + b"\n" for record in records]
    try:
        file.write(b"".join(lines))
        file.flush()
        os.fsync(file.fileno())
    except OSError as error:
        raise unwritable(Path(file.name), error) from error


def write_text(path: Path, text: str) -> None:
    """Whole or not at all, also when the machine stops."""
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            file.write(text.encode("utf-8", "surrogatepass"))
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        raise unwritable(path, error) from error


def _lines(journal: Path) -> Iterator[tuple[int, bytes, Record | None]]:
    """Offset, bytes and record of each line; None for a line that is none (cut in the middle, or damaged)."""
    with journal.open("rb") as file:
        offset = 0
        for line in file:
            try:
                row: Any = json.loads(line) if line.endswith(b"\n") else None
            except (ValueError, RecursionError):
                row = None
            good = isinstance(row, dict) and isinstance(cast("Record", row).get("id"), str)
            yield offset, line, cast("Record", row) if good else None
            offset += len(line)


def read_records(journal: Path) -> dict[str, Record]:
    """What is done, by id and without the texts; a last line that was not written to its end is cut off.

    Raises:
        UserError: the file holds something else than records.
    """
    found: dict[str, Record] = {}
    end, begins_well = 0, True
    for offset, line, record in _lines(journal):
        end = offset + len(line) if line.endswith(b"\n") else offset
        if record is None:
            begins_well = begins_well and (bool(found) or _HEAD.startswith(line[: len(_HEAD)]))
            continue
        slim = {name: record.get(name) for name in ("input", "settings")}
        capsule = record.get("capsule")
        if isinstance(capsule, dict):
            numbers = cast("Record", capsule)
            slim["capsule"] = {name: int(numbers.get(name) or 0) for name in ("tokens", "original_tokens")}
        found[record["id"]] = slim
    if not begins_well:
        raise UserError(f"{journal}: found something else than the records of a batch in it; name another output.")
    if end < journal.stat().st_size:
        with journal.open("r+b") as file:
            file.truncate(end)
    return found


def put_in_order(journal: Path, order: Sequence[str]) -> None:
    """Put the records into the order of the inputs; of several with one id the last counts, other inputs' come last."""
    places: dict[str, tuple[int, int]] = {}
    for offset, line, record in _lines(journal):
        if record is not None:
            places[record["id"]] = (offset, len(line))
    part = journal.with_name(f".{journal.name}.part")
    first = [name for name in order if name in places]
    wanted = [*first, *sorted(places.keys() - set(first))]
    try:
        with journal.open("rb") as old, part.open("wb") as new:
            for name in wanted:
                offset, length = places[name]
                old.seek(offset)
                new.write(old.read(length))
            new.flush()
            os.fsync(new.fileno())
        part.replace(journal)
    except OSError as error:
        raise unwritable(journal, error) from error

"""Trace files: `*.trace.jsonl`, a header line and then one record a line. The room's only input and output.

The models here are the schema of the file; everything else works on the live records.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from agentopt.errors import UserError
from agentopt.graph._records import EdgeKind, OpRecord
from agentopt.graph._trace import FORMAT, VERSION, Trace

_LINES_PER_WRITE: Final = 512


class TraceWarning(UserWarning):
    """A trace file was read, but not all of it."""


class _Line(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Header(_Line):
    """The first line of a trace file."""

    format: Literal["agentopt.trace"]
    version: int
    name: str | None = None
    output_id: int | None = None
    count: int = Field(ge=0)


class UsageLine(_Line):
    """Tokens and calls of one record."""

    input_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    calls: int = 0
    cached_calls: int = 0
    tries: int = 0
    cached_input_tokens: int = 0
    cached_output_tokens: int = 0
    cached_cost: float | None = 0.0


class ErrorLine(_Line):
    """An exception in one record."""

    type: str
    message: Any
    op: str
    op_id: int | None = None
    file: str | None = None
    line: int | None = None
    source_line: Any = None
    inputs: list[tuple[str, Any]] = []
    notes: list[Any] = []
    trace_text: Any = ""


class OpLine(_Line):
    """One record; values are in the JSON form of `agentopt.graph._values.encode`."""

    id: int = Field(ge=0)
    op: str
    kind: str
    inputs: dict[str, Any] = {}
    output: Any = None
    sources: dict[str, int] = {}
    parents: list[tuple[int, EdgeKind]] = []
    parent_op: int | None = None
    error: ErrorLine | None = None
    started: float = 0.0
    duration: float | None = None
    usage: UsageLine | None = None
    cost: float | None = None
    meta: Any = None


def write_trace(trace: Trace, path: str | Path) -> Path:
    """Write a trace file; whole records reach the disk in order, so a killed writer leaves a readable beginning.

    Raises:
        UserError: the path cannot be written.
    """
    target = Path(path)
    header = {
        "format": FORMAT,
        "version": VERSION,
        "name": trace.name,
        "output_id": trace.output_id,
        "count": len(trace),
    }
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("wb") as file:
            lines = [_line(header)]
            for op in trace.ops:
                lines.append(_line(op.to_dict()))
                if len(lines) >= _LINES_PER_WRITE:
                    file.writelines(lines)
                    lines.clear()
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(f"the trace cannot be written to {target}: {error.strerror or error}") from error
    return target


def _line(data: dict[str, Any]) -> bytes:
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.encode("utf-8", "replace") + b"\n"  # values are clean; only a name could hold a lone surrogate


def read_trace(path: str | Path) -> Trace:
    """Read a trace file.

    A file that ends in the middle (its writer was killed) gives its whole records, and a `TraceWarning` names the line.

    Raises:
        UserError: the file is missing, is not a trace, comes from a newer version, or has a broken line in the middle.
    """
    source = Path(path)
    try:
        size = source.stat().st_size
        file = source.open("rb")
    except OSError as error:
        raise UserError(f"the trace file {source} cannot be read: {error.strerror or error}") from error
    with file:
        header = _read_header(source, file.readline())
        ops = list(_read_ops(source, file, size))
    output_id = header.output_id
    if len(ops) < header.count:
        if output_id is not None and output_id >= len(ops):
            output_id = None
        line = len(ops) + 2
        warnings.warn(
            f"{source}: the file ends at line {line}, inside or before record {len(ops)} of {header.count}; "
            f"the {len(ops)} whole records before it were read",
            TraceWarning,
            stacklevel=3,
        )
    elif len(ops) > header.count:
        raise UserError(f"{source}: the header tells of {header.count} records, found {len(ops)}")
    return Trace(ops, name=header.name, output_id=output_id)


def _read_header(source: Path, line: bytes) -> Header:
    try:
        data: Any = json.loads(line)
        version: Any = cast("dict[str, Any]", data).get("version") if isinstance(data, dict) else None
        if isinstance(version, int) and version > VERSION:
            raise UserError(
                f"{source}: the trace has version {version}, this agentopt reads up to {VERSION}; update agentopt"
            )
        return Header.model_validate(data)
    except (ValueError, ValidationError) as error:
        found = line[:60].decode("utf-8", "replace").strip()
        raise UserError(
            f'{source}: line 1 must be a trace header {{"format":"{FORMAT}", …}}, found {found!r}'
        ) from error


def _read_ops(source: Path, file: Any, size: int) -> Iterator[OpRecord]:
    for number, line in enumerate(file, start=2):
        try:
            yield _record(OpLine.model_validate_json(line))
        except (ValueError, ValidationError) as error:
            if not line.endswith(b"\n") and file.tell() >= size:
                return  # the unfinished last line of a killed writer; the caller, which knows the count, warns
            raise UserError(f"{source}: line {number} is not a trace record: {_reason(error)}") from error


def _record(line: OpLine) -> OpRecord:
    data = dict(line.__dict__)
    data["error"] = None if line.error is None else line.error.model_dump()
    data["usage"] = None if line.usage is None else line.usage.model_dump()
    return OpRecord.from_dict(data)


def _reason(error: ValueError) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        return f"{where}: {first['msg']}" if where else first["msg"]
    return str(error)

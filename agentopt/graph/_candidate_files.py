"""Candidate files: JSON or TOML, written in one step. The standard library reads TOML but does not write it."""

from __future__ import annotations

import json
import os
import re
import secrets
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import cast

from agentopt.errors import UserError
from agentopt.graph._jsonvalue import JSONValue

_FORMAT = "agentopt.candidate"
_VERSION = 1
_SUFFIXES = (".json", ".toml")


def write(data: Mapping[str, JSONValue], path: Path) -> Path:
    """Write a candidate's JSON form to `path` in one step (temporary file, fsync, rename)."""
    header: dict[str, JSONValue] = {"format": _FORMAT, "version": _VERSION}
    document = {**header, **data}
    if path.suffix == ".json":
        text = _json_text(document)
    elif path.suffix == ".toml":
        text = _toml_document(document, str(path))
    else:
        raise UserError(f"{path}: a candidate file ends in .json or .toml; found {path.suffix or 'no suffix'!r}.")
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        with open(temporary, "x", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot write the candidate: {error.strerror or error}.") from error
    return path


def read(path: Path) -> Mapping[str, object]:
    """Read the map in a candidate file; every failure is a UserError that names the file and, if known, the line."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; expected a candidate written by `agentopt export` or `save`.") from None
    except OSError as error:
        raise UserError(f"{path}: cannot read the candidate: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: not a UTF-8 text file (byte {error.start}); expected a .json or .toml file."
        ) from None
    data = _parse_toml(text, path) if path.suffix == ".toml" else _parse_json(text, path)
    stated = data.get("format", _FORMAT)
    if stated != _FORMAT:
        raise UserError(f"{path}: the format is {stated!r}, not a candidate ({_FORMAT!r}).")
    version = data.get("version", _VERSION)
    if not isinstance(version, int) or version > _VERSION:
        raise UserError(
            f"{path}: written by a newer agentopt (file version {version}, known {_VERSION}); upgrade agentopt."
        )
    return data


def _parse_json(text: str, path: Path) -> Mapping[str, object]:
    try:
        data: object = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not valid JSON: {error.msg}.") from None
    except (RecursionError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON: {error}.") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected a JSON object with 'values', found {type(data).__name__}.")
    return cast("dict[str, object]", data)


def _parse_toml(text: str, path: Path) -> Mapping[str, object]:
    try:
        return tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise UserError(f"{path}: not valid TOML: {error}.") from None


def _json_text(document: Mapping[str, JSONValue]) -> str:
    text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # lone surrogates exist in JSON only as escapes
        text = json.dumps(document, indent=2, ensure_ascii=True, allow_nan=False)
    return text + "\n"


def _toml_document(document: Mapping[str, JSONValue], where: str) -> str:
    head = [
        f"{_toml_key(key)} = {_toml(value, where)}" for key, value in document.items() if key not in ("values", "edits")
    ]
    lines = [*head, "", "[values]"]
    values = cast("Mapping[str, JSONValue]", document["values"])
    lines += [f"{_toml_key(name)} = {_toml(value, f'{where}: {name}')}" for name, value in values.items()]
    for edit in cast("list[Mapping[str, JSONValue]]", document["edits"]):
        lines += ["", "[[edits]]"]
        lines += [f"{_toml_key(key)} = {_toml(value, f'{where}: edits')}" for key, value in edit.items()]
    return "\n".join(lines) + "\n"


def _toml(value: JSONValue, where: str) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return _toml_text(value, where)
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return repr(value)
    if value is None:
        raise UserError(f"{where}: the value holds None, which TOML cannot express; save to a .json file.")
    if isinstance(value, Mapping):
        inner = ", ".join(f"{_toml_key(key)} = {_toml(item, where)}" for key, item in value.items())
        return "{" + (f" {inner} " if inner else "") + "}"
    items = [_toml(item, where) for item in value]
    if any(isinstance(item, (Mapping, list)) for item in value):
        return "[\n" + "".join(f"  {item},\n" for item in items) + "]"
    return "[" + ", ".join(items) + "]"


def _toml_key(key: str) -> str:
    bare = key.isascii() and key.replace("-", "").replace("_", "").isalnum()
    return key if bare else _quoted(key)


def _toml_text(text: str, where: str) -> str:
    if any(0xD800 <= ord(character) <= 0xDFFF for character in text):
        raise UserError(f"{where}: the text holds half of a surrogate pair, which TOML cannot express; save to .json.")
    if "\n" not in text:
        return _quoted(text)
    lines = "\n".join(_escaped(line, quote=False) for line in text.split("\n"))
    lines = re.sub(r'"(?="|\Z)', lambda _: '\\"', lines)  # no run of quotes may look like the end
    return '"""\n' + lines + '"""'


def _quoted(text: str) -> str:
    return '"' + _escaped(text, quote=True) + '"'


def _escaped(text: str, *, quote: bool) -> str:
    parts: list[str] = []
    for character in text:
        if character == "\\" or (quote and character == '"'):
            parts.append("\\" + character)
        elif character == "\n":
            parts.append("\\n")
        elif character == "\t" and not quote:
            parts.append(character)
        elif ord(character) < 0x20 or ord(character) == 0x7F:
            parts.append(f"\\u{ord(character):04X}")
        else:
            parts.append(character)
    return "".join(parts)

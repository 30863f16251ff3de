"""Reads and checks the files of an "agents" solution: `solution.json`, `sop.json`, `agent_team.json`, `task.json`.

Everything wrong with a file is one sentence: the file, the field, what was found, what was expected.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from agentopt.errors import UserError

_TYPES = {dict: "a map", list: "a list", str: "text", int: "a whole number"}


@dataclass(frozen=True)
class Part:
    """One JSON map and the place it was read from, for messages."""

    data: Mapping[str, Any]
    file: str
    place: str = ""

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """The value of `key`, of the type `kind`; `default` when it is missing or null.

        Raises:
            UserError: it has another type.
        """
        value = self.data.get(key)
        if value is None:
            return default
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise self.wrong(key, _described(value), _TYPES[kind])
        return value

    def need(self, key: str, kind: type) -> Any:
        """`get` for a key that must be there."""
        if self.data.get(key) is None:
            known = ", ".join(repr(name) for name in self.data) or "no keys"
            raise self.wrong(key, f"nothing (the keys are {known})", _TYPES[kind])
        return self.get(key, kind)

    def part(self, key: str) -> Part:
        """The map under `key`, an empty one when it is missing or not a map with content."""
        value = self.data.get(key)
        if value in (None, "", []):
            value = {}
        if not isinstance(value, Mapping):
            raise self.wrong(key, _described(value), "a map")
        return Part(cast("Mapping[str, Any]", value), self.file, self._at(key))

    def parts(self) -> list[tuple[str, Part]]:
        """Every entry, each of which must be a map."""
        return [(key, self.part(key)) for key in self.data]

    def text(self, key: str) -> str:
        """The text under `key`, stripped; empty when it is missing."""
        return cast("str", self.get(key, str, "")).strip()

    def wrong(self, key: str, found: str, expected: str) -> UserError:
        """The error for a field."""
        return UserError(f"{self.file}: field {self._at(key)!r}: found {found}; expected {expected}.")

    def _at(self, key: str) -> str:
        return f"{self.place}.{key}" if self.place else key


@dataclass(frozen=True)
class Solution:
    """The parts of one solution."""

    sop: Part
    team: Part
    task: Part


def read_solution(path: str | Path) -> Solution:
    """Read `solution.json` (or the folder that holds it) and the files it names.

    Its paths are tried as they are, beside `solution.json`, and by their last part beside it: the published ones are
    relative to the folder the program was started in.

    Raises:
        UserError: a file is missing or no JSON map, or a field has another form than expected.
    """
    file = Path(path)
    if file.is_dir():
        file = file / "solution.json"
    solution = Part(_read(file, "the path of a solution.json"), str(file))
    return Solution(
        sop=_named(solution, "sop", file, needed=True),
        team=_named(solution, "agent_team", file, needed=True),
        task=_named(solution, "task", file, needed=False),
    )


def _named(solution: Part, key: str, file: Path, *, needed: bool) -> Part:
    value = solution.data.get(key)
    if value is None and not needed:
        return Part({}, solution.file)
    if isinstance(value, Mapping):  # the configuration itself in place of its path
        return Part(cast("Mapping[str, Any]", value), solution.file, key)
    name = Path(solution.need(key, str))
    tried = [name, file.parent / name, file.parent / name.name]
    found = next((one for one in tried if one.is_file()), None)
    if found is None:
        raise solution.wrong(key, f"{str(name)!r}, which is no file here or beside it", "the path of a JSON file")
    return Part(_read(found, "a JSON file"), str(found))


def _read(file: Path, expected: str) -> Mapping[str, Any]:
    try:
        data = json.loads(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"{file}: {error.strerror or error}; expected {expected}.") from error
    except ValueError as error:
        raise UserError(f"{file}: found text that is no JSON ({error}); expected a JSON map.") from error
    if not isinstance(data, Mapping):
        raise UserError(f"{file}: found {_described(data)}; expected a JSON map.")
    return cast("Mapping[str, Any]", data)


def _described(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{type(value).__name__} {text[:57]}..."

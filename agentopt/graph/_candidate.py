"""Candidate: an immutable map from parameter name to value, with a content hash, parents and the edits that made it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast, overload

from agentopt.errors import UserError
from agentopt.graph import _candidate_files, _context
from agentopt.graph._edits import Edit, Problem, edit_from_dict
from agentopt.graph._jsonvalue import JSONValue, copied, digest, normalize
from agentopt.graph._parameters import ParameterSpec, suggestion

_HASH_LENGTH = 16


class Candidate:
    """An immutable set of parameter values.

    `Candidate()` has no values: every parameter has its declared default. A name that a candidate does not hold has
    its declared default too, whatever other candidate is installed. Two candidates are equal when their values are;
    parents, edits and note are lineage and do not count.

    Args:
        values: parameter name → JSON value; copied, so later changes of the argument change nothing.
        parents: hashes of the candidates this one was made from.
        edits: the edits that made it from its first parent.
        note: free text for reports.

    Raises:
        UserError: a value has no JSON form.
    """

    __slots__ = ("__weakref__", "_edits", "_hash", "_note", "_parents", "_values")

    def __init__(
        self,
        values: Mapping[str, JSONValue] = MappingProxyType({}),
        *,
        parents: Sequence[str] = (),
        edits: Sequence[Edit] = (),
        note: str = "",
    ) -> None:
        if not isinstance(cast("object", values), Mapping):
            raise UserError(
                f"candidate values: expected a map of parameter name to value, found {type(values).__name__}."
            )
        self._values = {_name(name): normalize(value, f"parameter {name!r}") for name, value in values.items()}
        self._hash = digest(self._values)[:_HASH_LENGTH]
        self._parents = tuple(parents)
        self._edits = tuple(edits)
        self._note = note

    @property
    def hash(self) -> str:
        """First 16 hex characters of the SHA-256 of the values' canonical JSON."""
        return self._hash

    @property
    def values(self) -> Mapping[str, JSONValue]:
        """The values by parameter name; a copy, so changing a list in it changes nothing here."""
        return MappingProxyType({name: copied(value) for name, value in self._values.items()})

    @property
    def parents(self) -> tuple[str, ...]:
        """Hashes of the candidates this one was made from."""
        return self._parents

    @property
    def edits(self) -> tuple[Edit, ...]:
        """The edits that made it from its first parent."""
        return self._edits

    @property
    def note(self) -> str:
        """Free text for reports."""
        return self._note

    @overload
    def get(self, name: str) -> JSONValue: ...
    @overload
    def get(self, name: str, default: JSONValue) -> JSONValue: ...
    def get(self, name: str, default: JSONValue = None) -> JSONValue:
        """Return the value of `name`, or `default` when this candidate does not hold it."""
        return copied(self._values.get(name, default))

    def __getitem__(self, name: str) -> JSONValue:
        return copied(self._values[name])

    def __contains__(self, name: object) -> bool:
        return name in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __bool__(self) -> bool:
        return True  # an empty candidate is a candidate: `if candidate:` asks whether there is one

    def __eq__(self, other: object) -> bool:
        return self._hash == other._hash if isinstance(other, Candidate) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._hash)

    def __repr__(self) -> str:
        return f"Candidate({self._hash}, {len(self._values)} values)"

    def __copy__(self) -> Candidate:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Candidate:
        return self

    def with_values(
        self,
        values: Mapping[str, JSONValue],
        *,
        parents: Sequence[str] | None = None,
        edits: Sequence[Edit] | None = None,
        note: str | None = None,
    ) -> Candidate:
        """Return a candidate with `values` laid over these; lineage is kept where it is not given."""
        return Candidate(
            {**self._values, **values},
            parents=self._parents if parents is None else parents,
            edits=self._edits if edits is None else edits,
            note=self._note if note is None else note,
        )

    def problems(self, specs: Mapping[str, ParameterSpec]) -> list[Problem]:
        """Return what does not fit `specs`: names nobody declares, values a parameter may not have."""
        found: list[Problem] = []
        for name, value in self._values.items():
            spec = specs.get(name)
            if spec is None:
                found.append(Problem(name, f"no parameter of this name is declared{suggestion(name, list(specs))}"))
            else:
                found.extend(Problem(name, message) for message in spec.problems(copied(value)))
        return found

    def active(self) -> _context.Overlay:
        """Return a context manager in which this candidate's values are read, in this thread or task only.

        Blocks nest; the inner candidate replaces the outer one as a whole.
        """
        return _context.Overlay(self)

    def install(self) -> Candidate:
        """Make this the process's default candidate, read wherever no `active()` block is open; returns itself."""
        _context.install(self)
        return self

    def to_dict(self) -> dict[str, JSONValue]:
        """Return the JSON form: hash, values, parents, edits, note."""
        return {
            "hash": self._hash,
            "values": {name: copied(value) for name, value in self._values.items()},
            "parents": list(self._parents),
            "edits": [edit.to_dict() for edit in self._edits],
            "note": self._note,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, object]) -> Candidate:
        """Return the candidate whose `to_dict` made `data`.

        When the values were changed by hand (`hash` no longer fits them), the edits are no longer true and are left
        out, and the candidate of the stated hash becomes the parent.

        Raises:
            UserError: a field is missing or of the wrong type.
        """
        values = data.get("values")
        if not isinstance(values, Mapping):
            raise UserError(
                f"candidate: 'values' must be a map of parameter name to value, found {_type_name(values)}."
            )
        candidate = cls(cast("Mapping[str, JSONValue]", values), note=_text(data, "note"))
        stated = _text(data, "hash")
        if stated and stated != candidate.hash:
            return candidate.with_values({}, parents=(stated,))
        parents = _list(data, "parents")
        if not all(isinstance(parent, str) for parent in parents):
            raise UserError("candidate: 'parents' must be a list of hashes.")
        edits = [edit_from_dict(_map(entry)) for entry in _list(data, "edits")]
        return candidate.with_values({}, parents=cast("list[str]", parents), edits=edits)

    def save(self, path: str | Path) -> Path:
        """Write the candidate to `path` (.json or .toml) in one step and return the path.

        A reader sees the old file or the new one, never half of one.

        Raises:
            UserError: unknown suffix, the folder is not writable, or a value has no TOML form.
        """
        return _candidate_files.write(self.to_dict(), Path(path))

    @classmethod
    def load(cls, path: str | Path) -> Candidate:
        """Read a candidate from a .json or .toml file that `save`, `agentopt export` or a person wrote.

        Raises:
            UserError: no such file, not readable as JSON or TOML (with the line), or not a candidate.
        """
        location = Path(path)
        data = _candidate_files.read(location)
        try:
            return cls.from_dict(data)
        except UserError as error:
            raise UserError(f"{location}: {error}") from None


def load(path: str | Path) -> Candidate:
    """Read a candidate from a .json or .toml file; `agentopt.load("best.json").install()` puts it into use.

    Raises:
        UserError: no such file, not readable as JSON or TOML (with the line), or not a candidate.
    """
    return Candidate.load(path)


def _name(name: object) -> str:
    if not isinstance(name, str):
        raise UserError(f"candidate values: found a name of type {type(name).__name__}; parameter names are text.")
    return name


def _type_name(value: object) -> str:
    return "nothing" if value is None else type(value).__name__


def _text(data: Mapping[str, object], key: str) -> str:
    value = data.get(key, "")
    if not isinstance(value, str):
        raise UserError(f"candidate: {key!r} must be text, found {_type_name(value)}.")
    return value


def _list(data: Mapping[str, object], key: str) -> list[object]:
    value = data.get(key, [])
    if not isinstance(value, (list, tuple)):
        raise UserError(f"candidate: {key!r} must be a list, found {_type_name(value)}.")
    return list(cast("Sequence[object]", value))


def _map(value: object) -> Mapping[str, object]:
    if not isinstance(value, Mapping):
        raise UserError(f"candidate: each of 'edits' must be a map, found {_type_name(value)}.")
    return cast("Mapping[str, object]", value)

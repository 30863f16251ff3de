"""What the rewriting model is told, as data: named fragments in text files, any of which a user may override.

A file looks like this; lines before the first header are comments:

    === rewrite.style.telegraphic ===
    Write in telegraphic style ...

Placeholders are `{name}`, those of the shipped text; every other brace is plain text. Nothing inside a value is filled
again, so a document that holds `{document}` changes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from importlib import resources
from pathlib import Path

from agentopt.errors import UserError
from agentopt.evaluation import seeded

_HEADER = re.compile(r"^=== +([a-z0-9_.-]+) +===\s*$")
_LOOKS_LIKE_HEADER = re.compile(r"^===.*===\s*$")
_PLACEHOLDER = re.compile(r"\{([a-z_]+)\}")
_REQUIRED: Mapping[str, frozenset[str]] = {
    "rewrite.task": frozenset({"fence", "document", "amount"}),
    "rewrite.repair": frozenset({"problems"}),
    "rewrite.example": frozenset({"capsule"}),
    "probes.ask": frozenset({"document", "questions"}),
    "judge.entailment": frozenset({"document", "capsule"}),
}


def load_wording(override: Path | None = None) -> Mapping[str, str]:
    """The shipped fragments, with those of the file `override` laid over them.

    Raises:
        UserError: the file cannot be read, has no fragment, names an unknown fragment or placeholder, or a fragment
            lacks a placeholder it needs; the message has the file and the line.
    """
    if override is None:
        return _shipped()
    try:
        text = override.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"Template file {str(override)!r} cannot be read: {error}.") from error
    return {**_shipped(), **_parse(text, str(override), _shipped())}


def fill(fragment: str, values: Mapping[str, str]) -> str:
    """Put `values` in place of the placeholders that it names."""
    return _PLACEHOLDER.sub(lambda match: values.get(match[1], match[0]), fragment)


def fenced(text: str, *parts: str | int) -> str:
    """A line to put around `text` that does not occur in it; a pure function of `text` and `parts`."""
    rng = seeded(
        "fence", len(text), text[:2_000].encode("utf-8", "backslashreplace").decode("ascii", "replace"), *parts
    )
    while True:
        fence = f"-----{rng.getrandbits(48):012x}-----"
        if fence.strip("-") not in text:
            return fence


@cache
def _shipped() -> Mapping[str, str]:
    found: dict[str, str] = {}
    folder = resources.files("agentopt.capsules.rewriting") / "templates"
    for entry in sorted(folder.iterdir(), key=lambda item: item.name):
        if entry.name.endswith(".txt"):
            found.update(_parse(entry.read_text(encoding="utf-8"), entry.name, None))
    return found


def _parse(text: str, place: str, shipped: Mapping[str, str] | None) -> dict[str, str]:
    lines: dict[str, list[str]] = {}
    starts: dict[str, str] = {}
    current: str | None = None
    for number, line in enumerate(text.splitlines(), start=1):
        match = _HEADER.match(line)
        if match is None and _LOOKS_LIKE_HEADER.match(line):
            raise UserError(f"{place}:{number}: {line.strip()!r} is no fragment header: write '=== name ==='.")
        if match is not None:
            current = str(match[1])
            if current in lines:
                raise UserError(f"{place}:{number}: the fragment {current!r} stands twice in this file.")
            if shipped is not None and current not in shipped:
                known = ", ".join(shipped)
                raise UserError(f"{place}:{number}: there is no fragment {current!r}; known are {known}.")
            lines[current] = []
            starts[current] = f"{place}:{number}"
        elif current is not None:
            lines[current].append(line)
    if not lines:
        raise UserError(f"{place} has no fragment: expected headers such as '=== rewrite.task ==='.")
    found = {name: "\n".join(body).strip("\n") for name, body in lines.items()}
    for name, body in found.items():
        _check(name, body, starts[name], shipped)
    return found


def _check(name: str, body: str, place: str, shipped: Mapping[str, str] | None) -> None:
    has = frozenset(_PLACEHOLDER.findall(body))
    allowed = has if shipped is None else frozenset(_PLACEHOLDER.findall(shipped[name]))
    if unknown := sorted(has - allowed):
        raise UserError(
            f"{place}: the fragment {name!r} has the unknown placeholder {{{unknown[0]}}}; it may use "
            f"{', '.join('{' + slot + '}' for slot in sorted(allowed)) or 'none'}."
        )
    if missing := sorted(_REQUIRED.get(name, frozenset()) - has):
        raise UserError(f"{place}: the fragment {name!r} must contain the placeholder {{{missing[0]}}}.")

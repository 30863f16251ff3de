"""Files into facts: what a knowledge base is made of, and where each sentence stood.

    found = load_documents("handbook.md")
    adapter = folder.fold(found.facts)

Text files hold a fact a line. Markdown holds one a paragraph or list item, its heading in front of it. JSONL rows hold
`fact`, `text` or a list `facts`. A folder is all such files in it, by name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from agentopt.errors import UserError

SUFFIXES = (".txt", ".md", ".jsonl")
"""What is read from a folder; a file that is named may have any other suffix and is read as text."""

_HEADING = re.compile(r"#{1,6}\s+(.*?)\s*#*$")
_ITEM = re.compile(r"(?:[-*+]|\d+[.)])\s+")
_FENCE = ("```", "~~~")


@dataclass(frozen=True, slots=True)
class Documents:
    """The facts of a knowledge base, in the order of the files."""

    facts: tuple[str, ...]
    places: tuple[str, ...]
    """File and line of each fact, as a person would look it up."""
    files: tuple[str, ...]
    repeated: int
    """Facts left out because the same one stood before."""


def load_documents(path: str | Path) -> Documents:
    """The facts of a file, or of all files of a folder (subfolders included).

    Raises:
        UserError: nothing there, nothing in it, or a row that holds no fact; the sentence names file and line.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; give text with a fact a line, .md, .jsonl or a folder.")
    files = _files(path) if path.is_dir() else [path]
    seen: dict[str, str] = {}
    total = 0
    for file in files:
        for line, fact in _facts(file):
            total += 1
            seen.setdefault(fact, f"{file}:{line}")
    if not seen:
        raise UserError(f"{path}: found no facts, only empty lines; give at least one sentence, a line each.")
    return Documents(tuple(seen), tuple(seen.values()), tuple(str(file) for file in files), total - len(seen))


def _files(folder: Path) -> list[Path]:
    found = sorted(file for file in folder.rglob("*") if file.suffix in SUFFIXES and file.is_file())
    if not found:
        raise UserError(f"{folder}: found no {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]} file in this folder.")
    return found


def _facts(file: Path) -> Iterator[tuple[int, str]]:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file}: not UTF-8 at byte {error.start:,}; give text, or convert it, for example with iconv -t utf-8."
        ) from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror or error}).") from None
    if file.suffix == ".jsonl":
        return _rows(file, text)
    return _markdown(text) if file.suffix == ".md" else _lines(text)


def _lines(text: str) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(text.splitlines(), 1):
        if fact := " ".join(line.split()):
            yield number, fact


def _markdown(text: str) -> Iterator[tuple[int, str]]:
    """Paragraphs and list items; a fact without its heading would often not say what it is about."""
    heading, begun, words, fenced = "", 0, list[str](), False

    def finished() -> Iterator[tuple[int, str]]:
        if words:
            yield begun, f"{heading}: {' '.join(words)}" if heading else " ".join(words)
            words.clear()

    for number, line in enumerate(text.splitlines(), 1):
        bare = line.strip()
        if bare.startswith(_FENCE):
            fenced = not fenced
            yield from finished()
            continue
        title = None if fenced else _HEADING.match(bare)
        item = None if fenced else _ITEM.match(bare)
        if not bare or title or item or fenced:
            yield from finished()
        if title:
            heading = title[1].rstrip(":")
            continue
        if bare:
            begun = begun if words else number
            words.extend(bare[item.end() :].split() if item else bare.split())
    yield from finished()


def _rows(file: Path, text: str) -> Iterator[tuple[int, str]]:
    # Not splitlines: JSON may hold other line separators (U+2028, U+0085) inside a text.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        place = f"{file}:{number}"
        try:
            row: Any = json.loads(line)
        except (ValueError, RecursionError):
            raise UserError(f'{place}: not JSON; give one object a line, for example {{"fact": "..."}}.') from None
        for fact in _of_row(row, place):
            yield number, fact


def _of_row(row: Any, place: str) -> list[str]:
    cells = cast("dict[str, Any]", row) if isinstance(row, dict) else {}
    name = next((key for key in ("fact", "text", "facts") if key in cells), None)
    if name is None:
        found = ", ".join(cells) or json.dumps(row)[:40]
        raise UserError(f"{place}: found {found}, expected an object with fact, text or facts.")
    value = cells[name]
    items = cast("list[Any]", value) if name == "facts" and isinstance(value, list) else [value]
    facts = [" ".join(item.split()) if isinstance(item, str) else "" for item in items]
    if not facts or not all(facts):
        raise UserError(f"{place}: {name} is {json.dumps(value)[:40]}, expected text that is not empty.")
    return facts

r"""Redaction: private things are replaced before anything is stored, wherever in a JSON value they hide.

Texts are looked at twice: as they are, and with JSON escapes undone at any depth (`\u0040` is an @; in the arguments
of a tool call it is a text inside a text). What is found in either is cut out of the text as it is. Keys of objects and
numbers are looked at too. Long stretches of base64 (images, sound, files) become their length and hash.
"""

from __future__ import annotations

import hashlib
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self, cast

from agentopt.errors import UserError
from agentopt.serving.capture._patterns import DEFAULTS, Finder, Span

CUSTOM = "redacted"
_ESCAPE = re.compile(r"(?<!\\)\\+(?:u([0-9A-Fa-f]{4})|([\"/bfnrt]))")
_PLAIN = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}
_DATA = re.compile(r"data:[\w.+-]{1,60}/[\w.+-]{1,60}(?:;[\w.=-]{1,60}){0,4};base64,[A-Za-z0-9+/=_-]+")
_BASE64 = re.compile(r"(?<![A-Za-z0-9+/_-])[A-Za-z0-9+/_-]{512,}={0,2}")
_MAX_DEPTH = 200
_SHORT = 32
"""Longest text that is remembered as it is; of a longer one it is a hash of 128 bits."""
_REMEMBERED = 8192


class Redaction:
    """Replaces what its finders find by the kind's name in square brackets."""

    def __init__(self, finders: Sequence[tuple[str, Finder]] | None = None) -> None:
        """`finders`: name and finder; None for the defaults."""
        self._finders = tuple(DEFAULTS.items() if finders is None else finders)
        self._clean: set[str | bytes] = set()

    @classmethod
    def of(cls, given: Sequence[str] = (), *, defaults: bool = True) -> Self:
        """The defaults plus own patterns: each a regular expression, or a file with one a line (`#` begins a comment).

        Raises:
            UserError: not a regular expression, one that matches nothing at all, or a file that cannot be read.
        """
        own = [(CUSTOM, _finder(regex)) for text in given for regex in _compiled(text)]
        return cls([*own, *(DEFAULTS.items() if defaults else ())])

    @property
    def names(self) -> list[str]:
        """The kinds that are taken out."""
        return list(dict.fromkeys(name for name, _ in self._finders))

    def text(self, text: str) -> str:
        """The text without what must not be stored."""
        mark = (
            text
            if len(text) <= _SHORT
            else hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        )
        if mark in self._clean:
            return text
        given = text
        if len(text) >= 512:
            text = _BASE64.sub(_elided, _DATA.sub(_elided, text))
        spans = sorted(self._spans(text))
        if not spans:
            if text is given:
                self._remember(mark)
            return text
        parts: list[str] = []
        at = 0
        for start, end, name in _merged(spans):
            parts += (text[at:start], f"[{name}]")
            at = end
        return "".join([*parts, text[at:]])

    def _remember(self, mark: str | bytes) -> None:
        """Nothing is found in this text: system prompts, earlier turns and names come again and again."""
        if len(self._clean) >= _REMEMBERED:
            self._clean.clear()
        self._clean.add(mark)

    def value(self, value: Any, depth: int = 0) -> Any:
        """A JSON value with every text, number and key in it redacted; a new one, the given one stays."""
        if isinstance(value, str):
            return self.text(value)
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, (int, float)):
            return self._number(value)
        if depth > _MAX_DEPTH:
            return "[nested too deep]"
        if isinstance(value, dict):
            items = cast("dict[str, Any]", value).items()
            return {self.text(str(key)): self.value(item, depth + 1) for key, item in items}
        if isinstance(value, (list, tuple)):
            return [self.value(item, depth + 1) for item in cast("Sequence[Any]", value)]
        return self.text(str(value))

    def found(self, text: str) -> bool:
        """Whether anything in the text must not be stored."""
        return next(iter(self._spans(text)), None) is not None

    def _number(self, value: float) -> Any:
        if isinstance(value, float) and not value.is_integer():
            return value  # what stands before and after a point is no number of a card or a phone
        text = str(int(value))
        return value if len(text) < 7 or not self.found(text) else self.text(text)

    def _spans(self, text: str) -> Iterator[tuple[int, int, str]]:
        """What is found, as places in `text`."""
        for name, find in self._finders:
            yield from ((start, end, name) for start, end in find(text))
        if "\\" not in text:
            return
        plain, places = _unescaped(text)
        for name, find in self._finders:
            yield from ((places(start), places(end), name) for start, end in find(plain))


def _merged(spans: Sequence[tuple[int, int, str]]) -> Iterator[tuple[int, int, str]]:
    """Sorted spans without overlap; one that overlaps others has the name of the first."""
    start, end, name = spans[0]
    for other, last, kind in spans[1:]:
        if other < end:
            end = max(end, last)
        else:
            yield start, end, name
            start, end, name = other, last, kind
    yield start, end, name


def _unescaped(text: str) -> tuple[str, Callable[[int], int]]:
    """The text with its JSON escapes undone, and a function from places in it to places in `text`."""
    parts: list[str] = []
    starts: list[int] = []  # of each piece of text between escapes, in the new text
    shifts: list[int] = [0]
    length = at = 0
    for match in _ESCAPE.finditer(text):
        piece = text[at : match.start()]
        code, letter = match[1], match[2]
        parts += (piece, chr(int(code, 16)) if code else _PLAIN.get(letter, letter))
        length += len(piece) + 1
        at = match.end()
        starts.append(length)
        shifts.append(at - length)
    parts.append(text[at:])

    def place(position: int) -> int:
        return position + shifts[bisect_right(starts, position)]

    return "".join(parts), place


def _elided(match: re.Match[str]) -> str:
    """An image, a sound or a file: never text to learn from, and it may show anything."""
    text = match[0]
    kind = text[5 : text.index(";")] if text.startswith("data:") else "base64"
    return f"[{kind}, {len(text)} characters, sha256 {hashlib.sha256(text.encode()).hexdigest()[:16]}]"


def _finder(regex: re.Pattern[str]) -> Finder:
    def find(text: str) -> Iterator[Span]:
        return (match.span() for match in regex.finditer(text) if match.end() > match.start())

    return find


def _compiled(given: str) -> Iterator[re.Pattern[str]]:
    path = Path(given)
    try:
        is_file = path.is_file()
    except (OSError, ValueError):
        is_file = False  # an expression that cannot be a file's name
    if not is_file:
        yield _regex(given, "--redact")
        return
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--redact {given}: the file cannot be read as UTF-8 text ({error}).") from None
    for number, line in enumerate(lines, start=1):
        if line.strip() and not line.lstrip().startswith("#"):
            yield _regex(line.strip(), f"{given}, line {number}")


def _regex(text: str, where: str) -> re.Pattern[str]:
    try:
        regex = re.compile(text)
    except re.error as error:
        raise UserError(
            f"{where}: {text!r} is no regular expression ({error}) and no file; expected one of the two."
        ) from None
    if regex.match("") is not None:
        raise UserError(f"{where}: {text!r} also matches nothing at all; give an expression that needs a character.")
    return regex

"""Prompts around a row: a text with column names in braces that ends where the model begins to write."""

from __future__ import annotations

import difflib
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from agentopt.errors import UserError

_PLACES = ("label", "answer", "completion")
"""Names that may close a prompt and stand for what the model writes."""
_CUES = {"classification": "Label:", "choice": "Answer:", "generation": "Answer:"}


@dataclass(frozen=True, slots=True)
class Template:
    """A prompt with columns in braces.

    Attributes:
        source: as the user wrote it.
        parts: pairs of literal text and the column that follows it (None at the end).
    """

    source: str
    parts: tuple[tuple[str, str | None], ...]

    @classmethod
    def parse(cls, source: str, *, columns: Sequence[str], answer: str = "label") -> Template:
        """Read a prompt.

        Raises:
            UserError: unbalanced braces, a name that is no column, or text after what the model writes.
        """
        parts: list[tuple[str, str | None]] = []
        closed = False
        try:
            found = list(string.Formatter().parse(source))
        except ValueError as error:
            raise UserError(f"prompt {source!r}: {error}; write {{{{ and }}}} for braces that are text.") from None
        for literal, name, form, conversion in found:
            if closed and literal + (name or ""):
                raise UserError(f"prompt {source!r}: found text after the answer; expected the answer at the end.")
            if form or conversion:
                raise UserError(f"prompt {source!r}: found a format after {name!r}, expected the name alone.")
            closed = name == answer or (name in _PLACES and name not in columns)
            if name is not None and not closed and name not in columns:
                raise UserError(f"prompt {source!r}: no column {name!r}{_close(name, columns)}")
            parts.append((literal, None if closed else name))
        if not any(name for _, name in parts):
            raise UserError(f"prompt {source!r}: shows no column; expected one of {_braces(columns)}.")
        return cls(source, tuple(parts))

    def render(self, fields: Mapping[str, str], *, place: str = "") -> str:
        """The prompt of a row.

        Raises:
            UserError: the row has no such column.
        """
        texts: list[str] = []
        for literal, name in self.parts:
            texts.append(literal)
            if name is None:
                continue
            if name not in fields:
                raise UserError(f"{place or 'a row'}: the field {name!r} is missing, which the prompt shows.")
            texts.append(fields[name])
        return "".join(texts)

    def filled(self, text: str) -> str:
        """The prompt with `text` in place of every column (content-free input, arXiv 2102.09690)."""
        return "".join(literal + (text if name else "") for literal, name in self.parts)


def default_template(kind: str, columns: Sequence[str]) -> Template:
    """`{text}`, a line break and a cue; several columns get their names. A column `prompt` is taken as it is."""
    if list(columns) == ["prompt"] and kind == "generation":
        return Template("{prompt}", (("", "prompt"),))
    parts: list[tuple[str, str | None]] = []
    lead = ""
    for column in columns:
        named = f"{column.replace('_', ' ').capitalize()}: " if len(columns) > 1 else ""
        parts.append((lead + named, column))
        lead = "\n"
    parts.append(("\n" + _CUES[kind], None))
    source = "".join(_escaped(literal) + (f"{{{name}}}" if name else "") for literal, name in parts)
    return Template(source, tuple(parts))


def joined(prompt: str, answer: str) -> tuple[str, str]:
    """Prompt and continuation as they are written: one space between them unless one side brings white space.

    Spaces at the end of the prompt go to the continuation, since tokenizers join a space with the word after it.
    """
    bare = prompt.rstrip(" ")
    spaces = prompt[len(bare) :]
    if spaces:
        return bare, spaces + answer.lstrip(" ")
    if not prompt or prompt[-1].isspace() or answer[:1].isspace():
        return prompt, answer
    return prompt, " " + answer


def _escaped(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")


def _close(name: str, columns: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, columns, n=1)
    return f"; did you mean {{{close[0]}}}?" if close else f"; the columns are {_braces(columns)}."


def _braces(columns: Sequence[str]) -> str:
    return ", ".join(f"{{{name}}}" for name in columns)

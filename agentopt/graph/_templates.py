"""Prompt templates: which `{variables}` a text has, and whether `str.format` can fill it.

Only `str.format` syntax is known here. Texts may hold any Unicode and any braces, so nothing in this file raises on a
strange text: a text that `str.format` refuses is described by `problem_with`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from string import Formatter

_IDENTIFIER_FIELD = re.compile(r"(?<!\{)\{([^\W\d]\w*)\}(?!\})")
_BASE = re.compile(r"[^.\[]*")


@dataclass(frozen=True, slots=True)
class Field:
    """One replacement field: `{base lookup !conversion :spec}`."""

    base: str
    lookup: str
    conversion: str
    spec: str

    @property
    def plain(self) -> bool:
        """Whether this is `{name}` and nothing more."""
        return not (self.lookup or self.conversion or self.spec)

    def __str__(self) -> str:
        conversion = f"!{self.conversion}" if self.conversion else ""
        spec = f":{self.spec}" if self.spec else ""
        return "{" + self.base + self.lookup + conversion + spec + "}"


def _parsed(text: str, depth: int = 0) -> Iterator[Field]:
    """Yield every field of `text`, those nested in format specs too; ValueError where `str.format` would raise one."""
    if depth > 1:
        raise ValueError("fields may be nested only once")
    for _, name, spec, conversion in Formatter().parse(text):
        if name is None:
            continue
        match = _BASE.match(name)
        base = match.group() if match else ""
        yield Field(base, name[len(base) :], conversion or "", spec or "")
        if spec:
            yield from _parsed(spec, depth + 1)


def fields(text: str) -> list[Field] | None:
    """Return the replacement fields of `text` in order, or None when `str.format` cannot parse it."""
    try:
        return list(_parsed(text))
    except ValueError:
        return None


def variables(text: str) -> tuple[str, ...]:
    """Return the names `text` would take from `str.format(**kwargs)`, in order of first use.

    Escaped braces count as text; `{name.attr}`, `{name[0]}`, `{name!r}`, `{name:>{width}}` count as `name` (and
    `width`). When the text cannot be parsed as a template (unescaped braces of a JSON example, say), only plain
    `{identifier}` places count.
    """
    found = fields(text)
    if found is None:
        names = [match.group(1) for match in _IDENTIFIER_FIELD.finditer(text)]
    else:
        names = [field.base for field in found]
    return tuple(dict.fromkeys(name for name in names if name.isidentifier()))


def problem_with(text: str, allowed: Sequence[Field]) -> str | None:
    """Say why `text` could not be filled like the template whose fields are `allowed`; None when it can.

    A field may be plain (`{ticket}`) or must stand in the original in exactly that form: lookups such as
    `{ticket.__class__}` and format specs are code, and a proposer may not add any.
    """
    found = fields(text)
    if found is None:
        return "has an unescaped brace that str.format cannot read; write {{ and }} for literal braces"
    legal = set(allowed)
    names = {field.base for field in allowed}
    for field in found:
        if field in legal or (field.plain and field.base in names):
            continue
        if field.base in names:
            return f"uses {field}, a form that the original text does not have; use {{{field.base}}}"
        if not field.base.isidentifier():
            return f"has literal braces at {str(field)[:40]!r} that str.format would fill; write {{{{ and }}}} instead"
    return None


def escape_braces(text: str, allowed: Sequence[Field]) -> str:
    """Return `text` with every brace doubled that is not an escape and not one of the `allowed` fields.

    The result can always be filled by `str.format` when `allowed` could. Used to repair proposals that contain, for
    example, JSON with bare braces.
    """
    forms = {str(field) for field in allowed} | {"{" + field.base + "}" for field in allowed}
    ordered = sorted(forms, key=len, reverse=True)
    parts: list[str] = []
    position = 0
    while position < len(text):
        form = _form_at(text, position, ordered)
        if form is None and text.startswith(("{{", "}}"), position):
            inner = _form_at(text, position + 1, ordered)
            if inner is None or text.startswith("}", position + 1 + len(inner)):
                parts.append(text[position : position + 2])
                position += 2
                continue
            # "{{name}" cannot be an escape, its closing brace is missing: a literal brace before a field.
        if form is not None:
            parts.append(form)
            position += len(form)
            continue
        character = text[position]
        parts.append(character * 2 if character in "{}" else character)
        position += 1
    return "".join(parts)


def _form_at(text: str, position: int, forms: Sequence[str]) -> str | None:
    return next((form for form in forms if text.startswith(form, position)), None)

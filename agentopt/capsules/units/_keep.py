"""Keep spans: what a capsule never loses, because the program around the prompt depends on it byte for byte.

Template placeholders, JSON schemas, statements of the output format, and what the user's own patterns match.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

from agentopt.capsules._types import Span, SpanKind
from agentopt.capsules.units._lines import Brackets, fence_end, same_length
from agentopt.capsules.units._sentences import split
from agentopt.capsules.units._words import words
from agentopt.errors import UserError

# Every alternative begins with one of five characters, so that a plain search finds the candidates. The first
# alternatives match what only looks like a placeholder: they give no span.
_SLOT = re.compile(
    r"""[{$%<\[](?:
      (?<=\$)(?:\$|(?=[^\s\d])(?:[^$\n\\]|\\.){0,200}?(?<=[^\s])\$(?!\w))            # LaTeX between dollars
     |(?P<slot>
       (?<=\{)\{\{[^{}\n]{1,120}\}\}\}|(?<=\{)\{[^{}\n]{1,200}\}\}|(?<=\{)%[^%\n]{1,200}%\}
      |(?<=\{)(?<![\\^_}]\{)(?<!\\[a-zA-Z]\{)(?:[^\W\d]\w{0,60}|\d{1,2})?(?:\.[^\W\d]\w{0,60}|\[[^\][{}\n]{1,60}\]){0,8}
          (?:![rsa])?(?::[^{}\s"']{1,20})?\}
      |(?<=\$)(?<![\w$\\]\$)(?:\{[^\W\d][\w.]{0,60}(?::?-[^{}\n]{0,60})?\}|[^\W\d]\w{0,60}\b(?!\$))
      |(?<=%)(?<![\w%]%)(?:\([^\W\d]\w{0,60}\))?[-+\#0]?\d{0,3}(?:\.\d{1,3})?[sdifgeExXr]\b(?!%)
      |(?<=\[)\[\s?[^\W\d][\w .|:-]{0,60}\]\]
      |(?<=<)(?<![\w<]<)[^\W\d][\w-]{0,40}(?:[ /|,'][\w'-]{1,40}){0,8}>
      )
    )""",
    re.VERBOSE,
)
_CLOSED = re.compile(r"</\s*([A-Za-z_][\w:.-]{0,60})\s*>")
_HTML = words(
    """a b i u p br hr em li ol ul td th tr h1 h2 h3 h4 h5 h6 img div pre sub sup span code body head html link
    meta table input small strong script style"""
)
_MACRO = re.compile(r"\\[A-Za-z]{1,30}\*?(?:\[[^\][\n]{0,60}\])?$")

# A sentence that states how to answer: the verb stands where an order is given, not in a narrative.
_SOME = r"(?:[\w'’]{1,40}\s){0,6}?"
_FORMAT = re.compile(
    rf"""(?:(?:^|(?<=[.!?:;,\n]))[^\S\n]*(?:[-*•]\s|\d{{1,2}}[.)]\s)?[("*_]{{0,3}}
        (?:(?:and|then|please|always|only|just|simply|finally|do|now|next|must|should|you(?:\ must|\ should|\ will)?)
          \s{{1,3}}){{0,3}}
       |\b(?:please|must|should|always|only|and|then|shall)\s)
      (?:(?:respond|reply|answer)s?\s(?:\w{{1,40}}\s){{0,3}}?(?:with|in|as(?!\s(?:best|well|if|much|many|soon))|using|by|only|yes|true)\b
        |(?:return|output|emit|produce|print|generate|provide|give|write|put|place|wrap|enclose|state)\s{_SOME}
          (?:json|xml|yaml|csv|markdown|html|format|schema|object|list\sof|array|exactly\sone|only\s(?:the|one|a)
          |nothing\selse|(?:final\s)?(?:answer|label|response|output|result)s?\s(?:as|in|on|inside|between|within))\b
        |(?:use|follow)\s{_SOME}(?:format|schema|template)\b
        |(?:use|write|keep|limit)\s{_SOME}(?:words|sentences|characters|bullet\spoints?)\b
        |format\s(?:your|the|each|all)\b
        |(?:end|finish|conclude|begin|start)\s(?:your|the|with)\s{_SOME}(?:with|line|answer|response|reply|output)\b)
      |(?:^|(?<=[.!?]\s))[^\S\n]*(?:\*\*|\#{{1,6}}\s)?
        (?:(?:output|answer|response|reply|return|expected)[ _-](?:format|schema|structure)|format|schema)
        (?:\*\*)?\s?[:：]
      |\b(?:output|answer|response|reply)s?\s(?:must|should|shall|has\sto|have\sto|needs\sto|will|is\sto)
        \s(?:be|contain|have|match|follow|conform|include|start|end|begin|only|not)\b
      |\b(?:json|xml|yaml)\s(?:schema|object|format)\s(?:below|above|:|with\s(?:the\s)?(?:following|keys|fields))
      |\bno\s(?:other|additional|extra)\s(?:text|words|output|commentary|explanation)\b
      |(?:请|必须|只)?(?:以|用|按)[^。\n]{{0,20}}(?:JSON|格式)(?:回答|输出|返回)?""",
    re.VERBOSE | re.IGNORECASE | re.MULTILINE,
)
# Each match of the pattern above holds one of these; only the lines around them are searched with it.
_FORMAT_WORDS = (
    "respond", "repl", "answer", "output", "label", "response", "result", "json", "xml", "yaml", "csv", "markdown",
    "html", "format", "schema", "template", "object", "list of", "array", "exactly one", "only the", "only one",
    "only a", "nothing else", "words", "sentences", "characters", "bullet", "start", "begin", "finish", "end with",
    "end your", "end the", "conclude", "no other", "no additional", "no extra", "格式",
)  # fmt: skip
_BEFORE, _AFTER = 160, 40
# One for one, where `str.lower` may change the length.
_LOWER = str.maketrans("ABCDEFGHIJKLMNOPQRSTUVWXYZ", "abcdefghijklmnopqrstuvwxyz")
_SCHEMA_TYPE = re.compile(
    r'"type"\s*:\s*(?:\[|"(?:object|array|string|number|integer|boolean|null|function)")|"\$schema"\s*:'
)
_SCHEMA_PART = re.compile(
    r'"(?:properties|items|enum|required|parameters|input_schema|anyOf|oneOf|allOf|\$defs|\$ref|const)"\s*:'
)
# (a+)+, (\w*)*, (?:[a-z]+)* and their kin.
_NESTED = re.compile(r"(?<!\\)\((?:\?:|\?P<\w+>)?(?:\\.|\[(?:\\.|[^\]\\])+\]|[^()\\\[\]])[+*]\)(?:[+*]|\{\d*,\})")
_JSON_OPENING = re.compile(r"^[^\S\n]*([\[{])", re.MULTILINE)
_FENCE = re.compile(r"^[^\S\n]*(`{3,}|~{3,})", re.MULTILINE)
_LONGEST_EXAMPLE = 1_500
_AROUND = 2_000


def find_keep(text: str, patterns: Sequence[str] = ()) -> list[Span]:
    """The keep spans of `text`, sorted, not overlapping; of two that overlap the union is one span.

    A match of a pattern that holds nothing but white space is no span.

    Raises:
        UserError: a pattern that is not a regular expression, or one that can take exponential time.
    """
    lines = same_length(text)
    found: list[Span] = []
    found += _matches(text, patterns)
    found += _slots(text)
    brackets = Brackets(lines)
    found += _schemas(lines, brackets)
    found += _formats(lines, brackets)
    return merge(found)


def merge(spans: Iterable[Span]) -> list[Span]:
    """Sorted; overlapping spans become one, of the kind of the one that begins first (the longest of these)."""
    merged: list[Span] = []
    for span in sorted(spans, key=lambda one: (one.start, -one.end)):
        if merged and span.start < merged[-1].end:
            if span.end > merged[-1].end:
                last = merged[-1]
                merged[-1] = Span(last.start, span.end, "keep", last.kind)
        else:
            merged.append(span)
    return merged


_PATIENCE = 10
"""Seconds for one pattern of the user's on one text."""


def compile_patterns(patterns: Sequence[str]) -> list[re.Pattern[str]]:
    """The user's patterns.

    Raises:
        UserError: a pattern that is not a regular expression, or one that can take exponential time.
    """
    compiled: list[re.Pattern[str]] = []
    for pattern in patterns:
        if _NESTED.search(pattern):
            raise UserError(
                f"keep: found the pattern {pattern!r}, a repeat of a group that is itself only a repeat, which can take"
                " exponential time; expected one repeat: write a+ for (a+)+."
            )
        try:
            compiled.append(re.compile(pattern))
        except (re.error, RecursionError, OverflowError) as error:
            raise UserError(
                f"keep: found the pattern {pattern!r} ({error}), expected a regular expression as Python's re reads it;"
                " escape special characters with a backslash."
            ) from None
    return compiled


def _matches(text: str, patterns: Sequence[str]) -> list[Span]:
    found: list[Span] = []
    for pattern in compile_patterns(patterns):
        for start, end in _places(pattern, text):
            if text[start:end].strip():
                found.append(Span(start, end, "keep", "pattern"))
    return found


def _places(pattern: re.Pattern[str], text: str) -> list[tuple[int, int]]:
    """Where a user's pattern matches; the regex module, where it is installed, can give up on a slow one."""
    try:
        import regex
    except ImportError:
        return [match.span() for match in pattern.finditer(text)]
    try:
        bounded: Any = regex.compile(pattern.pattern, pattern.flags & ~re.UNICODE)
        return [match.span() for match in bounded.finditer(text, timeout=_PATIENCE)]
    except TimeoutError:
        raise UserError(
            f"keep: the pattern {pattern.pattern!r} took more than {_PATIENCE} s; expected one without repeats that "
            "can match the same characters in many ways."
        ) from None
    except regex.error:  # what re reads and regex does not
        return [match.span() for match in pattern.finditer(text)]


def _slots(text: str) -> list[Span]:
    """Template placeholders."""
    spans: list[Span] = []
    closed: set[str] | None = None
    for match in _SLOT.finditer(text):
        if match["slot"] is None:
            continue
        start, end = match.span()
        first = text[start]
        if first == "<":
            if closed is None:
                closed = {name.lower() for name in _CLOSED.findall(text)} if "</" in text else set()
            name = text[start + 1 : end - 1].split(" ", 1)[0].lower()
            if name in closed or name in _HTML:
                continue
        elif first == "{" and text[start + 1] not in "{%" and _is_code(text, start, end):
            continue
        spans.append(Span(start, end, "keep", "placeholder"))
    return spans


def _is_code(text: str, start: int, end: int) -> bool:
    """Whether single braces are the argument of a LaTeX macro, or empty ones of code or JSON."""
    if end - start == 2 and text[max(0, start - 3) : start].rstrip()[-1:] in tuple(":=)>,[({"):
        return True
    return bool(_MACRO.search(text, max(0, start - 40), start))


def is_schema(text: str, start: int, end: int) -> bool:
    """Whether a JSON block is a JSON schema, or a tool definition that holds one."""
    return bool(_SCHEMA_TYPE.search(text, start, end) and _SCHEMA_PART.search(text, start, end))


def _schemas(text: str, brackets: Brackets) -> list[Span]:
    if not _SCHEMA_TYPE.search(text):
        return []
    spans: list[Span] = []
    after = 0
    for match in _JSON_OPENING.finditer(text):
        start = match.start(1)
        if start < after:
            continue
        end = brackets.close(start)
        if end > 0:
            after = end
            if is_schema(text, start, end):
                spans.append(Span(start, end, "keep", "schema"))
    return spans


def _formats(text: str, brackets: Brackets) -> list[Span]:
    """Sentences that state the output format, and the example that follows one that ends in a colon."""
    spans: list[Span] = []
    after = 0
    pieces: list[tuple[int, int]] = []
    for match in _statements(text):
        if match.end() <= after:
            continue
        at = match.end() - 1
        if not pieces or at >= pieces[-1][0]:
            pieces = _sentences_around(text, at)
        start, end = pieces[bisect_right(pieces, at, key=lambda piece: piece[0]) - 1]
        if start < after:
            continue
        spans.append(Span(start, end, "keep", "format"))
        after = end
        if text[end - 1] in ":：" or text[end - 3 : end] == ":**":
            example = _example(text, end, brackets)
            if example is not None:
                spans.append(example)
                after = example.end
    return spans


def _statements(text: str) -> Iterator[re.Match[str]]:
    """Where an order about the format of the answer is, found by its words first: most prose holds none of them."""
    low = text.lower()
    if len(low) != len(text):
        low = text.translate(_LOWER)
    hits: list[int] = []
    for word in _FORMAT_WORDS:
        at = low.find(word)
        while at >= 0:
            hits.append(at)
            at = low.find(word, at + len(word))
    hits.sort()
    at = 0
    while at < len(hits):
        start, end = max(0, hits[at] - _BEFORE), hits[at] + _AFTER
        while at < len(hits) and hits[at] - _BEFORE <= end:
            end = hits[at] + _AFTER
            at += 1
        yield from _FORMAT.finditer(text, start, min(end, len(text)))


def _sentences_around(text: str, at: int) -> list[tuple[int, int]]:
    """Offsets of the sentences around the character at `at`, at most a paragraph of them."""
    low, high = max(0, at - _AROUND), min(len(text), at + _AROUND)
    start = text.rfind("\n\n", low, at)
    start = low if start < 0 else start + 2
    end = text.find("\n\n", at, high)
    return split(text, start, high if end < 0 else end)


def _example(text: str, at: int, brackets: Brackets) -> Span | None:
    """The block after a colon: fenced code, JSON, or the lines up to a blank one."""
    size = len(text)
    gaps = 0
    while at < size and text[at].isspace():
        gaps += text[at] == "\n"
        at += 1
    if at >= size or gaps > 2:
        return None
    kind = cast("SpanKind", "format")
    end = -1
    if text.startswith(("```", "~~~"), at):
        end, kind = fence_end(text, at), "schema"
    elif text[at] in "[{":
        end, kind = brackets.close(at), "schema"
    if end < 0:
        kind = "format"
        end = text.find("\n\n", at, at + _LONGEST_EXAMPLE)
        if end < 0:
            end = size if size - at <= _LONGEST_EXAMPLE else -1
    if end - at > _LONGEST_EXAMPLE:
        return None
    end = at + len(text[at:end].rstrip())
    return Span(at, end, "keep", kind) if end > at else None

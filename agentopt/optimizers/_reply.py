"""Reading what a language model answered, however badly formed it is.

The unit is one reply. Rungs, first that fits: an already parsed object, a code fence taken off, the whole text as JSON,
the outermost balanced braces that parse, tags (`<variable name="x">`, `<name>`/`<value>` pairs, `<x>`), regular
expressions over `"name": "value"` pairs (which also read truncated JSON). Nothing here raises on strange text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from agentopt.optimizers._legal import strip_fence

_FENCED = re.compile(r"```[\w-]*[ \t]*\n(.*?)```", re.DOTALL)
_CONTAINERS = ("suggestion", "suggestions", "variables", "edits", "updates", "changes", "values")
_REASONS = ("reasoning", "rationale", "analysis", "explanation", "thought")
_NO_CHANGE = re.compile(r"^\W*(TERMINATE|NO[ _]CHANGE)\W*$", re.IGNORECASE)
_PAIR_TAGS = re.compile(r"<name>\s*(.*?)\s*</name>\s*<(value|data|text)>\n?(.*?)\n?</\2>", re.DOTALL | re.IGNORECASE)
_VARIABLE_TAG = re.compile(
    r"<(variable|parameter|suggestion)\s+name\s*=\s*[\"']?([^\"'>]+)[\"']?\s*>\n?(.*?)\n?</\1>",
    re.DOTALL | re.IGNORECASE,
)
_VALUE_INSIDE = re.compile(r"^\s*<(value|data|text)>\n?(.*?)\n?</\1>\s*$", re.DOTALL | re.IGNORECASE)
_REASON_TAG = re.compile(r"<(reasoning|rationale|analysis)>(.*?)(?:</\1>|$)", re.DOTALL | re.IGNORECASE)
_MAX_TEXT = 200_000
_MAX_OBJECTS = 64


@dataclass(frozen=True, slots=True)
class Parsed:
    """What was found: known name → value. `problem` is None when the reply was readable (no change included)."""

    suggestion: dict[str, Any] = field(default_factory=dict[str, Any])
    reasoning: str = ""
    problem: str | None = None
    unknown: tuple[str, ...] = ()
    """Names that stood in the reply and are no parameter."""


def parse_reply(reply: Any, names: Sequence[str]) -> Parsed:
    """Read a reply: a string, None, or an object that structured output already parsed."""
    if isinstance(reply, Mapping):
        found = _from_object(cast("Mapping[str, Any]", reply), names)
        return found or Parsed(problem="the JSON object has no suggestion and no known name")
    if not isinstance(reply, str) or not reply.strip():
        return Parsed(problem="the answer is empty")
    text = reply[:_MAX_TEXT]
    if _NO_CHANGE.match(text.strip()):
        return Parsed()
    unknown: tuple[str, ...] = ()
    for candidate in _objects(text):
        found = _from_object(candidate, names)
        if found is not None:
            if found.suggestion or not found.unknown:
                return found
            unknown = found.unknown
    for rung in (_from_tags, _from_pairs):
        suggestion = rung(text, names)
        if suggestion:
            return Parsed(suggestion, _reason(text))
    if unknown:
        return Parsed(problem=f"it changes {', '.join(map(repr, unknown[:3]))}, which is no variable", unknown=unknown)
    return Parsed(problem=_why_unreadable(text))


def resolve_name(written: str, names: Sequence[str]) -> str | None:
    """The parameter a model meant: exact, without case or quotes, without a version suffix, or by its last part."""
    if written in names:
        return written
    wanted = _folded(written)
    for normal in (_folded, _bare, _last):
        matches = [name for name in names if normal(name) == normal(written) or normal(name) == wanted]
        if len(matches) == 1:
            return matches[0]
    stripped = re.sub(r":?\d+$", "", written.strip())
    if stripped and stripped != written.strip():
        return resolve_name(stripped, names)
    return None


def _folded(name: str) -> str:
    return name.strip().strip("\"'`{}<>* ").casefold()


def _bare(name: str) -> str:
    return re.sub(r"[\W_]+", "", _folded(name))


def _last(name: str) -> str:
    return _bare(_folded(name).rsplit(".", 1)[-1])


# --- JSON ------------------------------------------------------------------------------------------------------------


def _objects(text: str) -> Iterator[Mapping[str, Any]]:
    """Every JSON object that can be found, most likely ones first."""
    for piece in (strip_fence(text), text.strip(), *(match.group(1).strip() for match in _FENCED.finditer(text))):
        value = _loads(piece)
        if isinstance(value, Mapping):
            yield cast("Mapping[str, Any]", value)
        elif isinstance(value, list):
            yield {"suggestion": value}
    decoder = json.JSONDecoder(strict=False)
    position = text.find("{")
    for _ in range(_MAX_OBJECTS):
        if position < 0:
            return
        try:
            value, end = decoder.raw_decode(text, position)
        except (ValueError, RecursionError):
            end = position + 1
        else:
            if isinstance(value, Mapping):
                yield cast("Mapping[str, Any]", value)
        position = text.find("{", end)


def _loads(text: str) -> Any:
    for attempt in (text, re.sub(r",\s*([}\]])", r"\1", text)):
        try:
            return json.loads(attempt, strict=False)
        except (ValueError, RecursionError):
            continue
    return None


def _from_object(data: Mapping[str, Any], names: Sequence[str]) -> Parsed | None:
    reasoning = next((str(data[key]) for key in _REASONS if isinstance(data.get(key), str)), "")
    found: dict[str, Any] = {}
    unknown: list[str] = []
    container = next((data[key] for key in _CONTAINERS if key in data and key not in names), None)
    readable = container is not None
    if isinstance(container, str):
        inner = _loads(strip_fence(container))
        container = inner if inner is not None else ({names[0]: container} if len(names) == 1 else None)
    for written, value in [*_entries(container), *_entries({k: v for k, v in data.items() if k not in _CONTAINERS})]:
        name = resolve_name(written, names)
        if name is not None:
            found.setdefault(name, _value(value))
        elif written not in _REASONS and written not in ("answer", "format"):
            unknown.append(written)
    if not found and not readable:
        return None
    return Parsed(found, reasoning, unknown=tuple(unknown))


def _entries(container: Any) -> Iterator[tuple[str, Any]]:
    """(name, value) pairs of `{name: value}`, `{"name": n, "value": v}` or a list of either."""
    if isinstance(container, Mapping):
        entries = cast("Mapping[str, Any]", container)
        name = entries.get("name", entries.get("variable"))
        key = next((key for key in ("value", "new_value", "text", "data") if key in entries), None)
        if isinstance(name, str) and key is not None:
            yield name, entries[key]
        else:
            yield from ((str(written), value) for written, value in entries.items())
    elif isinstance(container, list):
        for item in cast("list[Any]", container)[:_MAX_OBJECTS]:
            if isinstance(item, Mapping):
                yield from _entries(item)


def _value(value: Any) -> Any:
    if isinstance(value, Mapping):
        entries = cast("Mapping[str, Any]", value)
        for key in ("value", "new_value", "text"):
            if key in entries and len(entries) <= 3:
                return entries[key]
        return dict(entries)
    return value


# --- tags and pairs --------------------------------------------------------------------------------------------------


def _from_tags(text: str, names: Sequence[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for match in _VARIABLE_TAG.finditer(text):
        inside = _VALUE_INSIDE.match(match.group(3))
        _put(found, match.group(2), inside.group(2) if inside else match.group(3), names)
    for match in _PAIR_TAGS.finditer(text):
        _put(found, match.group(1), match.group(3), names)
    for name in names:
        if name in found:
            continue
        tag = re.escape(name)
        match = re.search(rf"<{tag}>\n?(.*?)\n?</{tag}>", text, re.DOTALL)
        if match:
            found[name] = match.group(1)
    return found


def _put(found: dict[str, Any], written: str, value: str, names: Sequence[str]) -> None:
    name = resolve_name(written, names)
    if name is not None and name not in found:
        found[name] = value


def _from_pairs(text: str, names: Sequence[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in names:
        spelled = re.escape(name)
        match = re.search(rf"[\"']{spelled}[\"']\s*:\s*\"((?:[^\"\\]|\\.)*)\"", text, re.DOTALL)
        if match:
            found[name] = _unescape(match.group(1))
            continue
        match = re.search(rf"[\"']{spelled}[\"']\s*:\s*(-?\d+(?:\.\d+)?|true|false)\b", text)
        if match:
            found[name] = _loads(match.group(1))
            continue
        match = re.search(rf"(?m)^[ \t>*-]*[\"'`*]*{spelled}[\"'`*]*\s*[:=]\s*(.+)$", text)
        if match:
            found[name] = match.group(1).strip().strip("\"'`*,")
    return {name: value for name, value in found.items() if value not in ("", None, "{", "[")}


def _unescape(body: str) -> str:
    try:
        return str(json.loads(f'"{body}"', strict=False))
    except ValueError:
        return body


def _reason(text: str) -> str:
    match = _REASON_TAG.search(text)
    if match:
        return match.group(2).strip()
    match = re.search(r"\"(?:reasoning|rationale)\"\s*:\s*\"((?:[^\"\\]|\\.)*)\"", text, re.DOTALL)
    return _unescape(match.group(1)) if match else ""


def _why_unreadable(text: str) -> str:
    if "{" not in text:
        return "it contains no JSON object"
    try:
        json.loads(text[text.index("{") :], strict=False)
    except (ValueError, RecursionError) as error:
        return f"it is not valid JSON ({error})"
    return "the JSON object has no suggestion and no known name"


# --- one text --------------------------------------------------------------------------------------------------------

_REFUSAL = re.compile(
    r"^\W*(i'?m sorry|i am sorry|sorry|i can(no|')t|i am unable|i'm unable|as an ai|unfortunately|error\b|null\b|"
    r"none\b|todo\b|n/?a\b|i don'?t)",
    re.IGNORECASE,
)
_PREAMBLE = re.compile(
    r"^\s*(?:(?:sure|certainly|of course|okay|ok)[^\n]*\n+|here(?:'s| is)[^\n:]*:\s*|(?:new |improved |better |final )?"
    r"instructions?\s*:\s*)+",
    re.IGNORECASE,
)


def parse_text(reply: Any, key: str, *, max_chars: int = 6000) -> str | None:
    """One text out of a reply: the value of `key`, a tagged or fenced text, or the reply itself when it can be one.

    Returns None for nothing, refusals and broken JSON.
    """
    parsed = parse_reply(reply, [key])
    value = parsed.suggestion.get(key)
    if value is None and isinstance(reply, str):
        fenced = _FENCED.search(reply)
        value = fenced.group(1) if fenced else reply
        if value.lstrip().startswith(("{", "[")):
            return None
    if not isinstance(value, str):
        return None
    text = _PREAMBLE.sub("", value.strip()).strip().strip("`").strip()
    if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'":
        text = text[1:-1].strip()
    if not text or len(text) > max_chars or _REFUSAL.match(text) or not re.search(r"[^\W\d_]{2}", text):
        return None
    return text

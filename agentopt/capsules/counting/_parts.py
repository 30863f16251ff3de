"""Chat messages as texts and back: which characters of a request may be compressed, and the request without the rest.

Only text content is a part. Tool calls, ids, names and images are never touched. A message whose text has gone leaves
the request, unless something needs it: an answer to a tool call stays with a short line in its place, because providers
refuse a call without its answer, and so does a turn between two turns of the other side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from agentopt.errors import UserError

OMITTED = "[omitted]"


@dataclass(frozen=True, slots=True)
class Part:
    """One text of a request: the content of a message, or one text entry of a content list."""

    message: int
    entry: int | None
    role: str
    text: str


def check_messages(messages: Sequence[Any]) -> list[dict[str, Any]]:
    """The messages as plain dicts.

    Raises:
        UserError: something is not a chat message in OpenAI form.
    """
    checked: list[dict[str, Any]] = []
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(cast("Mapping[str, Any]", message).get("role"), str):
            found = f"{message!r:.60}"
            raise UserError(f'messages[{number}]: found {found}, expected {{"role": "...", "content": "..."}}.')
        plain = dict(cast("Mapping[str, Any]", message))
        content = plain.get("content")
        if not (content is None or isinstance(content, str | list)):
            raise UserError(
                f"messages[{number}].content: found {type(content).__name__}, expected text or a list of content parts."
            )
        checked.append(plain)
    return checked


def parts_of(messages: Sequence[Mapping[str, Any]]) -> list[Part]:
    """The texts of the messages, in order; a message without text has none."""
    parts: list[Part] = []
    for number, message in enumerate(messages):
        role, content = str(message.get("role", "")), message.get("content")
        if isinstance(content, str):
            parts.append(Part(number, None, role, content))
        elif isinstance(content, list):
            for place, entry in enumerate(cast("list[Any]", content)):
                if _is_text(entry):
                    parts.append(Part(number, place, role, entry["text"]))
    return parts


def with_texts(messages: Sequence[Mapping[str, Any]], texts: Sequence[str]) -> list[dict[str, Any]]:
    """The messages with `texts` in place of their parts (as `parts_of` lists them); what is left empty leaves."""
    new: list[dict[str, Any]] = [dict(message) for message in messages]
    for part, text in zip(parts_of(messages), texts, strict=True):
        if part.entry is None:
            new[part.message]["content"] = text
        else:
            content = list(new[part.message]["content"])
            content[part.entry] = {**content[part.entry], "text": text}
            new[part.message]["content"] = content
    settled = [_settled(before, after) for before, after in zip(messages, new, strict=True)]
    return [after for after in _in_turns(messages, settled) if after is not None]


def _in_turns(
    messages: Sequence[Mapping[str, Any]], settled: Sequence[dict[str, Any] | None]
) -> list[dict[str, Any] | None]:
    """An emptied turn that kept two turns of one side apart stays as a short line: many templates demand turns."""
    done = list(settled)
    before, place = "", 0
    while place < len(done):
        here = done[place]
        if here is not None:
            before, place = _side(here), place + 1
            continue
        end = next((later for later in range(place, len(done)) if done[later] is not None), len(done))
        if end < len(done):
            after = _side(done[end] or {})
            missing = {"user": "assistant", "assistant": "user"}.get(after, "") if before in (after, "") else ""
            if before == "" and after == "user":
                missing = ""
            kept = next((one for one in range(place, end) if messages[one].get("role") == missing), None)
            if kept is not None:
                done[kept] = {**messages[kept], "content": OMITTED}
        before, place = before if end == len(done) else "", end
    return done


def _side(message: Mapping[str, Any]) -> str:
    role = str(message.get("role", ""))
    return role if role in ("user", "assistant") else ""


def _settled(before: Mapping[str, Any], after: dict[str, Any]) -> dict[str, Any] | None:
    if before.get("content") == after.get("content"):
        return after
    content = after["content"]
    if isinstance(content, list):
        content = [entry for entry in cast("list[Any]", content) if not (_is_text(entry) and not entry["text"])]
        after["content"] = content
    if content:
        return after
    if after.get("tool_call_id") or after.get("role") in ("tool", "function"):
        after["content"] = OMITTED
        return after
    if after.get("tool_calls") or after.get("function_call"):
        after["content"] = None
        return after
    return None


def _is_text(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and cast("dict[str, Any]", entry).get("type") == "text"
        and isinstance(cast("dict[str, Any]", entry).get("text"), str)
    )

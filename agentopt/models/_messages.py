"""From what a caller gives (`system=`, `user=`, `demos=`, `messages=`, handles, images) to plain chat messages.

Handles (`agentopt.prompt(...)`, `agentopt.demos(...)`) are looked up here without being recorded; the `LM` records the
reads once the call's own record is open, so the parameter edges belong to the call.
"""

from __future__ import annotations

import base64
import json
import mimetypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from agentopt import graph
from agentopt.errors import UserError
from agentopt.models._knowledge import Named, named_knowledge, placed
from agentopt.models._protocol import Message

_PLAIN = (str, int, float, bool, type(None))


@dataclass(slots=True)
class Prompt:
    """Resolved messages, what to record as the call's inputs, and the parameters that were read for them."""

    messages: tuple[Message, ...]
    inputs: dict[str, Any]
    specs: list[graph.ParameterSpec] = field(default_factory=list[graph.ParameterSpec])
    knowledge: Named = field(default_factory=Named)


def image(source: str | bytes | Path, *, mime: str | None = None) -> dict[str, Any]:
    """A content part with an image: an `https:`/`data:` URL, a file, or bytes (then give `mime`, default image/png).

    Raises:
        UserError: the file cannot be read.
    """
    if isinstance(source, str) and source.startswith(("http://", "https://", "data:")):
        return {"type": "image_url", "image_url": {"url": source}}
    if isinstance(source, bytes):
        data = source
    else:
        try:
            data = Path(source).read_bytes()
        except OSError as error:
            raise UserError(f"image {str(source)!r}: {error.strerror or error}") from error
        mime = mime or mimetypes.guess_type(str(source))[0]
    url = f"data:{mime or 'image/png'};base64,{base64.b64encode(data).decode('ascii')}"
    return {"type": "image_url", "image_url": {"url": url}}


def build(messages: Any, system: Any, user: Any, demos: Any, knowledge: Any = None) -> Prompt:
    """Plain messages: system first, then the given messages, then the user turn; demos stand before the last user turn.

    `system` alone is sent as the only user turn: a template that holds the whole prompt is common, and many chat
    templates reject a conversation without a user turn. The text of `knowledge` stands before the system text.

    Raises:
        UserError: nothing was given, or a message or demo has another form than expected.
    """
    specs: list[graph.ParameterSpec] = []
    named = named_knowledge(knowledge)
    system, user = _plain(system, specs), _plain(user, specs)
    turns = _turns(_plain(messages, specs))
    examples = _plain(demos, specs)
    inputs: dict[str, Any] = {}
    for name, value in (("system", system), ("user", user), ("messages", turns or None), ("demos", examples or None)):
        if value is not None:
            inputs[name] = value
    if user is not None:
        turns.append({"role": "user", "content": _content("user", user)})
    if system == "" and turns and named.adapter is not None:
        system = None  # the folded knowledge itself, whose text is empty
    if system is not None:
        only = not turns
        turns.insert(0, {"role": "user" if only else "system", "content": _content("system", system)})
    if turns:
        turns = placed(turns, named.texts, 0 if system is not None or turns[0]["role"] == "system" else None)
    if not turns:
        raise UserError("a language model call needs messages=, user= or system=; none was given")
    if examples:
        turns = _with_demos(turns, examples)
    graph.claim_knowledge(named.names)
    return Prompt(tuple(turns), inputs, [*specs, *named.specs], named)


def tools_of(tools: Any, specs: list[graph.ParameterSpec]) -> tuple[dict[str, Any], ...]:
    """The tools of a call as a chat API takes them; a toolbox is looked up like any handle."""
    if isinstance(tools, graph.Toolbox):
        value = graph.peek_value(tools.spec)
        specs.extend((tools.spec, *tools.reads(value)))
        return tuple(tools.for_model(value))
    return tuple(tools)


def _plain(value: Any, specs: list[graph.ParameterSpec]) -> Any:
    """`value` with every handle in it replaced by its active value."""
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, graph.Handle):
        specs.append(value.spec)
        return value.for_model(graph.peek_value(value.spec))
    if isinstance(value, graph.Components):
        specs.extend(handle.spec for component, handle in value.handles.items() if component != "demos")
        return value.for_model(graph.peek_value)
    if isinstance(value, Mapping):
        return {key: _plain(item, specs) for key, item in cast("Mapping[str, Any]", value).items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, specs) for item in cast("Sequence[Any]", value)]
    return value


def _turns(messages: Any) -> list[Message]:
    if messages is None:
        return []
    if isinstance(messages, str):
        return [{"role": "user", "content": messages}]
    if isinstance(messages, Mapping):
        messages = [messages]
    if not isinstance(messages, list):
        raise UserError(f"messages: expected a list of chat messages, found {type(messages).__name__}")
    turns: list[Message] = []
    for index, turn in enumerate(cast("list[Any]", messages)):
        if not isinstance(turn, dict) or not isinstance(cast("dict[str, Any]", turn).get("role"), str):
            raise UserError(f'messages[{index}]: expected {{"role": "...", "content": ...}}, found {turn!r:.80}')
        turns.append(cast("Message", turn))
    return turns


def _content(name: str, value: Any) -> Any:
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        parts = cast("list[Any]", value)
        if all(isinstance(part, (str, dict)) for part in parts):
            return [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    raise UserError(
        f"{name}: expected text, a handle, or a list of content parts, found {type(cast('object', value)).__name__}"
    )


def _with_demos(turns: list[Message], examples: Any) -> list[Message]:
    """The turns with demonstrations before the last user turn.

    A trailing assistant turn is the beginning of the answer; the demonstrated answers begin with it too, because a
    model that is shown bare answers does not expect the beginning it is given.
    """
    shown: list[Message] = []
    cue = turns[-1]["content"] if turns[-1]["role"] == "assistant" else ""
    if isinstance(cue, str) and cue and not cue[-1].isspace():
        cue += " "
    for index, item in enumerate(cast("Sequence[Any]", examples)):
        if not isinstance(item, dict) or not {"input", "output"} <= cast("dict[str, Any]", item).keys():
            raise UserError(f'demos[{index}]: expected {{"input": ..., "output": ...}}, found {item!r:.80}')
        demo = cast("dict[str, Any]", item)
        shown.append({"role": "user", "content": _text(demo["input"])})
        answer = _text(demo["output"])
        shown.append({"role": "assistant", "content": cue + answer if isinstance(cue, str) else answer})
    last = max((index for index, turn in enumerate(turns) if turn["role"] == "user"), default=len(turns))
    return [*turns[:last], *shown, *turns[last:]]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def text_of(message: Message) -> str:
    """The text of one message, its text parts joined by newlines."""
    content = message.get("content")
    if isinstance(content, str):
        return content
    parts = cast("list[dict[str, Any]]", content or [])
    return "\n".join(str(part["text"]) for part in parts if part.get("type") == "text")

"""Reads what a client was sent, whole or as server-sent events, on any route: texts, tool calls, why it ended.

The unit is one `Answer`. Nothing here raises: a reply that broke off gives what came, and one that cannot be read says
so. Counts of tokens are not taken from here; the gateway knows them better.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, cast

from agentopt.serving._types import CHAT, COMPLETIONS, MESSAGES, RESPONSES
from agentopt.serving.capture._stencil import Stencil

JSONDict = dict[str, Any]
_MAX_CHOICES = 128


@dataclass(slots=True)
class Spoken:
    """One choice of a reply."""

    texts: list[str] = field(default_factory=list[str])
    reasoning: list[str] = field(default_factory=list[str])
    calls: dict[Any, JSONDict] = field(default_factory=dict[Any, JSONDict])
    """By index or id: `{"id", "name", "arguments"}` with the arguments as the text that was sent."""
    finish: str | None = None

    @property
    def text(self) -> str:
        """What it says."""
        return "".join(self.texts)

    def call(self, key: Any) -> JSONDict:
        """The tool call with this key, made where it is new."""
        return self.calls.setdefault(key, {"id": "", "name": "", "arguments": ""})


@dataclass(slots=True)
class Answer:
    """One reply."""

    choices: list[Spoken] = field(default_factory=list[Spoken])
    error: str | None = None
    """The message of an error that came instead of (the rest of) the reply."""
    complete: bool = False
    """It ended as the route's protocol says: nothing is missing."""
    model: str = ""

    def choice(self, index: int) -> Spoken:
        """The choice with this number; an absurd number is the last one."""
        index = min(max(index, 0), _MAX_CHOICES - 1)
        while len(self.choices) <= index:
            self.choices.append(Spoken())
        return self.choices[index]


def read_reply(route: str, body: bytes) -> Answer:
    """What `body`, sent for a request to `route`, says."""
    answer = Answer()
    head = body[:64].lstrip()
    if head.startswith((b"{", b"[")) or not head:
        value = _json(body)
        if isinstance(value, dict):
            _whole(route, cast("JSONDict", value), answer)
        else:
            answer.error = "the reply is not a JSON object" if head else "there was no reply"
        return answer
    _stream(route, body.decode("utf-8", "replace"), answer)
    return answer


def _stream(route: str, text: str, answer: Answer) -> None:
    stencil = Stencil(lambda event: _alone(route, event))
    seen = False
    for data in _events(text):
        said = stencil.says(data)
        if said is not None:
            _add(answer.choice(stencil.choice).texts, said)
            continue
        if data == "[DONE]":
            answer.complete, seen = True, True
            continue
        value = _json(data)
        if isinstance(value, dict):
            seen = True
            _event(route, cast("JSONDict", value), answer)
            stencil.learn(data)
    if not seen:
        answer.error = "the reply is neither JSON nor server-sent events"


def _alone(route: str, data: str) -> tuple[int, str] | None:
    """The number of the choice and the text of an event that changes nothing but them."""
    value = _json(data)
    if not isinstance(value, dict):
        return None
    found = Answer()
    _event(route, cast("JSONDict", value), found)
    if not found.choices:
        return None
    *others, last = found.choices
    text = last.text
    found.model = ""
    silent = found == Answer(choices=[*(Spoken() for _ in others), Spoken(texts=[text])])
    return (len(others), text) if silent else None


def _events(text: str) -> Iterator[str]:
    """The data of each server-sent event; several data lines of one event are joined."""
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    *blocks, _ = text.split("\n\n")
    # An event without the empty line after it was cut off; what it said is not sure, so it is left out.
    for block in blocks:
        if block.startswith("data:") and "\n" not in block:
            yield block[6 if block.startswith(" ", 5) else 5 :]
            continue
        lines = [line[5:].removeprefix(" ") for line in block.split("\n") if line.startswith("data:")]
        if lines:
            yield "\n".join(lines)


def _json(text: str | bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _whole(route: str, value: JSONDict, answer: Answer) -> None:
    answer.model = _text(value.get("model"))
    if _failed(value, answer):
        return
    answer.complete = True
    if route == RESPONSES:
        _response(value, answer)
    elif route == MESSAGES:
        _message(value, answer)
    else:
        for place, choice in enumerate(_dicts(value.get("choices"))):
            _choice(route, choice, answer.choice(_number(choice.get("index"), place)), "message")


def _event(route: str, value: JSONDict, answer: Answer) -> None:
    if not answer.model:
        answer.model = _text(value.get("model"))
    if route == RESPONSES:
        _response_event(value, answer)
    elif route == MESSAGES:
        _message_event(value, answer)
    elif not _failed(value, answer):
        for place, choice in enumerate(_dicts(value.get("choices"))):
            _choice(route, choice, answer.choice(_number(choice.get("index"), place)), "delta")


def _failed(value: JSONDict, answer: Answer) -> bool:
    """Whether it is an error object; its message is kept."""
    error: Any = value.get("error")
    if error is None or (not isinstance(error, (dict, str)) and not error):
        return False
    found: Any = cast("JSONDict", error).get("message") if isinstance(error, dict) else error
    answer.error = _text(found) or "an error without a message"
    return True


# ---- chat and completions


def _choice(route: str, choice: JSONDict, spoken: Spoken, part: str) -> None:
    if isinstance(choice.get("finish_reason"), str):
        spoken.finish = choice["finish_reason"]
    if route == COMPLETIONS:
        _add(spoken.texts, choice.get("text"))
        return
    if route != CHAT:
        return
    said = _dict(choice.get(part))
    content: Any = said.get("content")
    if isinstance(content, list):
        for piece in _dicts(cast("Any", content)):
            _add(spoken.texts, piece.get("text"))
    else:
        _add(spoken.texts, content)
    _add(spoken.texts, said.get("refusal"))
    _add(spoken.reasoning, said.get("reasoning_content") or said.get("reasoning"))
    for place, call in enumerate(_dicts(said.get("tool_calls"))):
        function = _dict(call.get("function"))
        known = spoken.call(_number(call.get("index"), place))
        known["id"] = known["id"] or _text(call.get("id"))
        known["name"] = known["name"] or _text(function.get("name"))
        known["arguments"] += _text(function.get("arguments"))


# ---- responses


def _response(value: JSONDict, answer: Answer) -> None:
    spoken = answer.choice(0)
    for place, item in enumerate(_dicts(value.get("output"))):
        kind = item.get("type")
        if kind == "message":
            for part in _dicts(item.get("content")):
                _add(spoken.texts, part.get("text") or part.get("refusal"))
        elif kind == "function_call":
            known = spoken.call(place)
            known["id"], known["name"] = _text(item.get("call_id") or item.get("id")), _text(item.get("name"))
            known["arguments"] = _text(item.get("arguments"))
        elif kind == "reasoning":
            for part in (*_dicts(item.get("summary")), *_dicts(item.get("content"))):
                _add(spoken.reasoning, part.get("text"))
    status = value.get("status")
    if isinstance(status, str):
        spoken.finish = {"completed": "stop", "incomplete": "length"}.get(status, status)


def _response_event(value: JSONDict, answer: Answer) -> None:
    kind = value.get("type")
    if kind in ("response.completed", "response.incomplete", "response.failed"):
        response = _dict(value.get("response"))
        answer.model = _text(response.get("model")) or answer.model
        if _failed(response, answer):
            return
        answer.complete = True
        answer.choices = []  # the last event has everything, in order
        _response(response, answer)
        return
    if kind == "error":
        answer.error = _text(value.get("message")) or _text(_dict(value.get("error")).get("message")) or "an error"
        return
    spoken = answer.choice(0)
    if kind in ("response.output_text.delta", "response.refusal.delta"):
        _add(spoken.texts, value.get("delta"))
    elif kind in ("response.reasoning_text.delta", "response.reasoning_summary_text.delta"):
        _add(spoken.reasoning, value.get("delta"))
    elif kind == "response.output_item.added":
        item = _dict(value.get("item"))
        if item.get("type") == "function_call":
            known = spoken.call(_number(value.get("output_index"), len(spoken.calls)))
            known["id"], known["name"] = _text(item.get("call_id") or item.get("id")), _text(item.get("name"))
    elif kind == "response.function_call_arguments.delta":
        spoken.call(_number(value.get("output_index"), 0))["arguments"] += _text(value.get("delta"))
    elif not isinstance(kind, str):
        _failed(value, answer)


# ---- messages


def _message(value: JSONDict, answer: Answer) -> None:
    spoken = answer.choice(0)
    spoken.finish = _text(value.get("stop_reason")) or None
    for place, block in enumerate(_dicts(value.get("content"))):
        _block(block, place, spoken)


def _block(block: JSONDict, place: int, spoken: Spoken) -> None:
    kind = block.get("type")
    if kind == "text":
        _add(spoken.texts, block.get("text"))
    elif kind == "thinking":
        _add(spoken.reasoning, block.get("thinking"))
    elif kind == "tool_use":
        known = spoken.call(place)
        known["id"], known["name"] = _text(block.get("id")), _text(block.get("name"))
        given = block.get("input")
        known["arguments"] = json.dumps(given, ensure_ascii=False) if given else ""


def _message_event(value: JSONDict, answer: Answer) -> None:
    kind = value.get("type")
    spoken = answer.choice(0)
    place = _number(value.get("index"), 0)
    if kind == "message_start":
        answer.model = _text(_dict(value.get("message")).get("model"))
    elif kind == "content_block_start":
        _block(_dict(value.get("content_block")), place, spoken)
    elif kind == "content_block_delta":
        delta = _dict(value.get("delta"))
        _add(spoken.texts, delta.get("text"))
        _add(spoken.reasoning, delta.get("thinking"))
        if isinstance(delta.get("partial_json"), str):
            spoken.call(place)["arguments"] += delta["partial_json"]
    elif kind == "message_delta":
        spoken.finish = _text(_dict(value.get("delta")).get("stop_reason")) or spoken.finish
    elif kind == "message_stop":
        answer.complete = True
    else:
        _failed(value, answer)


# ---- what an engine may send instead of what it should


def _dict(value: Any) -> JSONDict:
    return cast("JSONDict", value) if isinstance(value, dict) else {}


def _dicts(value: Any) -> list[JSONDict]:
    items = cast("list[Any]", value) if isinstance(value, list) else []
    return [cast("JSONDict", item) for item in items if isinstance(item, dict)]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _number(value: Any, otherwise: int) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else otherwise


def _add(parts: list[str], text: Any) -> None:
    if isinstance(text, str) and text:
        parts.append(text)

"""What the fake engine says: the words of a reply, and its shape on each route, whole or as server-sent events."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any, cast

from agentopt.serving._types import CHAT, COMPLETIONS, MESSAGES, RESPONSES

CREATED = 1_700_000_000
"""All replies carry this time: they are the same in every run."""


def compact(value: Any) -> bytes:
    """JSON without spaces."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def event(value: Any, name: str | None = None) -> bytes:
    """One server-sent event."""
    head = f"event: {name}\n".encode() if name else b""
    return head + b"data: " + compact(value) + b"\n\n"


def said(content: Any) -> str:
    """Text of a message's content: a string, or the text parts of a list."""
    if isinstance(content, str):
        return content
    parts = cast("list[Any]", content) if isinstance(content, list) else []
    return "".join(str(cast("dict[str, Any]", part).get("text", "")) for part in parts if isinstance(part, dict))


def turns(route: str, body: dict[str, Any]) -> list[str]:
    """Everything that was said to the model, in order; the last is what the reply repeats."""
    if route == COMPLETIONS:
        prompt: Any = body.get("prompt", "")
        return [said(prompt) if isinstance(prompt, str) else " ".join(map(str, cast("list[Any]", prompt)))]
    given: Any = body.get("input" if route == RESPONSES else "messages", [])
    if isinstance(given, str):
        return [given]
    messages = [cast("dict[str, Any]", one) for one in cast("list[Any]", given) if isinstance(one, dict)]
    system = [said(body[name]) for name in ("system", "instructions") if body.get(name)]
    return system + [said(message.get("content")) for message in messages]


@dataclass(slots=True)
class Shape:
    """One reply on one route: `opening`, a `piece` for each word, `closing`; or everything at once, `whole`."""

    route: str
    model: str
    id: str
    prompt_tokens: int
    include_usage: bool = False
    tool: dict[str, Any] | None = None
    finish: str = "stop"
    _head: bytes = field(default=b"", repr=False)

    def usage(self, words: int) -> dict[str, int]:
        """Tokens: one per word."""
        if self.route in (RESPONSES, MESSAGES):
            total = {"total_tokens": self.prompt_tokens + words} if self.route == RESPONSES else {}
            return {"input_tokens": self.prompt_tokens, "output_tokens": words} | total
        total = self.prompt_tokens + words
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": words, "total_tokens": total}

    def _frame(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self.route == CHAT else "text_completion"
        return {"id": self.id, "object": kind, "created": CREATED, "model": self.model, "choices": choices} | more

    def opening(self) -> bytes:
        """What comes before the first word."""
        if self.route == CHAT:
            delta: dict[str, Any] = {"role": "assistant", "content": ""}
            return event(self._frame([{"index": 0, "delta": delta, "finish_reason": None}]))
        if self.route == RESPONSES:
            started: dict[str, Any] = {
                "id": self.id,
                "object": "response",
                "status": "in_progress",
                "model": self.model,
                "output": [],
            }
            return event({"type": "response.created", "response": started}, "response.created")
        if self.route == MESSAGES:
            message: dict[str, Any] = {"id": self.id, "type": "message", "role": "assistant", "model": self.model}
            message["content"] = []
            usage = {"usage": {"input_tokens": self.prompt_tokens, "output_tokens": 0}}
            block = {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}
            first = event({"type": "message_start", "message": message | usage}, "message_start")
            return first + event(block, "content_block_start")
        return b""

    def piece(self, word: str) -> bytes:
        """One word."""
        if self.route == CHAT:
            return self._spoken(word)
        if self.route == RESPONSES:
            name = "response.output_text.delta"
            return event({"type": name, "output_index": 0, "delta": word}, name)
        if self.route == MESSAGES:
            delta = {"type": "text_delta", "text": word}
            return event({"type": "content_block_delta", "index": 0, "delta": delta}, "content_block_delta")
        return event(self._frame([{"index": 0, "text": word, "finish_reason": None}]))

    def _spoken(self, word: str) -> bytes:
        """A chat's word, without making the same JSON again: the load test asks for thousands a second."""
        if not self._head:
            self._head = b"data: " + compact(self._frame([]))[: -len(b"[]}")]
        delta = b'[{"index":0,"delta":{"content":%b},"finish_reason":null}]}' % compact(word)
        return b"%b%b\n\n" % (self._head, delta)

    def closing(self, words: int, text: str) -> list[bytes]:
        """What comes after the last word; the end mark `data: [DONE]` last where the route has one."""
        if self.route == RESPONSES:
            return [
                event({"type": "response.completed", "response": self._response(words, text)}, "response.completed")
            ]
        if self.route == MESSAGES:
            reason = "max_tokens" if self.finish == "length" else "end_turn"
            usage = {"output_tokens": words}
            return [
                event({"type": "content_block_stop", "index": 0}, "content_block_stop"),
                event({"type": "message_delta", "delta": {"stop_reason": reason}, "usage": usage}, "message_delta"),
                event({"type": "message_stop"}, "message_stop"),
            ]
        last: dict[str, Any] = {"delta": {}} if self.route == CHAT else {"text": ""}
        events = list(self._tool_events()) if self.tool else []
        events.append(event(self._frame([{"index": 0, **last, "finish_reason": self._reason()}])))
        if self.include_usage:
            events.append(event(self._frame([], usage=self.usage(words))))
        return [*events, b"data: [DONE]\n\n"]

    def _reason(self) -> str:
        return "tool_calls" if self.tool else self.finish

    def _call(self) -> dict[str, Any]:
        assert self.tool is not None
        return {"id": "call_" + self.id[-8:], "type": "function", "function": self.tool}

    def _tool_events(self) -> list[bytes]:
        """The call's name, then its arguments in two halves, as engines stream them."""
        call = self._call()
        arguments = str(call["function"].get("arguments", ""))
        half = len(arguments) // 2
        first = call | {"index": 0, "function": call["function"] | {"arguments": ""}}
        halves = [{"index": 0, "function": {"arguments": part}} for part in (arguments[:half], arguments[half:])]
        deltas = [{"tool_calls": [one]} for one in (first, *halves)]
        return [event(self._frame([{"index": 0, "delta": delta, "finish_reason": None}])) for delta in deltas]

    def _response(self, words: int, text: str) -> dict[str, Any]:
        content = [{"type": "output_text", "text": text, "annotations": list[Any]()}]
        output = [{"type": "message", "id": "msg_0", "status": "completed", "role": "assistant", "content": content}]
        base = {"id": self.id, "object": "response", "created_at": CREATED, "status": "completed", "model": self.model}
        return base | {"output": output, "usage": self.usage(words)}

    def whole(self, words: int, text: str) -> dict[str, Any]:
        """The reply in one piece."""
        if self.route == RESPONSES:
            return self._response(words, text)
        if self.route == MESSAGES:
            reason = "max_tokens" if self.finish == "length" else "end_turn"
            message = {"id": self.id, "type": "message", "role": "assistant", "model": self.model}
            return message | {
                "content": [{"type": "text", "text": text}],
                "stop_reason": reason,
                "usage": self.usage(words),
            }
        choice: dict[str, Any] = {"index": 0, "finish_reason": self._reason()}
        if self.route == CHAT:
            message: dict[str, Any] = {"role": "assistant", "content": text}
            choice["message"] = message | ({"tool_calls": [self._call()]} if self.tool else {})
        else:
            choice["text"] = text
        kind = "chat.completion" if self.route == CHAT else "text_completion"
        return self._frame([choice], usage=self.usage(words)) | {"object": kind}


def embeddings(body: dict[str, Any], model: str) -> dict[str, Any]:
    """Eight numbers for each text, a function of the text alone."""
    given: Any = body.get("input", "")
    texts = cast("list[Any]", given) if isinstance(given, list) else [given]
    data = [
        {"object": "embedding", "index": place, "embedding": _vector(str(text))} for place, text in enumerate(texts)
    ]
    tokens = sum(len(str(text).split()) for text in texts)
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "model": model, "data": data, "usage": usage}


def _vector(text: str) -> list[float]:
    return [round(byte / 127.5 - 1, 6) for byte in hashlib.sha256(text.encode()).digest()[:8]]

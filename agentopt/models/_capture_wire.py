"""Between the OpenAI wire form, server side, and `LM` calls: bodies to requests, replies and errors to JSON."""

from __future__ import annotations

import json
import secrets
import time
from dataclasses import dataclass
from typing import Any, cast

from agentopt.errors import UserError
from agentopt.graph import Usage
from agentopt.models._errors import (
    BudgetExhausted,
    LMError,
    LMRateLimit,
    LMRefused,
    LMTimeout,
    UnknownModel,
)
from agentopt.models._protocol import LMOptions, Message, Reply

_TIMEOUT = 300.0
_KNOWN = frozenset(
    {
        *("model", "messages", "prompt", "n", "stream", "stream_options", "tools", "guided_choice"),
        *("temperature", "max_tokens", "max_completion_tokens", "seed", "stop", "top_p"),
        *("user", "store", "metadata"),  # bookkeeping of the caller: it must not split the cache
    }
)


class BadBody(UserError):
    """A request body that is no chat completion request."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What a client asked for, ready for `LM.complete`."""

    model: str
    messages: list[Message]
    tools: tuple[dict[str, Any], ...]
    choices: tuple[str, ...] | None
    options: LMOptions
    samples: int
    stream: bool
    stream_usage: bool


def read_chat(body: Any) -> Asked:
    """Read a /chat/completions body.

    A left-out temperature is 1.0, as the OpenAI API has it. Fields without a name of their own here
    (response_format, tool_choice, reasoning_effort ...) go upstream unchanged; `guided_choice` becomes `choices=`.

    Raises:
        BadBody: fields are missing or of another type.
    """
    if not isinstance(body, dict):
        raise BadBody(f"expected a JSON object, found {type(body).__name__}")
    data = cast("dict[str, Any]", body)
    messages: Any = data.get("messages")
    if not isinstance(messages, list) or not messages:
        raise BadBody('"messages" must be a non-empty list')
    turns = cast("list[Message]", messages)
    for index, turn in enumerate(turns):
        if not isinstance(cast("Any", turn), dict) or not isinstance(turn.get("role"), str):
            raise BadBody(f"messages[{index}] must be an object with a role")
    return Asked(
        model=str(data.get("model") or ""),
        messages=turns,
        tools=tuple(data.get("tools") or ()),
        choices=tuple(data["guided_choice"]) if data.get("guided_choice") else None,
        options=_options(data),
        samples=_number(data, "n", 1, int),
        stream=bool(data.get("stream")),
        stream_usage=bool(cast("dict[str, Any]", data.get("stream_options") or {}).get("include_usage")),
    )


def read_completion(body: Any) -> list[Asked]:
    """Read a legacy /completions body: each prompt is sent as one user turn.

    Raises:
        BadBody: the prompt is no text or list of texts.
    """
    data = cast("dict[str, Any]", body) if isinstance(body, dict) else {}
    prompt: Any = data.get("prompt")
    prompts = cast("list[Any]", [prompt] if isinstance(prompt, str) else prompt)
    if not isinstance(cast("Any", prompts), list) or not prompts or not all(isinstance(item, str) for item in prompts):
        raise BadBody('"prompt" must be a text or a list of texts (token ids are not supported)')
    return [read_chat({**data, "messages": [{"role": "user", "content": item}]}) for item in prompts]


def _options(data: dict[str, Any]) -> LMOptions:
    stop: Any = data.get("stop") or ()
    limit = data.get("max_completion_tokens") or data.get("max_tokens")
    top_p = data.get("top_p")
    return LMOptions(
        temperature=_number(data, "temperature", 1.0, float),
        max_tokens=int(limit) if limit else LMOptions().max_tokens,
        seed=data.get("seed"),
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        top_p=None if top_p is None or top_p == 1 else float(top_p),
        timeout=_TIMEOUT,
        extra={name: value for name, value in data.items() if name not in _KNOWN and value is not None},
    )


def _number(data: dict[str, Any], name: str, default: Any, kind: type) -> Any:
    value = data.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise BadBody(f'"{name}" must be a number, found {value!r:.40}')
    return kind(value)


def chat_object(asked: Asked, replies: list[Reply]) -> dict[str, Any]:
    """The chat.completion object."""
    choices = [
        {"index": i, "message": _message(reply), "finish_reason": reply.finish_reason, "logprobs": None}
        for i, reply in enumerate(replies)
    ]
    return {**_head("chat.completion", asked, replies[0]), "choices": choices, "usage": _usage(replies)}


def completion_object(asked: Asked, replies: list[Reply]) -> dict[str, Any]:
    """The text_completion object."""
    choices = [
        {"index": i, "text": reply.text, "finish_reason": reply.finish_reason, "logprobs": None}
        for i, reply in enumerate(replies)
    ]
    return {**_head("text_completion", asked, replies[0]), "choices": choices, "usage": _usage(replies)}


class Chunks:
    """The events of one streamed chat completion, as server-sent-event lines."""

    def __init__(self, asked: Asked) -> None:
        self._asked = asked
        self._head = _head("chat.completion.chunk", asked, None)

    def piece(self, text: str) -> str:
        """A piece of text."""
        return self._event({"role": "assistant", "content": text}, None)

    def whole(self, reply: Reply) -> str:
        """A reply that comes at once (tool calls, for one)."""
        message = _message(reply)
        for index, call in enumerate(message.get("tool_calls") or ()):
            call["index"] = index
        return self._event(message, None)

    def end(self, reply: Reply | None) -> str:
        """Finish reason, usage if the client asked for it, and the end mark."""
        text = self._event({}, reply.finish_reason if reply else "stop")
        if self._asked.stream_usage:
            text += _sse({**self._head, "choices": [], "usage": _usage([reply] if reply else [])})
        return text + "data: [DONE]\n\n"

    def _event(self, delta: dict[str, Any], finish: str | None) -> str:
        return _sse(
            {**self._head, "choices": [{"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}]}
        )


def error_event(error: Exception) -> str:
    """An error after the stream has begun: the client library raises it."""
    return _sse(error_object(error)[1])


def error_object(error: Exception) -> tuple[int, dict[str, Any]]:
    """HTTP status and OpenAI error JSON for an exception."""
    status, kind = _status(error)
    return status, {"error": {"message": str(error), "type": kind, "param": None, "code": type(error).__name__}}


def _status(error: Exception) -> tuple[int, str]:
    fixed: tuple[tuple[type[Exception], int, str], ...] = (
        (BudgetExhausted, 402, "insufficient_quota"),
        (UnknownModel, 404, "invalid_request_error"),
        (UserError, 400, "invalid_request_error"),
        (LMRateLimit, 429, "rate_limit_error"),
        (LMTimeout, 504, "timeout_error"),
    )
    for kind, status, name in fixed:
        if isinstance(error, kind):
            return status, name
    if isinstance(error, LMRefused):
        return error.status or 400, "invalid_request_error"
    return (error.status or 502 if isinstance(error, LMError) else 500), "api_error"


def _message(reply: Reply) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": reply.text or (None if reply.tool_calls else "")}
    if reply.tool_calls:
        message["tool_calls"] = [
            {
                "id": call.id or f"call_{index}",
                "type": "function",
                "function": {
                    "name": call.name,
                    "arguments": call.raw or json.dumps(call.arguments, ensure_ascii=False),
                },
            }
            for index, call in enumerate(reply.tool_calls)
        ]
    return message


def _head(kind: str, asked: Asked, reply: Reply | None) -> dict[str, Any]:
    model = (reply.model if reply else "") or asked.model
    return {"id": f"chatcmpl-{secrets.token_hex(12)}", "object": kind, "created": int(time.time()), "model": model}


def _usage(replies: list[Reply]) -> dict[str, int]:
    """What the answers took; for cached ones what the original call took, so that the client's own sums stay true."""
    used = sum((reply.saved_usage if reply.cached and reply.saved_usage else reply.usage for reply in replies), Usage())
    return {
        "prompt_tokens": used.input_tokens,
        "completion_tokens": used.output_tokens,
        "total_tokens": used.total_tokens,
    }


def _sse(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"

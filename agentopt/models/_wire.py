"""The OpenAI chat-completions wire form, both ways: request bodies, replies, streamed chunks, HTTP errors.

Shared by the direct client and the litellm client (which speaks the same form for every provider).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from email.utils import parsedate_to_datetime
from typing import Any, cast

from agentopt.graph import Usage
from agentopt.models._errors import LMError, LMRateLimit, LMRefused, LMTimeout, LMUnavailable
from agentopt.models._knowledge import adapter_name
from agentopt.models._protocol import Reply, Request, ToolCall

_SHOWN = 300  # characters of a server's answer that an error message quotes


def request_body(request: Request, model: str, *, prefixed: bool = False) -> dict[str, Any]:
    """The JSON body; options that equal the provider's own default are left out.

    An adapter is asked for by its name in place of the model's, as vLLM's multi-LoRA serving has it. A `prefixed` model
    ("hosted_vllm/...") keeps the provider.
    """
    options = request.options
    if request.adapter is not None:
        provider, slash, _ = model.partition("/") if prefixed else ("", "", "")
        model = f"{provider}{slash}{adapter_name(request.adapter)}"
    body: dict[str, Any] = {
        "model": model,
        "messages": list(request.messages),
        "temperature": options.temperature,
        "max_tokens": options.max_tokens,
    }
    if options.seed is not None:
        body["seed"] = options.seed
    if options.stop:
        body["stop"] = list(options.stop)
    if options.top_p is not None:
        body["top_p"] = options.top_p
    if request.tools:
        body["tools"] = list(request.tools)
    if request.schema is not None:
        body["response_format"] = {"type": "json_schema", "json_schema": {"name": "output", "schema": request.schema}}
    body.update(options.extra)
    return body


def choices_schema(choices: Iterable[str]) -> dict[str, Any]:
    """A response_format under which a server can only answer with one of `choices`."""
    schema = {
        "type": "object",
        "properties": {"answer": {"type": "string", "enum": list(choices)}},
        "required": ["answer"],
        "additionalProperties": False,
    }
    return {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": schema}}


def read_completion(data: Any, request: Request) -> Reply:
    """A reply from a chat completion object; raises LMUnavailable (retryable) when it is none."""
    try:
        choice = data["choices"][0]
        message = choice["message"]
        text = message.get("content") or ""
        calls = tuple(_tool_call(call) for call in message.get("tool_calls") or ())
        usage = read_usage(data.get("usage"))
        reason = choice.get("finish_reason") or "stop"
        logprobs = _choice_logprobs(choice.get("logprobs"), request.choices)
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise LMUnavailable(
            f"{request.model} answered something that is no chat completion: {str(data)[:_SHOWN]!r}", retryable=True
        ) from error
    if not isinstance(text, str):
        text = "".join(part.get("text", "") for part in cast("list[dict[str, Any]]", text))
    return Reply(
        text=text,
        tool_calls=calls,
        usage=usage,
        finish_reason=str(reason),
        logprobs=logprobs,
        model=str(data.get("model") or request.model),
    )


def read_usage(data: Any) -> Usage:
    """Token counts; a server that gives none yields zeros (one call, one try)."""
    usage = cast("dict[str, Any]", data or {})
    details = cast("dict[str, Any]", usage.get("prompt_tokens_details") or {})
    return Usage(
        input_tokens=int(usage.get("prompt_tokens") or 0),
        output_tokens=int(usage.get("completion_tokens") or 0),
        cached_tokens=int(details.get("cached_tokens") or 0),
        calls=1,
        tries=1,
    )


def _tool_call(call: Mapping[str, Any]) -> ToolCall:
    function = call["function"]
    raw = function.get("arguments") or "{}"
    try:
        arguments = json.loads(raw) if isinstance(raw, str) else raw
    except ValueError:
        arguments = None
    name, identity = str(function["name"]), str(call.get("id") or "")
    if isinstance(arguments, dict):
        return ToolCall(identity, name, cast("dict[str, Any]", arguments))
    return ToolCall(identity, name, {}, raw=str(raw))


def _choice_logprobs(data: Any, choices: tuple[str, ...] | None) -> dict[str, float] | None:
    """Choice → logprob from the first token's alternatives, when each choice begins with a token of its own.

    Good for labels that differ in their first token; a choice that is not among the alternatives is left out.
    """
    if choices is None or not data or not data.get("content"):
        return None
    found: dict[str, float] = {}
    for item in data["content"][0].get("top_logprobs") or ():
        token = str(item["token"]).strip()
        begun = [choice for choice in choices if token and choice.casefold().startswith(token.casefold())]
        if len(begun) == 1:
            known = found.get(begun[0])
            value = float(item["logprob"])
            found[begun[0]] = value if known is None else math.log(math.exp(known) + math.exp(value))
    return found or None


class StreamReader:
    """Turns streamed chunks into text pieces and, at the end, a `Reply` with usage and finish reason."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._text: list[str] = []
        self._usage: Any = None
        self._reason = "stop"
        self._model = request.model

    def piece(self, chunk: Mapping[str, Any]) -> str:
        """The text of one chunk; empty for chunks that carry none."""
        if chunk.get("error"):
            raise LMUnavailable(f"{self._request.model} broke off: {str(chunk['error'])[:_SHOWN]}", retryable=True)
        self._usage = chunk.get("usage") or self._usage
        self._model = chunk.get("model") or self._model
        for choice in chunk.get("choices") or ():
            self._reason = choice.get("finish_reason") or self._reason
            text = cast("dict[str, Any]", choice.get("delta") or {}).get("content")
            if text:
                self._text.append(text)
                return str(text)
        return ""

    def reply(self) -> Reply:
        """What the whole stream said."""
        return Reply(
            "".join(self._text), usage=read_usage(self._usage), finish_reason=self._reason, model=str(self._model)
        )


def http_error(name: str, status: int, headers: Mapping[str, str], body: bytes | str) -> LMError:
    """The error for an HTTP status other than 200."""
    text = body.decode("utf-8", "replace") if isinstance(body, bytes) else body
    detail = _detail(text)
    retry_after = read_retry_after(headers)
    if status == 429 and "insufficient_quota" not in text:
        return LMRateLimit(
            f"{name} says too many requests (429): {detail}", status=status, retryable=True, retry_after=retry_after
        )
    if status in (408, 504):
        return LMTimeout(
            f"{name} timed out ({status}): {detail}", status=status, retryable=True, retry_after=retry_after
        )
    if status >= 500:
        return LMUnavailable(
            f"{name} failed ({status}): {detail}", status=status, retryable=True, retry_after=retry_after
        )
    hints = {
        401: "; check the API key",
        403: "; check the API key and what it may use",
        404: "; check the model name and the address",
    }
    return LMRefused(f"{name} refused the request ({status}): {detail}{hints.get(status, '')}", status=status)


def _detail(text: str) -> str:
    try:
        error: Any = json.loads(text).get("error")
        message: Any = cast("dict[str, Any]", error).get("message") if isinstance(error, dict) else error
        if message:
            return str(message)[:_SHOWN]
    except (ValueError, AttributeError):
        pass
    return re.sub(r"\s+", " ", text)[:_SHOWN] or "no details"


def read_retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds from `retry-after-ms` or `Retry-After` (seconds or an HTTP date); None when absent or unreadable."""
    for name, scale in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        value = headers.get(name)
        if not value:
            continue
        try:
            seconds = float(value) * scale
        except ValueError:
            seconds = _until(value)
        if seconds is not None and math.isfinite(seconds):
            return max(0.0, seconds)
    return None


def _until(date: str) -> float | None:
    import time

    try:
        return parsedate_to_datetime(date).timestamp() - time.time()
    except ValueError:
        return None

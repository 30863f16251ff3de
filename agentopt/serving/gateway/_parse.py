"""Reading what a client sent: a JSON body, strictly, and a few headers. Whatever is odd is refused with a sentence.

Two parsers that read one body differently are a hole (the gateway checks a model's name, the engine serves another), so
what JSON leaves open is refused: duplicate keys, NaN, numbers beyond double precision, lone surrogates, not UTF-8.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, cast

from agentopt.serving._types import CHAT, COMPLETIONS, COUNT, EMBEDDINGS, MESSAGES, RESPONSES, Refusal

_NAME = re.compile(r"[A-Za-z0-9._-]{1,128}\Z")
_SECRET = re.compile(r"ak-[A-Za-z0-9_-]{16,}")
_TRACEPARENT = re.compile(r"00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}\Z")
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_ONCE = frozenset({"authorization", "x-api-key", "content-type", "host", "content-length", "x-agentopt-session"})
_MODEL_LENGTH = 256
_LONG = 256 << 10
_CONTAINERS = 250_000  # 8 MiB of "[]," would become 170 MB of lists


def bad(message: str, param: str | None = None, code: str | None = None) -> Refusal:
    """The client's mistake: 400."""
    return Refusal(400, message, param=param, code=code)


def headers_of(fields: Iterable[tuple[bytes, bytes]]) -> dict[str, str]:
    """Headers by lower-case name; of repeated ones the first.

    Raises:
        Refusal: One that decides who asks for what came twice.
    """
    found: dict[str, str] = {}
    for raw_name, raw_value in fields:
        name = raw_name.decode("latin-1").lower()
        if name not in found:
            found[name] = raw_value.decode("latin-1").strip()
        elif name in _ONCE:
            raise bad(f"the header {name} came more than once", code="duplicate_header")
    return found


def label(value: str | None) -> str | None:
    """A client's own request id, fit for a log: anything else, and anything like a key, is dropped."""
    return value if value is not None and _NAME.match(value) and not _SECRET.search(value) else None


def session_of(value: str | None) -> str | None:
    """The session's name.

    Raises:
        Refusal: It is not a name.
    """
    if value is None:
        return None
    if not _NAME.match(value) or _SECRET.search(value):
        raise bad("X-Agentopt-Session must be 1 to 128 of A-Z a-z 0-9 . _ -", code="invalid_session")
    return value


def traceparent_of(value: str | None) -> str | None:
    """A well-formed W3C trace context, else None."""
    return value if value is not None and _TRACEPARENT.match(value) else None


def json_type(headers: Mapping[str, str]) -> None:
    """Only application/json, not compressed: what a web page can post without asking first is refused.

    Raises:
        Refusal: 415.
    """
    encoding = headers.get("content-encoding", "identity")
    if encoding.lower() != "identity":
        raise Refusal(415, "bodies are not decompressed: leave Content-Encoding out", code="unsupported_media_type")
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        found = f"not {kind[:80]!r}" if kind else "and it is missing"
        raise Refusal(415, f"the header Content-Type must be application/json, {found}", code="unsupported_media_type")


async def read_body(raw: bytes, *, nesting: int) -> dict[str, Any]:
    """`parse_body`; a long body in a thread, so that other streams go on meanwhile.

    Raises:
        Refusal: 400, with what is wrong.
    """
    if len(raw) <= _LONG:
        return parse_body(raw, nesting=nesting)
    return await asyncio.to_thread(parse_body, raw, nesting=nesting)


def parse_body(raw: bytes, *, nesting: int) -> dict[str, Any]:
    """The JSON object in `raw`.

    Raises:
        Refusal: 400, with what is wrong.
    """
    if raw.count(b"{") + raw.count(b"[") > _CONTAINERS:
        raise bad(f"the body holds more than {_CONTAINERS} brackets", code="invalid_json")
    try:
        text = raw.decode("utf-8")
        value: object = _DECODER.decode(text)
    except Refusal:
        raise
    except RecursionError as error:
        raise bad(f"the body is nested deeper than {nesting} levels", code="invalid_json") from error
    except UnicodeDecodeError as error:
        raise bad(f"the body is not UTF-8 (byte {error.start})", code="invalid_json") from error
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise bad(f"the body is not JSON: {error.msg} at {where}", code="invalid_json") from error
    except ValueError as error:  # an integer of thousands of digits
        raise bad("the body holds a number that is too long", code="invalid_json") from error
    if not isinstance(value, dict):
        raise bad("the body must be a JSON object", code="invalid_json")
    body = cast("dict[str, Any]", value)
    if text.count("{") + text.count("[") > nesting:
        _check_depth(body, nesting)
    if _SURROGATE.search(text):
        _check_surrogates(body)
    return body


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()  # counting each name instead would let one long body hold up the server for hours
        for name, _ in pairs:
            if name in seen:
                raise bad(f"the body holds the key {name[:80]!r} twice in one object", code="invalid_json")
            seen.add(name)
    return found


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise bad("the body holds a number beyond double precision", code="invalid_json")
    return value


def _constant(name: str) -> float:
    raise bad(f"the body holds {name}, which is not JSON", code="invalid_json")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_float=_finite, parse_constant=_constant)


def _check_depth(value: dict[str, Any], nesting: int) -> None:
    level: list[object] = [value]
    for _ in range(nesting):
        below: list[object] = []
        for item in level:
            inner = cast("dict[str, object]", item).values() if isinstance(item, dict) else cast("list[object]", item)
            below += [found for found in inner if isinstance(found, dict | list)]
        if not below:
            return
        level = below
    raise bad(f"the body is nested deeper than {nesting} levels", code="invalid_json")


def _check_surrogates(value: dict[str, Any]) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise bad("the body holds half of a surrogate pair (\\ud800 to \\udfff)", code="invalid_json") from error


def model_of(body: dict[str, Any]) -> str:
    """The model's name in a body, "" where there is none.

    Raises:
        Refusal: 400.
    """
    model = body.get("model")
    if model is None:
        return ""
    if not isinstance(model, str) or len(model) > _MODEL_LENGTH:
        raise bad(f"'model' must be a name of at most {_MODEL_LENGTH} characters", "model")
    return model


def stream_of(route: str, body: dict[str, Any]) -> bool:
    """Whether the reply is to be streamed.

    Raises:
        Refusal: 400.
    """
    stream = body.get("stream")
    if stream is not None and not isinstance(stream, bool):
        raise bad("'stream' must be true or false", "stream")
    if stream and route in (EMBEDDINGS, COUNT):
        raise bad("this route does not stream: leave 'stream' out", "stream")
    options = body.get("stream_options")
    if options is not None and not isinstance(options, dict):
        raise bad("'stream_options' must be an object", "stream_options")
    if options is not None and not stream:
        raise bad("'stream_options' needs 'stream': true", "stream_options")
    return bool(stream)


_NEEDED = {
    CHAT: ("messages", list),
    MESSAGES: ("messages", list),
    COUNT: ("messages", list),
    COMPLETIONS: ("prompt", (str, list)),
    EMBEDDINGS: ("input", (str, list)),
    RESPONSES: ("input", (str, list)),
}
_INSTEAD = {
    COMPLETIONS: ("prompt_embeds",),
    EMBEDDINGS: ("messages",),
    RESPONSES: ("prompt", "previous_response_id", "conversation"),
}
_COUNTS = ("max_tokens", "max_completion_tokens", "max_output_tokens", "n", "best_of", "top_k", "logprobs")


def check_shape(route: str, body: dict[str, Any]) -> None:
    """The few fields that every engine needs, and the types on which engines differ between 400 and 500.

    Raises:
        Refusal: 400.
    """
    name, kind = _NEEDED[route]
    value = body.get(name)
    if value is None and any(other in body for other in _INSTEAD.get(route, ())):
        pass
    elif not isinstance(value, kind):
        wanted = "a list" if kind is list else "a text or a list"
        raise bad(f"'{name}' must be {wanted}" + ("" if name in body else ", and it is missing"), name)
    elif name == "messages":
        _check_messages(cast("list[object]", value))
    _check_numbers(body)
    if body.get("user") is not None and not isinstance(body["user"], str):
        raise bad("'user' must be a text", "user")


def _check_numbers(body: dict[str, Any]) -> None:
    for count in _COUNTS:
        given: object = body.get(count)
        flag = isinstance(given, bool) and count != "logprobs"  # which is true or false in chats
        if given is not None and (flag or not isinstance(given, int)) and not _whole(given):
            raise bad(f"'{count}' must be a whole number", count)
    for number in ("temperature", "top_p"):
        given = body.get(number)
        if given is not None and (isinstance(given, bool) or not isinstance(given, int | float)):
            raise bad(f"'{number}' must be a number", number)


def _whole(value: object) -> bool:
    return isinstance(value, float) and value.is_integer()


def _check_messages(messages: list[object]) -> None:
    if not messages:
        raise bad("'messages' must hold at least one message", "messages")
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(cast("dict[str, object]", message).get("role"), str):
            raise bad(f"'messages[{index}]' must be an object with a 'role'", f"messages[{index}]")

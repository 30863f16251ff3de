"""The types every client and every caller of a language model share: options, request, reply, client.

The unit is one request, one reply. A `Request` is a value: equal requests have equal keys, and the key is what the
cache, single-flight and recordings use. A `Client` turns a request into a reply by one try; it knows nothing about
caching, retries, throttling, prices, recording or handles: those belong to `LM`, which wraps it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from agentopt.graph import Usage

Message = dict[str, Any]
"""One chat message in OpenAI form: `role`, `content` (text or a list of parts), and for tools `tool_calls` /
`tool_call_id`."""

_KEY_VERSION = 1


@dataclass(frozen=True, slots=True)
class LMOptions:
    """How to sample. `timeout` is in seconds for one try and does not take part in the cache key."""

    temperature: float = 0.0
    max_tokens: int = 512
    """Upper bound of generated tokens."""
    seed: int | None = None
    """Sent to the provider. None with temperature > 0 inside a rollout: drawn from the rollout's scope."""
    stop: tuple[str, ...] = ()
    top_p: float | None = None
    timeout: float = 60.0
    sample: int = 0
    """Which sample of several from the same request: part of the cache key, so samples never collapse into one."""
    extra: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Provider options passed through unchanged (JSON values); part of the cache key."""

    def to_dict(self) -> dict[str, Any]:
        """The options that decide the reply, defaults included; `timeout` is left out."""
        return {
            "temperature": float(self.temperature),  # 0 and 0.0 are one request
            "max_tokens": self.max_tokens,
            "seed": self.seed,
            "stop": list(self.stop),
            "top_p": None if self.top_p is None else float(self.top_p),
            "sample": self.sample,
            "extra": dict(self.extra),
        }


@dataclass(frozen=True, slots=True)
class Request:
    """One call, resolved: no handles, no pydantic classes, only JSON values."""

    model: str
    """The client's name: provider, endpoint and model, so that two servers never share cache rows."""
    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()
    """OpenAI function-tool objects: `{"type": "function", "function": {"name", "description", "parameters"}}`."""
    schema: dict[str, Any] | None = None
    """JSON schema that the reply's text must satisfy."""
    choices: tuple[str, ...] | None = None
    """The reply's text must be exactly one of these."""
    options: LMOptions = LMOptions()
    adapter: str | None = None
    """The adapter that a folded knowledge is in: its folder, or the name that a server knows it by."""
    adapter_version: str = ""
    """Hash of what the adapter's folder says of itself; "" where it is not here. Part of the cache key."""
    _key: list[str] = field(default_factory=list[str], init=False, repr=False, compare=False)

    def key(self) -> str:
        """Hex sha256 of the canonical JSON of everything that decides the reply (sample and seed included)."""
        if not self._key:
            text = json.dumps([_KEY_VERSION, self.to_dict()], sort_keys=True, separators=(",", ":"), allow_nan=False)
            self._key.append(hashlib.sha256(text.encode("ascii")).hexdigest())
        return self._key[0]

    def to_dict(self) -> dict[str, Any]:
        """A JSON value; what the cache stores beside the reply so that it can be inspected."""
        data: dict[str, Any] = {
            "model": self.model,
            "messages": list(self.messages),
            "tools": list(self.tools),
            "schema": self.schema,
            "choices": None if self.choices is None else list(self.choices),
            "options": self.options.to_dict(),
        }
        if self.adapter is not None:
            data["adapter"] = self.adapter
        return data | {"adapter_version": self.adapter_version} if self.adapter_version else data


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One tool the model wants called. `arguments` is decoded JSON; `raw` keeps text that was no JSON object."""

    id: str
    name: str
    arguments: dict[str, Any]
    raw: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """A JSON value."""
        return {"id": self.id, "name": self.name, "arguments": self.arguments, "raw": self.raw}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ToolCall:
        """The inverse of `to_dict`."""
        return cls(id=data["id"], name=data["name"], arguments=dict(data["arguments"]), raw=data.get("raw"))


@dataclass(frozen=True, slots=True)
class Reply:
    """What a model answered and what it took.

    `usage` and `cost` are what THIS call spent: a cached reply spends nothing and keeps in `saved_usage` and
    `saved_cost` what the original call spent. `cost` is in USD; None means that no price is known (never taken as 0).
    """

    text: str
    parsed: Any = None
    """The value of `output=` (pydantic instance or JSON); not stored, it is parsed again from `text`."""
    tool_calls: tuple[ToolCall, ...] = ()
    usage: Usage = field(default_factory=Usage)
    cost: float | None = None
    finish_reason: str = "stop"
    """"stop", "length", "tool_calls" or "content_filter"."""
    logprobs: dict[str, float] | None = None
    """With `choices=`, and where the client can tell: choice → natural-log probability."""
    model: str = ""
    """The model that answered, as the provider calls it."""
    cached: bool = False
    saved_usage: Usage | None = None
    saved_cost: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """A JSON value without `parsed`, `cached` and what was saved: the form that is stored."""
        return {
            "text": self.text,
            "tool_calls": [call.to_dict() for call in self.tool_calls],
            "usage": self.usage.to_dict(),
            "cost": self.cost,
            "finish_reason": self.finish_reason,
            "logprobs": self.logprobs,
            "model": self.model,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Reply:
        """The inverse of `to_dict`; raises KeyError, TypeError or ValueError when `data` has another shape."""
        text, cost, logprobs = data["text"], data["cost"], data["logprobs"]
        if not isinstance(text, str):
            raise TypeError(f"text is {type(text).__name__}, expected str")
        return cls(
            text=text,
            tool_calls=tuple(ToolCall.from_dict(call) for call in data["tool_calls"]),
            usage=Usage.from_dict(data["usage"]),
            cost=None if cost is None else float(cost),
            finish_reason=data["finish_reason"],
            logprobs=None if logprobs is None else {str(k): float(v) for k, v in logprobs.items()},
            model=data["model"],
        )


@runtime_checkable
class Client(Protocol):
    """One way to reach one model. Safe to use from several event loops and threads at once.

    `send` makes exactly one try and raises `LMError` (with `retryable` and `retry_after` set) or returns a reply whose
    `usage` has `calls=1, tries=1` and the token counts it knows. It leaves `cost` None unless it knows better than the
    price table (an in-process model: 0.0).

    A client may also define `cacheable` (default True; False for doubles whose replies are code), `own_timeout`
    (default: `deterministic`; True when it obeys `options.timeout` itself, counting from when its queue is over) and
    `adapter_problem(adapter: str) -> str | None`: a clause that says why it cannot answer with that adapter.
    A client without it is never given a request with an adapter.
    """

    name: str
    """Identity for cache and throttle: provider, endpoint, model."""
    deterministic: bool
    """True when the reply is a pure function of the request (embedded model, doubles)."""

    async def send(self, request: Request) -> Reply:
        """One try."""
        ...

    def stream(self, request: Request) -> AsyncIterator[str | Reply]:
        """Text pieces as they come (an async generator); one try. A `Reply` may come last: usage, finish reason."""
        ...

    async def aclose(self) -> None:
        """Release connections or the engine; a later `send` opens them again."""
        ...


class ReplyCache(Protocol):
    """The part of the store that the cache needs; `put_reply` returns when the row is durable."""

    def get_reply(self, key: str) -> dict[str, Any] | None:
        """The stored reply, or None."""
        ...

    def put_reply(self, key: str, reply: dict[str, Any], *, model: str, request: dict[str, Any] | None) -> None:
        """Store a reply under its request's key."""
        ...


@runtime_checkable
class AsyncReplyCache(Protocol):
    """A `ReplyCache` that can also store without holding up the event loop (concurrent callers share one commit)."""

    async def aput_reply(self, key: str, reply: dict[str, Any], *, model: str, request: dict[str, Any] | None) -> None:
        """`put_reply` for coroutines."""
        ...

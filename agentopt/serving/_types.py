"""What the parts of the endpoint know of one another: an engine, a key, one exchange, and who is told of it.

The gateway stands between clients and one engine. For each request it makes an `Exchange`, asks the keyring whether the
key may, the catalog what the model's name means, forwards, and tells its observers (metrics, logs, capture).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

from agentopt.errors import AgentoptError

CHAT, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
RESPONSES, MESSAGES, COUNT = "/v1/responses", "/v1/messages", "/v1/messages/count_tokens"
FORWARDED = frozenset({CHAT, COMPLETIONS, EMBEDDINGS, RESPONSES, MESSAGES, COUNT})
"""All that is ever asked of an engine for a client: POST to one of these. Which of them, its `Abilities` say."""


class Refusal(AgentoptError):
    """A request that is answered with an error. The text is shown to the client: one sentence, nothing secret."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        """As OpenAI names them: invalid_request_error, authentication_error, permission_error, rate_limit_error,
        insufficient_quota, server_error."""
        self.code = code
        self.param = param
        self.retry_after = retry_after
        """Seconds; becomes the header Retry-After, rounded up."""

    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}


class Phase(StrEnum):
    """Where an engine is in its life."""

    STARTING = "starting"
    READY = "ready"
    RESTARTING = "restarting"
    FAILED = "failed"
    """It was started too often in vain: it is not tried again."""
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class Address:
    """Where an engine listens: a Unix socket where it can, otherwise host and port."""

    host: str = "127.0.0.1"
    port: int = 0
    socket: str | None = None
    """Path of a Unix socket; host and port are then only what the Host header says."""
    tls: bool = False
    prefix: str = ""
    """Path before /v1, for engines behind another address."""
    token: str | None = field(default=None, repr=False)
    """Sent as `Authorization: Bearer`; the client's own header never reaches the engine."""


@dataclass(frozen=True, slots=True)
class Listed:
    """A model in an engine's own list."""

    name: str
    parent: str | None = None
    """The model that it is an adapter of, or made from."""
    context: int | None = None
    """Longest prompt and reply together, tokens."""


@dataclass(frozen=True, slots=True)
class Abilities:
    """What an engine that is ready can do."""

    routes: frozenset[str] = frozenset({CHAT, COMPLETIONS})
    """Of `FORWARDED`."""
    model: str = "model"
    """The name by which the engine knows its base model; empty while an engine elsewhere has not said it."""
    others: tuple[Listed, ...] = ()
    """What an engine elsewhere serves beside that, each under its own name."""
    adapters: bool = False
    """LoRA adapters can be loaded while it runs."""
    stream_usage: bool = True
    """Obeys `stream_options.include_usage`."""
    context: int | None = None
    """Longest prompt and reply together, tokens."""


class Engine(Protocol):
    """The engine as the gateway sees it; `Supervisor` and `ExternalEngine` are the two kinds."""

    @property
    def name(self) -> str:
        """vllm, transformers, embedded, fake or external."""
        ...

    @property
    def phase(self) -> Phase:
        """Where it is in its life; requests are forwarded while it is READY."""
        ...

    @property
    def address(self) -> Address:
        """Where to reach it; may change when it is restarted."""
        ...

    @property
    def abilities(self) -> Abilities:
        """What it can do; what is known before it is ready may be less."""
        ...

    @property
    def generation(self) -> int:
        """Counts its starts: 1, 2, ... A reply that broke off belongs to an earlier one."""
        ...

    def suspect(self, why: str) -> None:
        """A request found it dead or silent: look at its health now instead of at the next interval."""
        ...


@dataclass(frozen=True, slots=True)
class Key:
    """An API key as it is known after its secret was checked; the secret itself is kept nowhere."""

    id: str
    """Shown in lists, logs and metrics: not secret."""
    name: str
    models: tuple[str, ...] = ("*",)
    """Globs of the model names it may ask."""
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    token_budget: int | None = None
    """Prompt plus completion tokens, in all; None: no bound."""
    concurrency: int | None = None
    """Requests at a time."""


class Keyring(Protocol):
    """Who may ask. All methods are quick: they are called on the event loop."""

    def find(self, secret: str) -> Key | None:
        """The key with this secret; None when there is none, or it was revoked or has expired."""
        ...

    def admit(self, key: Key) -> None:
        """Count one request against the key's limits; raises `Refusal` (429, 403) with what to do."""
        ...

    def release(self, key: Key, tokens: int) -> None:
        """The request is over and took so many tokens; called once for each `admit` that did not raise."""
        ...

    def watch(self, revoked: Callable[[str], None]) -> None:
        """`revoked` is called on the event loop with the id of a key that stops being valid while we run."""
        ...


@dataclass(slots=True)
class TokenUse:
    """Tokens of one exchange, as the engine counted them."""

    prompt: int = 0
    completion: int = 0
    cached: int = 0
    """Of the prompt, found in the engine's prefix cache."""

    @property
    def total(self) -> int:
        """Prompt plus completion."""
        return self.prompt + self.completion


@dataclass(slots=True, eq=False)
class Exchange:
    """One request and what became of it. The gateway fills it in as it learns; observers read."""

    id: str
    """`req_` and 32 hex digits; in the header X-Request-Id of the reply."""
    route: str
    """One of `FORWARDED`."""
    client: str
    """The peer's address."""
    key: Key | None = None
    body: dict[str, Any] = field(default_factory=dict[str, Any], repr=False)
    """As the client sent it. Never changed, never logged."""
    sent: dict[str, Any] = field(default_factory=dict[str, Any], repr=False)
    """As the engine gets it."""
    asked: str = ""
    """The model name that the client gave."""
    model: str = ""
    """The model name that the engine gets: its base or an adapter."""
    adapter: str | None = None
    variant: str | None = None
    """Which candidate answers a virtual model: its label (see `Choice`)."""
    session: str | None = None
    """Header X-Agentopt-Session: exchanges of one run of the client's agent."""
    capture: bool = True
    """False: the client asked by the header X-Agentopt-Capture that nothing of it is stored."""
    client_request_id: str | None = None
    """The client's own X-Request-Id, for logs only; None where it sent none that is fit for a log."""
    stream: bool = False
    started: float = field(default_factory=time.time)
    """Seconds since the epoch."""
    began: float = field(default_factory=time.monotonic)
    """For durations, as all times below."""
    first: float | None = None
    """When the first bytes of the reply's body came."""
    ended: float | None = None
    status: int = 0
    """What the client got; 499 when it went away first."""
    chunks: int = 0
    """Reads of the engine's body that were passed on."""
    bytes_in: int = 0
    bytes_out: int = 0
    use: TokenUse | None = None
    error: str | None = None
    """A code of ours: engine_died, engine_silent, timeout, client_gone, key_revoked, engine_error, or a Refusal's."""
    notes: dict[str, str] = field(default_factory=dict[str, str])
    """Headers for the reply, for example X-Agentopt-Variant."""


class Observer(Protocol):
    """Told of each exchange that reached the catalog. Must not block and must not raise."""

    def wants_reply(self, exchange: Exchange) -> bool:
        """Whether `ended` should get the reply's body. Asked once, before forwarding."""
        ...

    def ended(self, exchange: Exchange, reply: bytes | None) -> None:
        """It is over. `reply`: the body that the client was sent, None where not wanted or longer than the bound."""
        ...


@dataclass(frozen=True, slots=True)
class Choice:
    """What a model's name means for one request."""

    model: str
    """At the engine: the base's name, or the adapter's."""
    adapter: str | None = None
    variant: str | None = None
    """Label of the candidate, unique within the virtual model: "a", "b" or what the user called it."""
    rewrite: Callable[[str, dict[str, Any]], dict[str, Any]] | None = None
    """(route, body) -> the body for the engine, a new object; raises `Refusal` when it does not fit."""
    finish: Callable[[str, bytes], bytes] | None = None
    """(route, the engine's whole JSON reply) -> what the client gets. Never asked about streams."""


class Catalog(Protocol):
    """What can be asked for."""

    def entries(self) -> list[dict[str, Any]]:
        """OpenAI model objects: id, object "model", created, owned_by, root, parent (adapters and virtual models)."""
        ...

    def choose(self, exchange: Exchange) -> Choice:
        """What `exchange.asked` means; deterministic for one exchange id or session.

        Raises:
            Refusal: 404, with the names that there are.
        """
        ...

    def hold(self, choice: Choice) -> AbstractAsyncContextManager[None]:
        """Entered around the whole exchange: an adapter is resident at the engine and stays while it is in use.

        Raises:
            Refusal: (on entering) it cannot be loaded: 503 or 500.
        """
        ...


class FeedbackSink(Protocol):
    """Where POST /v1/feedback goes."""

    async def give(self, body: Mapping[str, Any], key: Key | None) -> dict[str, Any]:
        """Store it durably; gives what the client is answered.

        Raises:
            Refusal: 400 malformed, 404 no such request (or of another key), 503 it cannot be stored.
        """
        ...

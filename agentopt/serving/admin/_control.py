"""What the admin side holds of a running server: its parts, and what may be done to them."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from agentopt.errors import UserError

if TYPE_CHECKING:
    from agentopt.serving._types import Catalog, Engine
    from agentopt.serving.metrics import Meter

SHORTEST_TOKEN = 16


def checked_token(token: str) -> str:
    """The token, if it can protect anything.

    Raises:
        UserError: it is too short, or no header can carry it.
    """
    if len(token) < SHORTEST_TOKEN or not token.isascii() or not token.isprintable() or token != token.strip():
        raise UserError(
            f"AGENTOPT_ADMIN_TOKEN: expected at least {SHORTEST_TOKEN} printable ASCII characters; "
            "leave it unset for a random one in the run folder's server.json."
        )
    return token


class Door(Protocol):
    """The gateway as the admin side sees it."""

    @property
    def in_flight(self) -> int:
        """Requests under way."""
        ...

    @property
    def draining(self) -> bool:
        """No new requests are taken."""
        ...

    async def drain(self, seconds: float) -> bool:
        """Take no new requests and wait for those under way; False when some were left after so many seconds."""
        ...


class Adapter(Protocol):
    """One adapter in a list."""

    def to_dict(self) -> dict[str, Any]:
        """JSON, with its name as "name"."""
        ...


class Adapters(Protocol):
    """The adapter registry as the admin side sees it."""

    @property
    def known(self) -> int:
        """Adapters that can be asked for."""
        ...

    @property
    def resident(self) -> int:
        """Adapters that the engine holds."""
        ...

    @property
    def loads(self) -> int:
        """How often one was loaded."""
        ...

    def __contains__(self, name: object) -> bool: ...

    def list(self) -> Sequence[Adapter]:
        """All of them."""
        ...

    async def add(self, name: str, folder: str, *, keep: bool = False) -> object:
        """Check and add one; UserError when it is no good."""
        ...

    async def remove(self, name: str) -> None:
        """Take one away."""
        ...


class Keys(Protocol):
    """The keyring as the admin side sees it."""

    @property
    def known(self) -> int:
        """Valid keys."""
        ...

    @property
    def trouble(self) -> str | None:
        """Why the key file cannot be read or written now."""
        ...


class Capture(Protocol):
    """The recorder as the admin side sees it."""

    @property
    def captured(self) -> int:
        """Exchanges stored."""
        ...

    @property
    def drops(self) -> Mapping[str, int]:
        """Exchanges not stored, by reason."""
        ...

    @property
    def trouble(self) -> str | None:
        """Why nothing can be stored now."""
        ...

    def status(self) -> dict[str, Any]:
        """JSON."""
        ...


@dataclass(slots=True, eq=False)
class Control:
    """The parts of one running server.

    Raises:
        UserError: the token is too short to protect anything.
    """

    engine: Engine
    gateway: Door
    catalog: Catalog
    meter: Meter
    token: str = field(repr=False)
    """What a request must carry that sees or changes more than /health and /metrics."""
    model: str
    """By which clients ask the base; empty: by the name that the engine gives it."""
    adapters: Adapters | None = None
    keyring: Keys | None = None
    capture: Capture | None = None
    scores: Callable[[], list[dict[str, Any]]] | None = None
    """The rows of GET /variants; called in a thread."""
    started: float = field(default_factory=time.time)
    host: str = "127.0.0.1"
    """Where the admin port listens. On loopback, a request must name loopback as its host."""
    base_url: str = ""
    stop: Callable[[], None] | None = None
    """Ends the server; called when it has drained."""
    engine_metrics: Callable[[], Awaitable[str]] | None = None
    """The engine's own metrics; None: asked at the engine's /metrics."""

    def __post_init__(self) -> None:
        checked_token(self.token)

    async def drain(self, seconds: float = 30.0) -> bool:
        """Take no new requests and wait for those under way, at most so many seconds; True when none is left."""
        return await self.gateway.drain(seconds)

    def warnings(self) -> list[str]:
        """What is not as it should be now, a sentence each."""
        troubles = {
            "engine": getattr(self.engine, "reason", None),
            "keys": self.keyring and self.keyring.trouble,
            "capture": self.capture and self.capture.trouble,
        }
        return [f"{part}: {trouble}" for part, trouble in troubles.items() if trouble]

    def status(self) -> dict[str, Any]:
        """Everything about the server that fits in a page; JSON."""
        engine, adapters, keys, capture = self.engine, self.adapters, self.keyring, self.capture
        return {
            "model": self.model or engine.abilities.model,
            "base_url": self.base_url,
            "started": self.started,
            "uptime": max(0.0, time.time() - self.started),
            "engine": {
                "name": engine.name,
                "phase": str(engine.phase),
                "generation": engine.generation,
                "routes": sorted(engine.abilities.routes),
                "context": engine.abilities.context,
            },
            "in_flight": self.gateway.in_flight,
            "draining": self.gateway.draining,
            "totals": self.meter.totals(),
            "models": [entry["id"] for entry in self.catalog.entries()],
            "adapters": None if adapters is None else {"known": adapters.known, "resident": adapters.resident},
            "keys": None if keys is None else {"valid": keys.known},
            "capture": None if capture is None else capture.status(),
            "warnings": self.warnings(),
        }

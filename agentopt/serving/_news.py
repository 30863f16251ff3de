"""What a server tells of itself beside what its engine tells: where it listens, that it serves, that it stops."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from agentopt.serving.engines._events import Event

if TYPE_CHECKING:
    from agentopt.serving.gateway import AccessLog


@dataclass(frozen=True, slots=True)
class EngineChosen(Event):
    """Which engine it will be, and why."""

    kind: ClassVar[str] = "engine_chosen"
    engine: str
    why: str
    model: str
    """As it was asked for."""


@dataclass(frozen=True, slots=True)
class Listening(Event):
    """Both ports are open; requests are answered with 503 until the engine is ready."""

    kind: ClassVar[str] = "listening"
    base_url: str
    admin_url: str


@dataclass(frozen=True, slots=True)
class Serving(Event):
    """The engine was ready for the first time: requests are answered."""

    kind: ClassVar[str] = "serving"
    base_url: str
    admin_url: str
    engine: str
    model: str
    """By this name clients ask the base."""
    models: tuple[str, ...]
    """All that can be asked for: the base, adapters, tuned prompts."""
    keys: int | None
    """How many keys may ask; None: no key is needed."""
    host: str
    """Where it listens; who can reach it may ask where no key is needed."""
    run_dir: str
    captured_as: str | None
    """The run in the store that exchanges go to."""
    state: Callable[[], dict[str, Any]] = field(repr=False, compare=False)
    """Counts since the start; quick."""

    def to_dict(self) -> dict[str, Any]:
        """JSON values; without `state`."""
        names = ("base_url", "admin_url", "engine", "model", "models", "keys", "host", "run_dir", "captured_as")
        return {"kind": self.kind, **{name: getattr(self, name) for name in names}}


@dataclass(frozen=True, slots=True)
class Draining(Event):
    """It stops: no new requests, those that run may end."""

    kind: ClassVar[str] = "draining"
    in_flight: int
    seconds: float
    """How long that may take."""


@dataclass(frozen=True, slots=True)
class Ended(Event):
    """It has stopped, and so has its engine."""

    kind: ClassVar[str] = "ended"
    cut_off: int
    """Requests that were running at the end."""


class News:
    """Passes on all that is told, and writes it to the log once there is one.

    Args:
        listener: told first.
    """

    def __init__(self, listener: Callable[[Any], None]) -> None:
        self._listener = listener
        self.log: AccessLog | None = None

    def __call__(self, event: Event) -> None:
        """Tell an event. A terminal that is gone, or a file on a full disk, is no reason to stop serving."""
        with suppress(OSError, SystemExit):  # rich's consoles end the program where nobody reads any more
            self._listener(event)
        if self.log is not None:
            about = event.to_dict()
            self.log.event(about.pop("kind"), **about)

    def close(self) -> None:
        """Close the log; what is told from now on is not in it."""
        if self.log is not None:
            self.log.close()
            self.log = None

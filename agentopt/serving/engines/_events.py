"""What the engines' side of the endpoint tells while it works: preparing a model, starting, health, restarts.

Every event is a frozen dataclass with a `kind` for machines; `on_event` gets them on the event loop, in order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from agentopt.weights._events import Event as Event
from agentopt.weights._events import Warned as Warned
from agentopt.weights._events import Working as Working


@dataclass(frozen=True, slots=True)
class ModelReady(Event):
    """The model is there in the form that the engine takes."""

    kind: ClassVar[str] = "model_ready"
    path: str
    cached: bool
    """It was prepared by an earlier start."""
    seconds: float


@dataclass(frozen=True, slots=True)
class Starting(Event):
    """The engine's process runs; it does not answer yet."""

    kind: ClassVar[str] = "starting"
    engine: str
    attempt: int
    """Counts starts since the engine was last ready: 1, 2, ..."""
    pid: int


@dataclass(frozen=True, slots=True)
class Progress(Event):
    """How far a start is, read from the engine's log."""

    kind: ClassVar[str] = "progress"
    what: str
    seconds: float
    """Since the process was started."""


@dataclass(frozen=True, slots=True)
class Ready(Event):
    """The engine answers, and requests are forwarded to it."""

    kind: ClassVar[str] = "ready"
    engine: str
    seconds: float
    generation: int


@dataclass(frozen=True, slots=True)
class Died(Event):
    """The engine's process ended without being asked to."""

    kind: ClassVar[str] = "died"
    engine: str
    why: str
    after: float
    """Seconds that it ran."""
    exit_code: int | None
    """Negative: the signal that ended it."""


@dataclass(frozen=True, slots=True)
class Hung(Event):
    """The engine's process runs and does not answer; it is killed and started again."""

    kind: ClassVar[str] = "hung"
    engine: str
    why: str


@dataclass(frozen=True, slots=True)
class Waiting(Event):
    """The next start comes after a pause."""

    kind: ClassVar[str] = "waiting"
    seconds: float
    attempt: int
    why: str


@dataclass(frozen=True, slots=True)
class Failed(Event):
    """The engine is not started any more."""

    kind: ClassVar[str] = "failed"
    engine: str
    why: str
    tail: tuple[str, ...]
    """Last lines of its log."""


@dataclass(frozen=True, slots=True)
class Stopped(Event):
    """The engine ended because it was asked to."""

    kind: ClassVar[str] = "stopped"
    engine: str


OnEvent = Callable[[Event], None]

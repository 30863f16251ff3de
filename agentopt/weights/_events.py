"""Events that every training of this room tells of, and the line that keeps one of them in a run's folder."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, TextIO

from agentopt.errors import RunError


@dataclass(frozen=True, slots=True)
class Event:
    """Base of all events; `kind` names the type in the file."""

    kind: ClassVar[str] = "event"

    def to_dict(self) -> dict[str, Any]:
        """JSON values; `kind` included."""
        return {"kind": self.kind, **asdict(self)}


@dataclass(frozen=True, slots=True)
class Working(Event):
    """What is being done now, in a few words. Shown, not written."""

    kind: ClassVar[str] = "working"
    what: str
    done: int = 0
    total: int | None = None


@dataclass(frozen=True, slots=True)
class Resumed(Event):
    """An interrupted run goes on after this many steps."""

    kind: ClassVar[str] = "resumed"
    step: int


@dataclass(frozen=True, slots=True)
class Warned(Event):
    """Something the user should know; the run goes on."""

    kind: ClassVar[str] = "warned"
    message: str


def append(file: TextIO | None, path: Path, event: Event) -> None:
    """Write one event as a line; nothing without a file, or for what is only shown.

    Raises:
        RunError: the disk is full or gone; what was written before stays.
    """
    if file is None or isinstance(event, Working):
        return
    try:
        file.write(json.dumps(event.to_dict(), ensure_ascii=False) + "\n")
        file.flush()
    except OSError as error:
        raise RunError(
            f"{path}: cannot be written ({error.strerror or error}); nothing is lost, make room and run the same "
            "command again."
        ) from error

"""One adapter of the registry: what is known of it, how lists show it, what a client is told when it cannot be had."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from agentopt.serving._types import Refusal
from agentopt.serving.adapters._check import AdapterFacts

TRY_AGAIN = 5.0
"""Seconds until an adapter that could not be loaded is tried again."""


@dataclass(slots=True, eq=False)
class Entry:
    """What the registry knows of one adapter; changes while it is served."""

    facts: AdapterFacts
    keep: bool = False
    resident: AdapterFacts | None = None
    """What the engine holds under the name; may be older than `facts`."""
    users: int = 0
    used: int = 0
    """Grows with every use: the smallest is the least recently used."""
    loads: int = 0
    looked: float = 0.0
    stale: bool = False
    """Its folder has changed since it was checked."""
    problem: str | None = None
    failed_at: float = -TRY_AGAIN
    gone: bool = False


@dataclass(frozen=True, slots=True)
class AdapterStatus:
    """One adapter, as lists show it."""

    facts: AdapterFacts
    resident: bool
    """The engine holds it."""
    users: int
    """Requests that use it now."""
    loads: int
    """How often it was given to the engine."""
    problem: str | None
    """Why its folder, or the engine, does not give it any more; None when all is well."""

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        state = {"resident": self.resident, "users": self.users, "loads": self.loads, "problem": self.problem}
        return {**self.facts.to_dict(), **state}


def unavailable(entry: Entry) -> Refusal:
    """The reason names folders of the server: its operator finds it in the list, not the client in its reply."""
    return Refusal(
        503,
        f"The adapter {entry.facts.name!r} cannot be loaded; whoever runs the server sees why in its list of adapters.",
        kind="server_error",
        code="adapter_unavailable",
        retry_after=TRY_AGAIN,
    )

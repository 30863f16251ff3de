"""Resume by replay: what a stored run already decided from the outside is read back, everything else is computed again.

A resumed run goes through the loop from the start. Evaluation rows and LM replies come from the store at once; what
an optimizer proposed comes from the stored events, failures included, so an optimizer that is not a pure function (or
a rate limit that has passed) does not send the run down another path. Events that are stored already are not stored
again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from agentopt.errors import UserError
from agentopt.search._events import Event, ProposalMade


class StoredEvent(Protocol):
    """The part of a stored event row that is read here."""

    @property
    def kind(self) -> str:
        """The event's kind."""
        ...

    @property
    def payload(self) -> Mapping[str, Any]:
        """The event's `to_dict`."""
        ...


FAILURES = frozenset({"none", "garbage", "error"})


class Replay:
    """Stored proposals by (iteration, parent, place)."""

    def __init__(self, events: Sequence[StoredEvent], *, retry_failures: bool = False) -> None:
        made = [event.payload for event in events if event.kind == ProposalMade.kind]
        if retry_failures:  # the run ended because of them: asking again is the point of resuming
            while made and made[-1]["outcome"] in FAILURES:
                made.pop()
        self._made = {(int(p["iteration"]), str(p["parent"]), int(p.get("place", 0))): p for p in made}

    def proposal(self, iteration: int, parent: str, place: int = 0) -> ProposalMade | None:
        """What the optimizer answered then, or None when it was not asked yet."""
        payload = self._made.get((iteration, parent, place))
        if payload is None:
            return None
        return ProposalMade(
            iteration=iteration,
            parent=parent,
            outcome=str(payload["outcome"]),
            detail=str(payload.get("detail", "")),
            updates=list(payload["updates"]),
            usd=payload.get("usd"),
            tokens=int(payload.get("tokens", 0)),
            transient=bool(payload.get("transient", False)),
            place=place,
            dropped=list(payload.get("dropped") or []),
            calls=int(payload.get("calls", 0)),
        )


class EventLog:
    """Passes events to the listener and appends those that a replay did not store before."""

    def __init__(
        self,
        append: Callable[[str, dict[str, Any]], object] | None,
        listener: Callable[[Event], None] | None,
        stored: Sequence[StoredEvent] = (),
    ) -> None:
        self._append = append
        self._listener = listener
        self._stored = [event.kind for event in stored]
        self._position = 0

    @property
    def replaying(self) -> bool:
        """Whether the next event is expected to be stored already."""
        return self._position < len(self._stored)

    def emit(self, event: Event) -> None:
        """Store the event unless it is a replayed one, then tell the listener."""
        if self.replaying and self._stored[self._position] == event.kind:
            self._position += 1
        else:
            self._stored = self._stored[: self._position]  # from here on the run goes its own way
            if self._append is not None:
                self._append(event.kind, event.to_dict())
        if self._listener is not None:
            self._listener(event)


def check_same(stored: Mapping[str, Any], now: Mapping[str, Any], run_id: str) -> None:
    """Refuse to resume a run with other data, program, seed or budget: its decisions would not be comparable.

    Raises:
        UserError: naming the first field that differs.
    """
    for name, value in now.items():
        if name in stored and stored[name] != value:
            raise UserError(
                f"cannot resume run {run_id}: {name} was {stored[name]!r} and is now {value!r}; give the same, or "
                "start a new run"
            )

"""From a run's stored events to one row per proposal: who made it, how far it came, why it stopped."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(slots=True)
class ProposalRow:
    """One candidate's way through screen and gate. Scores are on the metric's scale."""

    candidate: str
    iteration: int
    source: str = ""
    parent: str = ""
    screen: float | None = None
    """Mean paired difference to its parent on the minibatch."""
    validation: float | None = None
    """Mean over all validation rows; None when it did not finish the race."""
    accepted: bool = False
    reason: str = ""
    rollouts: int = 0
    """Rollouts the run had spent when the outcome was known."""


def proposals_of(events: Iterable[Mapping[str, Any]]) -> list[ProposalRow]:
    """Rows in the order of their outcome; unknown event kinds are skipped."""
    rows: dict[tuple[int, str], ProposalRow] = {}
    pending: list[ProposalRow] = []

    def row(event: Mapping[str, Any], candidate: str) -> ProposalRow:
        key = (int(event["iteration"]), candidate)
        if key not in rows:
            rows[key] = ProposalRow(candidate, key[0])
            pending.append(rows[key])
        return rows[key]

    for event in events:
        kind = event.get("kind")
        if kind == "screen_done":
            for candidate, difference in event["scores"].items():
                row(event, candidate).screen = difference
        elif kind == "gate_done":
            for candidate, mean in event["means"].items():
                row(event, candidate).validation = mean
        elif kind == "candidate_accepted":
            found = row(event, event["candidate"])
            found.accepted, found.validation, found.source = True, event["validation"], event["source"]
            found.parent = event["parent"]
        elif kind == "candidate_rejected":
            found = row(event, event["candidate"] or f"({event['stage']})")
            found.reason, found.source, found.parent = event["reason"], event["source"], event["parent"]
        elif kind == "spend":
            for waiting in pending:
                waiting.rollouts = int(event["totals"].get("rollouts", 0))
            pending.clear()
    return list(rows.values())

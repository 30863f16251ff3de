"""Typed events of a run: stored in order, shown live, and enough to rebuild the report.

Every event is made at a block boundary from values that a replay makes again, so a resumed run emits the same sequence
and only what is new is appended to the store.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar


@dataclass(frozen=True, slots=True)
class Event:
    """Base of all events; `kind` names the type in the store."""

    kind: ClassVar[str] = "event"

    def to_dict(self) -> dict[str, Any]:
        """JSON values; `kind` included."""
        return {"kind": self.kind, **asdict(self)}


def _dict() -> dict[str, Any]:
    return {}


@dataclass(frozen=True, slots=True)
class RunStarted(Event):
    """Before anything is spent. `plan` holds sizes, budget and what the baseline and the test will take."""

    kind: ClassVar[str] = "run_started"
    run_id: str
    program: str
    optimizer: str
    driver: str
    driver_reason: str
    seed: int
    plan: dict[str, Any] = field(default_factory=_dict)


@dataclass(frozen=True, slots=True)
class BaselineDone(Event):
    """The baseline on validation: its mean, what one rollout costs, what was read, and the full plan."""

    kind: ClassVar[str] = "baseline_done"
    candidate: str
    mean: float
    rows: int
    errors: int
    tunable: list[str]
    never_read: list[str]
    tools: dict[str, float]
    """Tool name → mean calls per rollout."""
    plan: dict[str, Any] = field(default_factory=_dict)


@dataclass(frozen=True, slots=True)
class ProposalMade(Event):
    """One call of the optimizer. `updates` holds the edits themselves; a resume reads them from here."""

    kind: ClassVar[str] = "proposal_made"
    iteration: int
    parent: str
    outcome: str
    """ "ok", "empty", "none", "garbage" or "error"."""
    detail: str
    updates: list[dict[str, Any]]
    usd: float | None
    tokens: int
    transient: bool = False
    place: int = 0
    """Counts the calls about this parent in this iteration."""
    dropped: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    """Edits that the optimizer gave up, each with `source`, `problem` and `tries`."""
    calls: int = 0
    """LM calls of the optimizer, cached ones included."""


@dataclass(frozen=True, slots=True)
class MinibatchSkipped(Event):
    """The parent was perfect on the minibatch; the iteration is spent."""

    kind: ClassVar[str] = "minibatch_skipped"
    iteration: int
    parent: str
    rows: int


@dataclass(frozen=True, slots=True)
class ScreenDone(Event):
    """How the proposals did on the minibatch. `scores` maps candidate → mean difference to its parent."""

    kind: ClassVar[str] = "screen_done"
    iteration: int
    rows: int
    scores: dict[str, float]
    passed: list[str]


@dataclass(frozen=True, slots=True)
class GateProgress(Event):
    """A look of the racing gate: candidates still in the race and the leader's mean so far."""

    kind: ClassVar[str] = "gate_progress"
    iteration: int
    rows: int
    total: int
    live: list[str]
    leader: str
    leader_mean: float


@dataclass(frozen=True, slots=True)
class GateDone(Event):
    """Means over all validation rows of the challengers that finished the race."""

    kind: ClassVar[str] = "gate_done"
    iteration: int
    means: dict[str, float]


@dataclass(frozen=True, slots=True)
class CandidateAccepted(Event):
    """A candidate joined the pool."""

    kind: ClassVar[str] = "candidate_accepted"
    iteration: int
    candidate: str
    parent: str
    source: str
    validation: float
    previous_best: float


@dataclass(frozen=True, slots=True)
class CandidateRejected(Event):
    """A candidate (or an update that gave none) was dropped, at which stage and why."""

    kind: ClassVar[str] = "candidate_rejected"
    iteration: int
    candidate: str
    parent: str
    source: str
    stage: str
    """ "edit", "leak", "duplicate", "screen" or "gate"."""
    reason: str


@dataclass(frozen=True, slots=True)
class Spend(Event):
    """Totals so far; `left` is how many rollouts still fit before the reserve for the test (None: unbounded)."""

    kind: ClassVar[str] = "spend"
    iteration: int
    left: int | None
    totals: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Warning_(Event):
    """Something the user should know; the run goes on."""

    kind: ClassVar[str] = "warning"
    message: str


@dataclass(frozen=True, slots=True)
class TestDone(Event):
    """The test set was used, once."""

    __test__: ClassVar[bool] = False
    kind: ClassVar[str] = "test_done"
    claim: dict[str, Any]


@dataclass(frozen=True, slots=True)
class RunFinished(Event):
    """The last event of a run that ended by itself."""

    kind: ClassVar[str] = "run_finished"
    status: str
    stop_reason: str
    best: str


def event_kinds() -> Mapping[str, type[Event]]:
    """Kind → event type."""
    return {cls.kind: cls for cls in Event.__subclasses__()}

"""Typed events of meta-training: shown live, written one JSON object a line, and read again by a resume."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar


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
class Planned(Event):
    """Before anything is trained: sizes and what one step does."""

    kind: ClassVar[str] = "planned"
    model: str
    adapts: str
    trains: str
    rule: str
    inner_steps: int
    unroll: int
    """Inner steps whose second-order terms are kept."""
    adapted: int
    """Numbers that the inner loop moves, per knowledge base."""
    trained: int
    """Numbers that meta-training learns."""
    total: int
    """Weights of the model."""
    tasks: int
    questions: int
    val_tasks: int
    facts: float
    """Mean facts of a knowledge base."""
    steps: int
    documents: int
    """Knowledge bases folded in one forward pass."""
    accumulate: int
    multi_task: bool


@dataclass(frozen=True, slots=True)
class Resumed(Event):
    """An interrupted run goes on after this many steps."""

    kind: ClassVar[str] = "resumed"
    step: int


@dataclass(frozen=True, slots=True)
class Stepped(Event):
    """One meta-step. `step` counts from 1: the meta-parameters have had so many updates."""

    kind: ClassVar[str] = "stepped"
    step: int
    loss: float
    answer: float
    """Cross-entropy of the answers, per token."""
    recall: float | None
    """Of the recalled facts; None in the single-task form."""
    guard: float | None
    """KL divergence from the base on unrelated prompts; None without the guard."""
    lr: float
    norm: float
    """Of the meta-gradient, before clipping."""
    seconds: float


@dataclass(frozen=True, slots=True)
class Validated(Event):
    """The validation tasks after `step` updates: folded, asked, judged."""

    kind: ClassVar[str] = "validated"
    step: int
    accuracy: float
    recall_exact: float | None
    """Share of answers whose recalled facts are the relevant ones, in order; None in the single-task form."""
    recall_set: float | None
    """The same in any order."""
    recall: float
    """Of the facts under their folds: exp(-mean loss per token)."""
    loss: float
    """The outer loss (without the guard)."""
    best: bool


@dataclass(frozen=True, slots=True)
class Warned(Event):
    """Something the user should know; the run goes on."""

    kind: ClassVar[str] = "warned"
    message: str


@dataclass(frozen=True, slots=True)
class Finished(Event):
    """The last event: where the folder is and how good it was on validation."""

    kind: ClassVar[str] = "finished"
    best_step: int
    stop_reason: str
    validation: dict[str, Any]
    warnings: list[str] = field(default_factory=list[str])


def event_kinds() -> Mapping[str, type[Event]]:
    """Kind to event type."""
    return {cls.kind: cls for cls in Event.__subclasses__()}

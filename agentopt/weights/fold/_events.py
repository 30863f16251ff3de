"""Typed events of meta-training: shown live, written one JSON object a line, and read again by a resume."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from agentopt.weights._events import Event, Resumed, Warned, Working


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
class Finished(Event):
    """The last event: where the folder is and how good it was on validation."""

    kind: ClassVar[str] = "finished"
    best_step: int
    stop_reason: str
    validation: dict[str, Any]
    warnings: list[str] = field(default_factory=list[str])


def event_kinds() -> Mapping[str, type[Event]]:
    """Kind to event type."""
    kinds = (Working, Resumed, Warned, Planned, Stepped, Validated, Finished)
    return {cls.kind: cls for cls in kinds}

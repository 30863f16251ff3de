"""Typed events of a fine-tuning run: shown live, written one JSON object a line, and read again by a resume."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from agentopt.weights._events import Event, Resumed, Warned, Working


@dataclass(frozen=True, slots=True)
class Planned(Event):
    """Before anything is trained: sizes, weights, cost."""

    kind: ClassVar[str] = "planned"
    model: str
    method: str
    description: str
    tune: str
    rows: dict[str, int]
    labels: dict[str, str]
    truncated: int
    """Rows that were longer than max_tokens."""
    metric: str
    """What the scores are."""
    split: bool
    """The three parts come from one file."""
    trained: int
    """Weights that are trained."""
    total: int
    """Weights of the model."""
    weight_bytes: int
    steps: int
    forwards_per_step: int | None
    """Forward passes over the batch; None for methods with gradients."""
    batch: int
    workers: int
    lr: float | None
    eps: float | None


@dataclass(frozen=True, slots=True)
class BaselinesDone(Event):
    """What can be had without training, on the validation rows; the test rows were read but are not shown yet."""

    kind: ClassVar[str] = "baselines_done"
    validation: dict[str, float]
    """zero-shot, majority, calibrated: accuracy (or mean score)."""
    loss: float
    """Of the untrained model on validation."""


@dataclass(frozen=True, slots=True)
class RateFound(Event):
    """What the learning-rate range test recommends."""

    kind: ClassVar[str] = "rate_found"
    lr: float
    reason: str
    clear: bool
    """The gain is beyond its noise."""
    tried: list[dict[str, str]]
    """A row per rate: held-out loss at start and end, gain, verdict."""
    forwards: int


@dataclass(frozen=True, slots=True)
class Stepped(Event):
    """One step of training. `step` counts from 1: the weights have had so many updates."""

    kind: ClassVar[str] = "stepped"
    step: int
    loss: float
    lr: float
    flat: bool
    """All measured losses were the same, or nothing moved: the step told nothing."""
    seconds: float
    memory: int
    """Peak bytes so far."""


@dataclass(frozen=True, slots=True)
class Validated(Event):
    """The validation rows after `step` updates."""

    kind: ClassVar[str] = "validated"
    step: int
    score: float
    loss: float
    best: bool


@dataclass(frozen=True, slots=True)
class Finished(Event):
    """The last event: the claim and where the model is."""

    kind: ClassVar[str] = "finished"
    claim: dict[str, Any]
    stop_reason: str
    best_step: int
    warnings: list[str] = field(default_factory=list[str])


def event_kinds() -> Mapping[str, type[Event]]:
    """Kind to event type."""
    kinds = (Working, Resumed, Warned, Planned, BaselinesDone, RateFound, Stepped, Validated, Finished)
    return {cls.kind: cls for cls in kinds}

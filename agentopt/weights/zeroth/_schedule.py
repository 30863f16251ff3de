"""The learning rate of a step as a pure function of the step's number."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from agentopt.errors import UserError

ScheduleKind = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True, slots=True)
class Schedule:
    """How the learning rate changes over a run.

    Attributes:
        kind: `"constant"` stays (MeZO's choice), `"linear"` and `"cosine"` fall to zero just after the last step.
        warmup: steps over which the rate first rises in equal parts: `1/warmup, 2/warmup, ...`.
        total: steps of the whole run, warmup included; needed to fall.
    """

    kind: ScheduleKind = "constant"
    warmup: int = 0
    total: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(ScheduleKind):
            known = ", ".join(get_args(ScheduleKind))
            raise UserError(f"schedule: kind is {self.kind!r}, expected one of {known}.")
        if self.warmup < 0:
            raise UserError(f"schedule: warmup is {self.warmup!r}, expected a number of steps of at least 0.")
        if self.kind == "constant":
            return
        if self.total is None:
            raise UserError(f"schedule: {self.kind!r} needs total, the number of steps of the run.")
        if self.total <= self.warmup:
            raise UserError(f"schedule: total is {self.total}, expected more than the {self.warmup} steps of warmup.")

    def lr(self, step: int, base: float) -> float:
        """The rate of `step` (from 0), rounded to float32: the number that the log stores and a replay reads."""
        return float(np.float32(base * self._share(step)))

    def _share(self, step: int) -> float:
        if step < self.warmup:
            return (step + 1) / self.warmup
        if self.kind == "constant" or self.total is None:
            return 1.0
        left = max(0.0, (self.total - step) / (self.total - self.warmup))
        return left if self.kind == "linear" else 0.5 * (1.0 - math.cos(math.pi * left))

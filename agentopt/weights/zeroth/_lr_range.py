"""A learning rate from short trial runs: the range test behind `--lr auto`.

Every rate of a geometric grid trains for a few steps from the same start, on the same batches with the same directions,
and is judged by the loss on the same held-out examples. Between the trials the weights are put back exactly. Undoing
the updates would not be exact (float sums do not invert), so the start is copied: `Snapshot` keeps the trained tensors
in host memory in their own dtype (full float32 weights: 4 bytes per weight while the test runs; an adapter: next to
nothing). Where that is too much, any other `restore`, such as loading the weights again, does.

What it can say: at which rate training breaks, and which rate was best over a short run. A longer run often wants a
somewhat smaller rate than a short one, and one seed was tried; the reason given with the choice says how clear it was.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from agentopt.errors import RunError, UserError
from agentopt.weights.zeroth._types import StepResult

if TYPE_CHECKING:
    from torch import Tensor

_MATERIAL = 0.05
"""A rise of the loss counts as breaking from this share of its size (or of its spread over the examples) upward."""


class Trainer(Protocol):
    """What is tried: `ZerothOrder`, or anything with its `step`."""

    def step(self, loss_fn: Any, /) -> StepResult:
        """Measure and update once."""
        ...


class Snapshot:
    """An exact copy of tensors in host memory.

    Attributes:
        bytes: what it holds.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._pairs: list[tuple[Any, Any]] = [
            (tensor.detach(), tensor.detach().to("cpu", copy=True)) for tensor in tensors
        ]
        self.bytes = sum(saved.numel() * saved.element_size() for _, saved in self._pairs)

    def restore(self) -> None:
        """Write every tensor back, bit for bit."""
        for tensor, saved in self._pairs:
            tensor.copy_(saved)


@dataclass(frozen=True, slots=True)
class LrTrial:
    """One rate's run.

    Attributes:
        lr: the rate.
        stable: the loss stayed a number and did not rise.
        gain: how much the held-out loss fell (mean over the later half of the checks); negative when it rose.
        error: standard error of the gain over the held-out examples, paired with the start.
        smoothed: the gain averaged with those of the neighbouring rates (1 : 2 : 1); a neighbour that broke counts as
            minus half the best gain, so that a rate at the edge has to be clearly better.
        curve: held-out loss at every check, the start first.
        steps: steps done; fewer than asked for when it broke.
        note: why it broke; empty when stable.
    """

    lr: float
    stable: bool
    gain: float
    error: float
    smoothed: float
    curve: tuple[float, ...]
    steps: int
    note: str = ""


@dataclass(frozen=True, slots=True)
class LrRange:
    """Outcome of the test.

    Attributes:
        recommended: the rate to train with.
        reason: why, in one line.
        clear: whether the gain at that rate is beyond its noise.
        trials: one per rate tried, from the smallest.
        forwards: forward passes over training batches that the test cost.
    """

    recommended: float
    reason: str
    clear: bool
    trials: tuple[LrTrial, ...]
    forwards: int

    @property
    def tried(self) -> tuple[float, ...]:
        """The rates, from the smallest."""
        return tuple(trial.lr for trial in self.trials)

    @property
    def curve(self) -> tuple[tuple[float, float], ...]:
        """Pairs of rate and gain, for a plot."""
        return tuple((trial.lr, trial.gain) for trial in self.trials)

    def table(self) -> list[dict[str, str]]:
        """Rows for a report: rate, held-out loss before and after, gain, verdict."""
        return [
            {
                "lr": f"{trial.lr:.3g}",
                "start": f"{trial.curve[0]:.5g}",
                "end": f"{trial.curve[-1]:.5g}",
                "gain": f"{trial.gain:+.4g} ± {trial.error:.2g}" if math.isfinite(trial.gain) else "-",
                "verdict": ("chosen" if trial.lr == self.recommended else "stable") if trial.stable else trial.note,
            }
            for trial in self.trials
        ]


def grid(center: float, decades: float = 2.0, per_decade: int = 2) -> tuple[float, ...]:
    """A geometric grid: `decades` on either side of `center`, from the smallest."""
    if not (math.isfinite(center) and center > 0):
        raise UserError(f"lr: found {center!r} as the middle of the grid, expected a number above 0.")
    if decades <= 0 or per_decade < 1:
        raise UserError(f"lr: found {decades} decades with {per_decade} rates each, expected more than 0 of both.")
    reach = max(1, round(decades * per_decade))
    return tuple(float(f"{center * 10 ** (notch / per_decade):.3g}") for notch in range(-reach, reach + 1))


def lr_range(
    make: Callable[[float], Trainer],
    loss_at: Callable[[int], Any],
    held_out: Callable[[], Sequence[float]],
    restore: Callable[[], None],
    *,
    rates: Sequence[float],
    steps: int = 20,
    checks: int = 4,
    on_trial: Callable[[LrTrial], None] | None = None,
) -> LrRange:
    """Try each rate from the same start and recommend one; the weights are afterwards what they were, bit for bit.

    Rates are tried from the smallest; after two in a row that broke, larger ones are left out. A rate breaks when the
    loss is not a number, or when the held-out loss is above its start by more than two standard errors plus 5 % of its
    size. The choice is the largest of the stable rates with the best smoothed gain. When no gain is beyond two standard
    errors, it is the largest rate that is one notch away from breaking, and `clear` is False.

    Args:
        make: a fresh optimizer with this rate (constant schedule, no log) over the same weights, with the same seed.
        loss_at: the loss of step t, the same for every rate.
        held_out: losses of the same held-out examples (or batches) at the present weights, at least two.
        restore: puts the start back exactly, such as `Snapshot(...).restore`.
        rates: what to try; see `grid`.
        steps: steps of a trial.
        checks: how often a trial looks at the held-out loss.
        on_trial: told of every finished trial, for progress (`smoothed` is filled in only at the end).

    Raises:
        UserError: no rates, or fewer than two held-out losses.
        RunError: the loss at the start is not a number, or every rate broke.
    """
    ordered = sorted(set(rates))
    if not ordered or ordered[0] <= 0 or steps < 1 or checks < 1:
        raise UserError(f"lr range test: found rates {list(rates)}, {steps} steps, {checks} checks; all must be > 0.")
    runner = _Runner(make, loss_at, held_out, steps, checks)
    trials: list[LrTrial] = []
    try:
        for lr in ordered:
            restore()
            trials.append(runner.trial(lr))
            if on_trial is not None:
                on_trial(trials[-1])
            if not any(trial.stable for trial in trials[-2:]) and len(trials) > 1:
                break
    finally:
        restore()
    return _choose(_smooth(trials), runner.forwards)


class _Runner:
    """Runs trials and compares them with the start."""

    def __init__(
        self,
        make: Callable[[float], Trainer],
        loss_at: Callable[[int], Any],
        held_out: Callable[[], Sequence[float]],
        steps: int,
        checks: int,
    ) -> None:
        self._make, self._loss_at, self._held_out, self._steps = make, loss_at, held_out, steps
        self._every = max(1, -(-steps // checks))
        self.forwards = 0
        self._start = self._measure()
        if len(self._start) < 2:
            raise UserError("lr range test: found fewer than 2 held-out losses, expected one per example or batch.")
        if not np.isfinite(self._start).all():
            raise RunError("lr range test: the held-out loss is not a number before any step; check data and model.")
        self._size = max(abs(_mean(self._start)), float(self._start.std()))

    def trial(self, lr: float) -> LrTrial:
        """One run from the start, which the caller has put back."""
        optimizer = self._make(lr)
        falls: list[NDArray[np.float64]] = []
        done, note = 0, ""
        for step in range(self._steps):
            try:
                self.forwards += optimizer.step(self._loss_at(step)).forwards
            except RunError as error:
                note = f"broke at step {step}: {error}"
                break
            done = step + 1
            if done % self._every and done < self._steps:
                continue
            falls.append(self._start - self._measure())
            note = self._breaks(falls[-1], done)
            if note:
                break
        return self._summary(lr, falls, done, note)

    def _measure(self) -> NDArray[np.float64]:
        return np.asarray(self._held_out(), dtype=np.float64)

    def _breaks(self, fall: NDArray[np.float64], step: int) -> str:
        if not np.isfinite(fall).all():
            return f"the loss is not a number after {step} steps"
        rise = -_mean(fall)
        if rise > 2.0 * _error(fall) + _MATERIAL * self._size:
            return f"the loss rose by {rise:.3g} in {step} steps"
        return ""

    def _summary(self, lr: float, falls: list[NDArray[np.float64]], done: int, note: str) -> LrTrial:
        start = _mean(self._start)
        curve = (start, *(start - _mean(fall) for fall in falls))
        late = falls[len(falls) // 2 :]
        finite = bool(late) and all(np.isfinite(fall).all() for fall in late)
        fall = np.mean(late, axis=0) if finite else np.full_like(self._start, -math.inf)
        gain, error = (_mean(fall), _error(fall)) if finite else (-math.inf, math.inf)
        return LrTrial(lr, not note, gain, error, gain, curve, done, note)


def _smooth(trials: list[LrTrial]) -> list[LrTrial]:
    best = max((abs(trial.gain) for trial in trials if trial.stable), default=0.0)
    # A longer run may break at a rate that a short one just survives.
    gains = [trial.gain if trial.stable else -best / 2 for trial in trials]
    smoothed: list[LrTrial] = []
    for place, trial in enumerate(trials):
        near = range(max(0, place - 1), min(len(trials), place + 2))
        weights = [2 if other == place else 1 for other in near]
        value = sum(gains[other] * weight for other, weight in zip(near, weights, strict=True)) / sum(weights)
        smoothed.append(replace(trial, smoothed=value))
    return smoothed


def _choose(trials: list[LrTrial], forwards: int) -> LrRange:
    stable = [place for place, trial in enumerate(trials) if trial.stable]
    low, high = trials[0].lr, trials[-1].lr
    if not stable:
        raise RunError(
            f"lr range test: every learning rate from {low:.3g} to {high:.3g} broke ({trials[0].note}); try rates "
            f"below {low:.3g}, or check eps and the loss."
        )
    place = max(stable, key=lambda index: (trials[index].smoothed, trials[index].lr))
    chosen = trials[place]
    span = f"of {len(trials)} rates from {low:.3g} to {high:.3g}"
    if chosen.gain > 2.0 * chosen.error:
        more = _more(trials, place)
        reason = f"{chosen.lr:.3g} lowered the held-out loss by {chosen.gain:.4g} ± {chosen.error:.2g}, {span}{more}"
        return LrRange(chosen.lr, reason, True, tuple(trials), forwards)
    broken = [index for index, trial in enumerate(trials) if not trial.stable]
    limit = min(broken) - 1 if broken else len(trials)
    safe = [index for index in stable if index < limit] or stable[:1]
    chosen = trials[safe[-1]]
    where = "the largest that is a notch below the first to break" if broken else "the largest tried; none broke"
    reason = f"no rate lowered the held-out loss beyond its noise, {span}; {chosen.lr:.3g} is {where}"
    return LrRange(chosen.lr, reason, False, tuple(trials), forwards)


def _more(trials: list[LrTrial], place: int) -> str:
    """What else a reader should know of a clear choice."""
    if place == len(trials) - 1:
        return "; it is the largest tried, a larger one may be better"
    most = max((trial for trial in trials if trial.stable), key=lambda trial: trial.gain)
    if most.lr == trials[place].lr:
        return "; no other gained more"
    return f"; {most.lr:.3g} gained more ({most.gain:.4g}), but its neighbours did worse"


def _mean(values: NDArray[np.float64]) -> float:
    return math.fsum(values) / len(values) if np.isfinite(values).all() else math.nan


def _error(values: NDArray[np.float64]) -> float:
    return float(values.std(ddof=1)) / math.sqrt(len(values))

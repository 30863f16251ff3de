"""Numbers and choices tuned together by Optuna's TPE, beside whatever else changes the texts.

The unit is one joint suggestion of all number and choice parameters. What is known comes from the history alone: every
measured proposal that changed a number or a choice is one observation. Texts change the score as well, so an
observation is not its score but what the edit gained over its parent, added up along the line of parents. With too few
observations the suggestions are the points of a low-discrepancy sequence.
"""

from __future__ import annotations

import importlib.util
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from agentopt.errors import UserError
from agentopt.evaluation import seed_number, seeded
from agentopt.graph import set_value
from agentopt.optimizers._legal import Proposals, current_value
from agentopt.optimizers._memory import gain, measured
from agentopt.optimizers._protocol import PastProposal, ProposeContext, Update
from agentopt.optimizers._values import KINDS, bounds

if TYPE_CHECKING:
    from agentopt.graph import ParameterSpec

STARTUP = 5
"""Different settings that must have been measured before TPE is asked."""
_LOG_SPAN = 1000.0
"""A positive range whose ends are this many times apart is searched by order of magnitude."""


def available() -> bool:
    """Whether Optuna is installed (it is not imported for this)."""
    return importlib.util.find_spec("optuna") is not None


def measured_settings(context: ProposeContext) -> int:
    """How many measured proposals changed a number or a choice."""
    return sum(measured(past) is not None and touches(past, context.specs) for past in context.history)


def touches(past: PastProposal, specs: Mapping[str, ParameterSpec]) -> bool:
    """Whether a past proposal changed a number or a choice."""
    return any(edit.name in specs and specs[edit.name].kind in KINDS for edit in past.update.edits)


class Tpe:
    """Proposes joint settings of every number and choice.

    Raises:
        UserError: Optuna is not installed.
    """

    name = "tpe"

    def __init__(self) -> None:
        if not available():
            raise UserError("optimizer 'tpe' needs Optuna, which is not installed: pip install 'agentopt[optuna]'.")

    def propose(self, context: ProposeContext) -> list[Update]:
        """Up to `context.count` updates; [] without a number or choice that can vary."""
        axes = [axis for axis in (axis_of(context, spec) for spec in context.specs.values()) if axis is not None]
        if not axes:
            return []
        seen = observations(context, axes)
        proposals = Proposals(context)
        enough = len({json.dumps(point) for point, _ in seen}) >= STARTUP
        suggest = _Suggestions(context, axes, seen) if enough else None
        tries = 4 * context.count + 4
        for place in range(2 * tries):
            if proposals.full:
                break
            by_model = suggest is not None and place < tries  # a small space that TPE exhausts is filled evenly
            point = suggest.next(place) if suggest is not None and by_model else _even(context, axes, place)
            why = f"TPE over {len(seen)} measured settings" if by_model else "an even spread of settings"
            update = _update(context, axes, point, why)
            if update is not None:
                proposals.offer(update)
        return proposals.updates


@dataclass(frozen=True, slots=True)
class Axis:
    """One parameter as a coordinate: the place of an option, or a number between two bounds."""

    spec: ParameterSpec
    low: float
    high: float
    log: bool = False

    def coordinate(self, value: Any) -> float | None:
        """Where `value` stands on this axis; None when it does not."""
        if self.spec.kind == "choice":
            texts = [json.dumps(option, sort_keys=True) for option in self.spec.options]
            text = json.dumps(value, sort_keys=True)
            return texts.index(text) if text in texts else None
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return None
        return min(max(value, self.low), self.high)

    def value(self, coordinate: float) -> Any:
        """The parameter value at a coordinate."""
        if self.spec.kind == "choice":
            return self.spec.options[int(coordinate)]
        return self.spec.project(round(coordinate) if self.spec.integer else float(f"{coordinate:.6g}"))

    def spread(self, share: float) -> float:
        """The coordinate a share (0 to 1) of the way along."""
        if self.spec.kind == "choice" or self.spec.integer:
            return min(int(self.low + share * (self.high - self.low + 1)), self.high)
        if self.log:
            return self.low * (self.high / self.low) ** share
        return self.low + share * (self.high - self.low)


def axis_of(context: ProposeContext, spec: ParameterSpec) -> Axis | None:
    """The axis of a number or choice; None for another kind, and for one that cannot vary."""
    value = current_value(context, spec)
    if spec.kind == "choice":
        return Axis(spec, 0, len(spec.options) - 1) if len(spec.options) > 1 else None
    if spec.kind != "number" or isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    low, high = bounds(spec, value)
    if not low < high:
        return None
    return Axis(spec, low, high, log=not spec.integer and low > 0 and high / low >= _LOG_SPAN)


Point = tuple[float, ...]


def observations(context: ProposeContext, axes: Sequence[Axis]) -> list[tuple[Point, float]]:
    """Measured settings and their scores, the parent's last; texts' share of the scores is taken out."""
    line = _Line(context)
    found: list[tuple[Point, float]] = []
    for past in context.history:
        score = line.worth(past.candidate_hash) if touches(past, context.specs) else None
        point = _point(axes, line.values(past.candidate_hash))
        if score is not None and point is not None:
            found.append((point, score))
    here = _point(axes, {axis.spec.name: current_value(context, axis.spec) for axis in axes})
    score = line.worth(context.parent.hash)
    if here is not None and score is not None and line.compared:
        found.append((here, score))
    return found


def _point(axes: Sequence[Axis], values: Mapping[str, Any]) -> Point | None:
    found = [axis.coordinate(values.get(axis.spec.name, axis.spec.default)) for axis in axes]
    return None if any(place is None for place in found) else tuple(place for place in found if place is not None)


class _Line:
    """Values and scores along lines of parents. A hash that no proposal made is the baseline's."""

    def __init__(self, context: ProposeContext) -> None:
        self._context = context
        self._made = {past.candidate_hash: past for past in context.history}
        self._values: dict[str, dict[str, Any]] = {}
        self._worth: dict[str, float | None] = {}
        for past in context.history:  # oldest first, so a parent is known before its children
            self._values[past.candidate_hash] = {**self.values(past.parent_hash), **_set(past)}
            before, change = self.worth(past.parent_hash), self._change(past)
            self._worth[past.candidate_hash] = None if before is None or change is None else before + change

    @property
    def compared(self) -> bool:
        """Whether anything says how the parent does beside the others; scores by themselves do not."""
        context = self._context
        paired = any(past.screen_parent is not None for past in context.history)
        return paired or bool(context.rollouts) or context.parent.hash in self._made

    def values(self, candidate: str) -> dict[str, Any]:
        """Every number and choice that differs from its default."""
        return self._values.get(candidate, {})

    def worth(self, candidate: str) -> float | None:
        """What the numbers and choices of a candidate gained over the baseline's; None when it was not measured."""
        return self._worth.get(candidate, 0.0)

    def _change(self, past: PastProposal) -> float | None:
        if not touches(past, self._context.specs):
            return 0.0  # whatever it gained, it was not by a number or a choice
        parent = self._made.get(past.parent_hash)
        if past.validation is not None and parent is not None and parent.validation is not None:
            return past.validation - parent.validation
        paired = gain(past)  # on the same examples, which matters more than their number
        if paired is not None:
            return paired
        score = measured(past)
        return None if score is None else score - self._level(past.parent_hash)

    def _level(self, candidate: str) -> float:
        made = self._made.get(candidate)
        score = None if made is None else measured(made)
        if score is not None:
            return score
        rows = [rollout.row.score for rollout in self._context.rollouts]
        return sum(rows) / len(rows) if rows and candidate == self._context.parent.hash else 0.0


def _set(past: PastProposal) -> dict[str, Any]:
    return {data["name"]: data["value"] for data in map(_data, past.update.edits) if "value" in data}


def _data(edit: Any) -> dict[str, Any]:
    return edit.to_dict() if edit.kind in ("set_number", "set_choice") else {}


def _update(context: ProposeContext, axes: Sequence[Axis], point: Point, why: str) -> Update | None:
    """The edits of those parameters whose value differs from the parent's; None when none does."""
    wanted = [(axis.spec, axis.value(place)) for axis, place in zip(axes, point, strict=True)]
    changed = [(spec, value) for spec, value in wanted if value != current_value(context, spec)]
    shown = ", ".join(f"{spec.name} = {value!r}" for spec, value in changed)
    edits = tuple(set_value(spec, value) for spec, value in changed)
    return Update(edits, f"{why} suggests {shown}", Tpe.name) if edits else None


def _even(context: ProposeContext, axes: Sequence[Axis], place: int) -> Point:
    """Point number `place` of an additive sequence (each axis steps by a power of one irrational), shifted by seed."""
    root = 2.0
    for _ in range(40):  # x^(d+1) = x + 1: the golden ratio and its kin in more dimensions
        root = (1.0 + root) ** (1.0 / (len(axes) + 1))
    rng = seeded("tpe.even", context.seed, context.iteration, context.parent.hash)
    shares = [(rng.random() + (place + 1) * root ** -(turn + 1)) % 1.0 for turn in range(len(axes))]
    return tuple(axis.spread(share) for axis, share in zip(axes, shares, strict=True))


class _Suggestions:
    """An Optuna study in memory, filled with what was measured; made anew for every call."""

    def __init__(self, context: ProposeContext, axes: Sequence[Axis], seen: Sequence[tuple[Point, float]]) -> None:
        import optuna

        self._optuna = optuna
        self._context = context
        self._axes = axes
        self._space = {axis.spec.name: self._distribution(axis) for axis in axes}
        before = optuna.logging.get_verbosity()
        optuna.logging.set_verbosity(optuna.logging.ERROR)  # a new study says so on standard error
        try:
            self._study = optuna.create_study(direction="maximize", sampler=self._sampler(0))
        finally:
            optuna.logging.set_verbosity(before)
        for point, score in seen:
            self._tell(point, score)
        self._worst = min(score for _, score in seen)

    def next(self, place: int) -> Point:
        """Suggestion number `place`. It then counts as a bad one, so that the next keeps away from it."""
        self._study.sampler = self._sampler(place)
        trial = self._study.ask(self._space)
        point = tuple(float(trial.params[axis.spec.name]) for axis in self._axes)
        self._study.tell(trial, self._worst)
        return point

    def _sampler(self, place: int) -> Any:
        context = self._context
        seed = seed_number("tpe", context.seed, context.iteration, context.parent.hash, place)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Optuna 4 calls multivariate TPE experimental
            return self._optuna.samplers.TPESampler(seed=seed, multivariate=True, n_startup_trials=0)

    def _distribution(self, axis: Axis) -> Any:
        kinds = self._optuna.distributions
        if axis.spec.kind == "choice":
            return kinds.CategoricalDistribution(tuple(range(len(axis.spec.options))))
        if axis.spec.integer:
            return kinds.IntDistribution(round(axis.low), round(axis.high))
        return kinds.FloatDistribution(axis.low, axis.high, log=axis.log)

    def _tell(self, point: Point, score: float) -> None:
        params: dict[str, Any] = {
            axis.spec.name: place if axis.spec.kind == "number" and not axis.spec.integer else round(place)
            for axis, place in zip(self._axes, point, strict=True)
        }
        trial = self._optuna.trial.create_trial(params=params, distributions=self._space, value=score)
        self._study.add_trial(trial)

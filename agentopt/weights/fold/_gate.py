"""When a folded answer is trusted: recall of the facts and margin of the answer, against thresholds from validation.

Two levels. A fold that does not recall its facts is not accepted at all; an answer of an accepted fold that is hardly
better than the next one is not trusted. Either way the caller reads the facts in context instead, and says why: every
decision names the number and the threshold.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from agentopt.errors import UserError


@dataclass(frozen=True, slots=True)
class Decision:
    """Whether a fold, or one answer of it, is trusted."""

    accepted: bool
    reason: str
    """One sentence with the number and the threshold."""


@dataclass(frozen=True, slots=True)
class GateRow:
    """One validation question, answered by a fold and, where known, by the same facts in context."""

    recall: float
    """Of the fold."""
    margin: float
    """Of the folded answer."""
    folded: bool
    """The folded answer is right."""
    in_context: bool | None = None
    """The answer from reading is right; None when nobody looked."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """What the thresholds were chosen from, and what they give there."""

    rows: int
    folded: float
    """Accuracy when every folded answer is taken."""
    in_context: float | None
    """Accuracy when everything is read; None when it is not known."""
    gated: float
    """Accuracy with the gate: what it turns away is read; see `calibrate` for rows where reading is not known."""
    fallbacks: float
    """Share of the rows that the gate turns away."""

    @property
    def sentence(self) -> str:
        """All of it for people."""
        reading = "not measured" if self.in_context is None else f"{self.in_context:.1%}"
        return (
            f"on {self.rows} validation questions: folded {self.folded:.1%}, in context {reading}, gated "
            f"{self.gated:.1%} with {self.fallbacks:.1%} of the questions read in context"
        )


@dataclass(frozen=True, slots=True)
class Gate:
    """Thresholds.

    Attributes:
        recall: least recall of a fold: mean over its facts of the probability per token, exp(-mean NLL).
        margin: least log-probability by which an answer beats the next one.
        calibration: where they come from; None when somebody set them.
    """

    recall: float = 0.5
    margin: float = 0.0
    calibration: Calibration | None = None

    def __post_init__(self) -> None:
        if math.isnan(self.recall) or math.isnan(self.margin):
            raise UserError(f"gate: found recall {self.recall} and margin {self.margin}, expected numbers.")

    @classmethod
    def open(cls) -> Gate:
        """Lets everything pass that is a number."""
        return cls(recall=-math.inf, margin=-math.inf)

    def adapter(self, recall: float, base: float | None = None) -> Decision:
        """Whether a fold is trusted at all.

        Args:
            recall: of its facts.
            base: recall of the same facts before folding, for the sentence.
        """
        lift = "" if base is None else f" ({base:.2f} before folding)"
        if not math.isfinite(recall):
            return Decision(False, f"the recall of the facts is {recall}, not a number: the facts are read in context")
        if recall < self.recall:
            return Decision(
                False,
                f"the fold recalls its facts with {recall:.3f}{lift}, below the gate's {self.recall:.3f}: "
                "the facts are read in context",
            )
        return Decision(
            True, f"the fold recalls its facts with {recall:.3f}{lift}, the gate asks for {self.recall:.3f}"
        )

    def decide(self, recall: float, margin: float | None = None) -> Decision:
        """Whether an answer is trusted; without a margin, whether the fold is."""
        decision = self.adapter(recall)
        if not decision.accepted or margin is None:
            return decision
        if math.isnan(margin):
            return Decision(False, "the answer's margin is not a number: the facts are read in context")
        if margin < self.margin:
            return Decision(
                False,
                f"the answer beats the next one by {margin:.3f}, below the gate's {self.margin:.3f}: "
                "the facts are read in context",
            )
        return Decision(
            True,
            f"recall {recall:.3f} and margin {margin:.3f} reach the gate's {self.recall:.3f} and {self.margin:.3f}",
        )

    def to_dict(self) -> dict[str, Any]:
        """For a JSON file; infinite thresholds become null."""
        return {
            "recall": self.recall if math.isfinite(self.recall) else None,
            "margin": self.margin if math.isfinite(self.margin) else None,
            "calibration": None if self.calibration is None else asdict(self.calibration),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Gate:
        """What `to_dict` gave.

        Raises:
            UserError: something else.
        """
        try:
            limits = [values[name] for name in ("recall", "margin")]
            found = values.get("calibration")
            calibration = None if found is None else Calibration(**found)
            recall, margin = (-math.inf if limit is None else float(limit) for limit in limits)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"gate: found {values!r}, expected recall, margin and calibration ({type(error).__name__}: {error})."
            ) from error
        return cls(recall, margin, calibration)


def recall_of(nll: Sequence[float]) -> float:
    """Recall of a fold from each fact's mean negative log-likelihood per token: the mean of exp(-nll)."""
    if not nll:
        raise UserError("recall: found no facts, expected at least one.")
    return sum(math.exp(-one) for one in nll) / len(nll)


def lift(recall: float, base: float) -> float:
    """How much of what the base did not know is now recalled: 0 for nothing, 1 for all, below 0 when it got worse."""
    return (recall - base) / (1 - base) if base < 1 else 0.0


def calibrate(rows: Sequence[GateRow]) -> Gate:
    """The thresholds under which most validation answers are right; of equal ones those with the fewest fallbacks.

    A row that is turned away counts as its in-context answer. Rows whose in-context answer is unknown count with the
    share of right ones among the known; when none is known, a turned away row counts half: turning away is then right
    where folded answers are wrong more often than right.

    Thresholds lie between observed values (recalls are thinned to 64 cuts). Where all folds pass, the recall threshold
    lies below the lowest by half of what lies between lowest and highest: far below anything that was validated, a fold
    is not trusted. The result is the best on these rows; on others it is only as good as these rows are many.

    Raises:
        UserError: no rows, or a recall that is not a number.
    """
    if not rows:
        raise UserError("gate: found no validation rows, expected at least one to calibrate on.")
    if any(math.isnan(row.recall) for row in rows):
        raise UserError("gate: found a recall that is not a number; such a fold is refused before any gate.")
    known = [row.in_context for row in rows if row.in_context is not None]
    share = sum(known) / len(known) if known else 0.5
    sorted_rows = sorted((_Point.of(row, share) for row in rows), key=lambda one: (-one.margin, -one.recall))
    best = max((_best_margin(sorted_rows, limit) for limit in _recall_cuts(rows)), key=lambda one: one.merit)
    calibration = Calibration(
        rows=len(rows),
        folded=sum(row.folded for row in rows) / len(rows),
        in_context=share if known else None,
        gated=best.right / len(rows),
        fallbacks=1 - best.passed / len(rows),
    )
    return Gate(best.recall, best.margin, calibration)


@dataclass(frozen=True, slots=True)
class _Point:
    """A row with what it is worth when its fold is taken and when its facts are read."""

    recall: float
    margin: float
    folded: float
    reading: float

    @classmethod
    def of(cls, row: GateRow, share: float) -> _Point:
        # A margin that is no number never passes.
        margin = -math.inf if math.isnan(row.margin) else row.margin
        return cls(row.recall, margin, float(row.folded), share if row.in_context is None else float(row.in_context))


@dataclass(frozen=True, slots=True)
class _Cut:
    """A pair of thresholds and what it gives."""

    recall: float
    margin: float
    right: float
    passed: int

    @property
    def merit(self) -> tuple[float, int]:
        # Sums of shares in another order differ in their last digits.
        return round(self.right, 9), self.passed


def _recall_cuts(rows: Sequence[GateRow]) -> list[float]:
    """Thresholds of the recall: all rows pass, then between the values, then none passes."""
    values = sorted({row.recall for row in rows})
    between = [(low + high) / 2 for low, high in itertools.pairwise(values)]
    every = max(0.0, values[0] - (values[-1] - values[0]) / 2)
    return [every, *between[:: math.ceil(len(between) / 64) or 1], math.nextafter(values[-1], math.inf)]


def _best_margin(points: Sequence[_Point], limit: float) -> _Cut:
    """The best margin threshold for this recall threshold; points come with falling margins."""
    right = sum(point.reading for point in points)
    passing = [point for point in points if point.recall >= limit and point.margin > -math.inf]
    # That nothing passes is left to the highest recall threshold: an infinite margin passes every other.
    best = _Cut(limit, 0.0, -1.0 if passing else right, 0)
    for number, point in enumerate(passing):
        right += point.folded - point.reading
        after = passing[number + 1].margin if number + 1 < len(passing) else -math.inf
        if point.margin == after:
            continue
        # Below the last one that has a margin everything passes: 0 is then the plainest number that says so.
        middle = min(0.0, point.margin) if after == -math.inf else (min(point.margin, after + 1) + after) / 2
        best = max(best, _Cut(limit, middle, right, number + 1), key=lambda one: one.merit)
    return best

"""Is the capsule's score shown to be no more than a margin below the original's, on the same examples?

The unit is a paired difference d = score(capsule) - score(original), in shares of the score's range, so -1 <= d <= 1.
The lower bound of its mean is that of Gaffke (2005): the quantile of the randomly weighted mean of the differences
*and of one more, unseen, difference of -1*, the weights uniform on the simplex. With all pairs tied it is the exact
binomial bound on flips that were not seen; for 0/1 scores without gains it is Clopper and Pearson's. So few rows, few
flips, skewed scores and ties need no case of their own. `benchmarks/capsule_gate.py` counts its false accepts, beside
those of the BCa bootstrap and of the bounds of Newcombe and Tango, which accept more often than they promise there.

Correlated rows (one document, equal inputs) are one unit: weights go to units, and the unseen one is as large as the
largest seen.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from agentopt.errors import UserError

Floats = NDArray[np.float64]
Verdict = Literal["accepted", "rejected", "undecided"]
METHOD = "paired bound with one unseen worst case (Gaffke)"
BETS = "paired bets, looked at after every unit (Waudby-Smith and Ramdas)"
_NORMAL = NormalDist()
_FEW = 64
"""Up to this many different units the weights are drawn per kind of unit, and more of them."""
_DRAWS, _DRAWS_FEW = 10_000, 50_000
_CHUNK = 2_000_000


@dataclass(frozen=True, slots=True)
class Units:
    """What is resampled: per independent unit the sum of its differences and its number of rows."""

    sums: Floats
    sizes: Floats

    @property
    def rows(self) -> int:
        """Rows in all units."""
        return int(self.sizes.sum())

    @property
    def difference(self) -> float:
        """Mean difference over rows."""
        return float(self.sums.sum() / self.sizes.sum())

    @property
    def spread(self) -> float:
        """The flip rate that `rows_needed` wants: of 0/1 rows the share that flips, one flip more than were seen."""
        return float(((self.sums**2).sum() + 1) / (self.rows + 2))


def units_of(differences: Sequence[float] | Floats, groups: Sequence[Hashable] | None = None) -> Units:
    """Add differences up by group; without groups every row is a unit.

    Raises:
        UserError: no differences, some that are not numbers between -1 and 1, or another number of groups.
    """
    d = np.asarray(differences, dtype=np.float64).ravel()
    if d.size == 0:
        raise UserError("a paired bound needs at least one pair of scores; found none.")
    if not bool(np.isfinite(d).all()) or float(np.abs(d).max()) > 1 + 1e-9:
        raise UserError("paired differences must be numbers between -1 and 1; give the range of the scores.")
    if groups is None:
        return Units(d, np.ones(d.size))
    if len(groups) != d.size:
        raise UserError(f"each row needs its group; found {len(groups)} groups for {d.size} rows.")
    places: dict[Hashable, int] = {}
    index = np.array([places.setdefault(group, len(places)) for group in groups])
    return Units(np.bincount(index, weights=d).astype(np.float64), np.bincount(index).astype(np.float64))


@dataclass(frozen=True, slots=True)
class Bounds:
    """Mean difference with its one-sided bounds, and the p-value against "worse by the margin or more"."""

    difference: float
    lower: float
    upper: float
    p_value: float
    margin: float

    @property
    def verdict(self) -> Verdict:
        """`accepted` when harm beyond the margin is excluded, `rejected` when it is shown."""
        if self.lower > -self.margin:
            return "accepted"
        return "rejected" if self.upper < -self.margin else "undecided"


def bounds(units: Units, margin: float, *, confidence: float = 0.95, seed: int = 0) -> Bounds:
    """One-sided bounds of the mean difference, each at `confidence`.

    Args:
        units: paired differences.
        margin: how much worse is still acceptable.
        confidence: of each bound.
        seed: of the random weights; equal input gives equal bounds.
    """
    if not 0.0 < confidence < 1.0:
        raise UserError(f"confidence: found {confidence}, expected a number between 0 and 1.")
    worst, best = _weighted_means(units, np.random.default_rng(seed))
    draws = worst.size
    place = max(math.floor((1 - confidence) * (draws + 1)) - 1, 0)
    below = int((worst <= -margin).sum())
    return Bounds(
        difference=units.difference,
        lower=float(np.partition(worst, place)[place]),
        upper=float(np.partition(best, draws - 1 - place)[draws - 1 - place]),
        p_value=(below + 1) / (draws + 1),
        margin=margin,
    )


def _weighted_means(units: Units, rng: np.random.Generator) -> tuple[Floats, Floats]:
    """Randomly weighted means with one more unit that is all losses, and with one that is all gains."""
    kinds, counts = np.unique(np.stack([units.sums, units.sizes]), axis=1, return_counts=True)
    draws = _DRAWS_FEW if counts.size <= _FEW else _DRAWS
    largest = float(units.sizes.max())
    worst, best = np.empty(draws), np.empty(draws)
    step = max(1, _CHUNK // counts.size)
    for start in range(0, draws, step):
        stop = min(start + step, draws)
        weights = rng.standard_gamma(counts.astype(np.float64), size=(stop - start, counts.size))
        unseen = rng.standard_exponential(stop - start) * largest
        total = weights @ kinds[0]
        rows = weights @ kinds[1] + unseen
        worst[start:stop] = (total - unseen) / rows
        best[start:stop] = (total + unseen) / rows
    return worst, best


def holm(p_values: Sequence[float], confidence: float = 0.95) -> list[float]:
    """The confidence at which each of several comparisons is decided so that none is accepted falsely (Holm 1979).

    The smallest p-value is held against alpha / k, the next against alpha / (k - 1), until one fails; the others are
    decided where that one failed.
    """
    alpha, k = 1 - confidence, len(p_values)
    levels = [confidence] * k
    level, failed = alpha, False
    for rank, index in enumerate(sorted(range(k), key=lambda place: p_values[place])):
        if not failed:
            level = alpha / (k - rank)
            failed = p_values[index] > level
        levels[index] = 1 - level
    return levels


# ---- how many rows


def needed(margin: float, flip_rate: float, *, confidence: float = 0.95, power: float = 0.8) -> int:
    """Rows by the normal approximation at true difference 0: `(z_confidence + z_power)^2 * flip_rate / margin^2`.

    `flip_rate` is the share of rows whose 0/1 score changes; for graded scores the mean squared difference.
    """
    z = _quantiles(margin, flip_rate, confidence, power)
    return math.ceil(z * z * flip_rate / margin**2 - 1e-9)


def rows_needed(margin: float, flip_rate: float, *, confidence: float = 0.95, power: float = 0.8) -> int:
    """Rows that this module's bound needs: as `needed`, and what the unseen worst case takes.

    The bound lies `z * spread / sqrt(n)` and the weight of some `unseen` worst cases below the mean. Without any flip
    their number follows from `(1 - margin)^n < 1 - confidence`; with many it is one. In between it is fitted to the
    exact power for margins of 0.02 to 0.1 and flips of 1 to 40 %, where 80 % power is met within 4 % of the rows.
    """
    a = _quantiles(margin, flip_rate, confidence, power) * math.sqrt(flip_rate)
    unseen = 1 + (-math.log(1 - confidence) - 1) / (1 + 4 * flip_rate / margin)
    root = (a + math.sqrt(a * a + 4 * margin * unseen)) / (2 * margin)
    return math.ceil(root * root - 1e-9)


def _quantiles(margin: float, flip_rate: float, confidence: float, power: float) -> float:
    if not 0 < margin < 1:
        raise UserError(f"margin: found {margin}, expected a number between 0 and 1.")
    if flip_rate < 0:
        raise UserError(f"flip rate: found {flip_rate}, expected 0 or more.")
    return round(_NORMAL.inv_cdf(confidence), 3) + round(_NORMAL.inv_cdf(power), 3)  # as tables print them


# ---- stopping early


FRACTIONS = (0.02, 0.04, 0.07, 0.1, 0.15, 0.2, 0.3, 0.45, 0.65, 0.85, 1.0)
"""Shares of the capital that are wagered; the capital is split over them evenly."""
_FRACTIONS = np.array(FRACTIONS)


class Wager:
    """A bet against harm that may be looked at after every unit (Waudby-Smith & Ramdas 2024, arXiv 2010.09686).

    A gambler who bets that the capsule is *not* worse by the margin cannot expect to win where it is; so a capital of
    `1 / (1 - confidence)` times the first stake, whenever it comes, is evidence at that confidence however often one
    looked (Ville's inequality). The stakes are fixed shares of the capital, mixed, so that the order of the units
    before a look does not matter. A second gambler bets on harm.

    Args:
        margin: how much worse is still acceptable.
        confidence: of each of the two verdicts.
        largest: rows of the largest unit that may come; fixed before the first.
    """

    def __init__(self, margin: float, *, confidence: float = 0.95, largest: float = 1.0) -> None:
        self.margin = margin
        self.confidence = confidence
        self.largest = largest
        self.verdict: Verdict = "undecided"
        self.lower, self.upper = -1.0, 1.0
        self._limit = -math.log(1 - confidence)
        self._sums: list[float] = []
        self._sizes: list[float] = []
        self._fair = np.zeros(len(FRACTIONS))
        self._harm = np.zeros(len(FRACTIONS))

    def add(self, total: float, rows: float = 1.0) -> Verdict:
        """Take in one unit: the sum of its differences and its number of rows. A verdict, once reached, stands."""
        if rows > self.largest or abs(total) > rows * (1 + 1e-9):
            raise UserError(f"a unit of {rows:g} rows with sum {total:g} is beyond what was announced.")
        self._sums.append(total)
        self._sizes.append(rows)
        if self.verdict == "undecided":
            self._fair += self._gain(total, rows, -self.margin)
            self._harm += self._gain(-total, rows, self.margin)
            if _mixed(self._fair) >= self._limit:
                self.verdict = "accepted"
            elif _mixed(self._harm) >= self._limit:
                self.verdict = "rejected"
            if self.verdict != "undecided":
                self.look()
        return self.verdict

    @property
    def evidence(self) -> float:
        """Log of the capital won against "worse by the margin or more" (0 when there is none)."""
        return max(_mixed(self._fair), 0.0)

    def look(self) -> tuple[float, float]:
        """The bounds of the mean difference so far; they only ever narrow."""
        if self._sums:
            sums, sizes = np.array(self._sums), np.array(self._sizes)
            self.lower = max(self.lower, self._bound(sums, sizes))
            self.upper = min(self.upper, -self._bound(-sums, sizes))
        return self.lower, self.upper

    def _gain(self, total: float | Floats, rows: float | Floats, at: float) -> Floats:
        """Log growth for each share wagered, against "the mean difference is `at` or less"."""
        stake = (np.asarray(total) - at * np.asarray(rows)) / ((1 + at) * self.largest)
        with np.errstate(divide="ignore"):  # a total loss at a full stake: that share of the capital is gone
            return np.log(np.maximum(1 + np.multiply.outer(stake, _FRACTIONS), 0.0))

    def _bound(self, sums: Floats, sizes: Floats) -> float:
        low, high = -1.0 + 1e-9, 1.0
        for _ in range(30):
            middle = (low + high) / 2
            if _mixed(self._gain(sums, sizes, middle).sum(axis=0)) >= self._limit:
                low = middle
            else:
                high = middle
        return low


def _mixed(logs: Floats) -> float:
    """Log of the mean of the capitals."""
    top = float(logs.max())
    return top if math.isinf(top) else top + math.log(float(np.exp(logs - top).mean()))

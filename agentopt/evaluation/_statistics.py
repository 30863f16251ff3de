"""Paired statistics on per-example scores: intervals, tests, and what a sample of this size can show at all.

Every function takes *paired differences* (tuned minus baseline, one number per example, mean over repeats) or the
counts made from them. All draws are seeded, so a report can be recomputed digit for digit. Written with numpy only;
`tests/evaluation/test_statistics.py` checks each against scipy.

Sources: Efron (1987) for the BCa interval; McNemar (1947), exact form; Wilcoxon (1945), with the exact conditional
distribution for ties; Phipson & Smyth (2010) for the +1 correction of Monte-Carlo permutation p-values;
Clopper & Pearson (1934) for the binomial bound.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from agentopt.errors import UserError

Floats = NDArray[np.float64]
Values = Sequence[float] | Floats
Alternative = Literal["two-sided", "less", "greater"]

EXACT_SIGN_FLIP = 16  # up to 2**16 sign patterns are enumerated
EXACT_WILCOXON = 60  # exact null distribution up to this many non-zero differences
_NORMAL = NormalDist()
_CHUNK = 2_000_000  # numbers drawn at once, so that memory stays near 16 MB


@dataclass(frozen=True, slots=True)
class TestResult:
    """One paired comparison: what was measured, the test that was used, and its two-sided p-value."""

    __test__ = False  # the name starts with "Test"; pytest must not collect it

    n: int
    mean_a: float
    mean_b: float
    difference: float
    interval: tuple[float, float]
    p_value: float
    test: str
    wins: int
    losses: int

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, ready for the store."""
        return {
            "n": self.n,
            "mean_a": self.mean_a,
            "mean_b": self.mean_b,
            "difference": self.difference,
            "interval": list(self.interval),
            "p_value": self.p_value,
            "test": self.test,
            "wins": self.wins,
            "losses": self.losses,
        }


def _clean(values: Values) -> Floats:
    array = np.asarray(values, dtype=np.float64).ravel()
    if not bool(np.isfinite(array).all()):
        raise UserError("scores must be finite numbers; found NaN or infinity")
    return array


def bootstrap_interval(
    diffs: Values, confidence: float = 0.95, resamples: int = 9999, seed: int = 0
) -> tuple[float, float]:
    """BCa bootstrap interval for the mean of `diffs` (Efron 1987), seeded.

    Degenerate samples have no spread to resample: a single value, or all values equal, gives `(mean, mean)`. Such an
    interval says nothing about certainty, so callers combine it with a test and with a minimum sample size.

    Raises:
        UserError: no values, a value that is not finite, or a confidence outside (0, 1).
    """
    x = _clean(diffs)
    if x.size == 0:
        raise UserError("an interval needs at least one pair of scores; found none")
    if not 0.0 < confidence < 1.0:
        raise UserError(f"confidence must lie between 0 and 1; found {confidence}")
    mean = float(x.mean())
    if x.size == 1 or float(np.ptp(x)) == 0.0:
        return mean, mean
    means = np.sort(_bootstrap_means(x, resamples, np.random.default_rng(seed)))
    # Ties with the observed mean count half: 0/1 scores make many, and a one-sided count would shift the interval.
    tolerance = 1e-12 * max(1.0, abs(mean))
    below = int(np.searchsorted(means, mean - tolerance, side="left"))
    up_to = int(np.searchsorted(means, mean + tolerance, side="right"))
    share = min(max((below + up_to) / (2 * resamples), 0.5 / resamples), 1 - 0.5 / resamples)
    bias = _NORMAL.inv_cdf(share)
    deviations = x - mean  # jackknife of a mean: proportional to the deviations
    spread = float((deviations**2).sum())
    acceleration = float((deviations**3).sum()) / (6.0 * spread**1.5)
    ends: list[float] = []
    for tail in ((1 - confidence) / 2, (1 + confidence) / 2):
        z = bias + _NORMAL.inv_cdf(tail)
        denominator = 1.0 - acceleration * z
        level = tail if denominator <= 0 else _NORMAL.cdf(bias + z / denominator)
        ends.append(float(np.quantile(means, level)))
    return ends[0], ends[1]


def _bootstrap_means(x: Floats, resamples: int, rng: np.random.Generator) -> Floats:
    values, counts = np.unique(x, return_counts=True)
    if values.size <= 16:  # few distinct scores: resampling rows is one multinomial draw
        draws = rng.multinomial(x.size, counts / x.size, size=resamples)
        return (draws @ values) / x.size
    means = np.empty(resamples)
    step = max(1, _CHUNK // x.size)
    for start in range(0, resamples, step):
        stop = min(start + step, resamples)
        means[start:stop] = x[rng.integers(0, x.size, size=(stop - start, x.size))].mean(axis=1)
    return means


def sign_flip_test(diffs: Values, seed: int = 0, resamples: int = 20_000) -> float:
    """Two-sided sign-flip permutation p-value for "the mean difference is zero".

    Exact over all sign patterns when at most 16 differences are non-zero, otherwise `resamples` seeded patterns with
    the +1 correction, so p is never zero. No non-zero difference gives 1.0.
    """
    x = _clean(diffs)
    x = x[x != 0]
    if x.size == 0:
        return 1.0
    observed = abs(float(x.sum()))
    edge = observed - 1e-9 * max(1.0, observed)  # sums of equal terms in another order differ in the last bits
    if x.size <= EXACT_SIGN_FLIP:
        sums = np.zeros(1)
        for value in x:
            sums = np.concatenate((sums + value, sums - value))
        return float((np.abs(sums) >= edge).mean())
    rng = np.random.default_rng(seed)
    hits = 0
    step = max(1, _CHUNK // x.size)
    for start in range(0, resamples, step):
        rows = min(step, resamples - start)
        signs = rng.integers(0, 2, size=(rows, x.size), dtype=np.int8) * np.int8(2) - np.int8(1)
        hits += int((np.abs(signs @ x) >= edge).sum())
    return (hits + 1) / (resamples + 1)


def mcnemar_exact(b: int, c: int) -> float:
    """Exact two-sided McNemar p-value from the discordant counts `b` (only one right) and `c` (only the other)."""
    if b < 0 or c < 0:
        raise UserError(f"discordant counts cannot be negative; found {b} and {c}")
    n = b + c
    if n == 0:
        return 1.0
    tail = sum(math.comb(n, k) for k in range(min(b, c) + 1))
    return min(1.0, 2 * tail / 2**n)


def wilcoxon(diffs: Values, alternative: Alternative = "two-sided") -> float:
    """Wilcoxon signed-rank p-value; zeros are dropped and ties share their mean rank.

    Up to 60 non-zero differences the conditional null distribution is exact, ties included; beyond that the normal
    approximation with tie correction. "less" asks whether the differences lie below zero.
    """
    x = _clean(diffs)
    x = x[x != 0]
    n = int(x.size)
    if n == 0:
        return 1.0
    ranks = _mid_ranks(np.abs(x))
    plus = float(ranks[x > 0].sum())
    if n <= EXACT_WILCOXON:
        lower, upper = _exact_rank_tails(ranks, plus)
    else:
        spread = math.sqrt(float((ranks**2).sum()) / 4)
        z = (plus - float(ranks.sum()) / 2) / spread
        lower, upper = _NORMAL.cdf(z), _NORMAL.cdf(-z)
    if alternative == "less":
        return lower
    if alternative == "greater":
        return upper
    return min(1.0, 2 * min(lower, upper))


def _mid_ranks(magnitudes: Floats) -> Floats:
    # Differences of decimal scores that ought to tie differ in the last bits; round before ranking.
    _, inverse, counts = np.unique(np.round(magnitudes, 12), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return ((last - counts + 1 + last) / 2.0)[inverse]


def _exact_rank_tails(ranks: Floats, plus: float) -> tuple[float, float]:
    doubled = np.rint(ranks * 2).astype(np.int64)  # mid-ranks are halves: doubled they are whole
    ways = np.zeros(int(doubled.sum()) + 1)
    ways[0] = 1.0
    for rank in doubled:
        shifted = np.zeros_like(ways)
        shifted[rank:] = ways[: ways.size - rank]
        ways = (ways + shifted) / 2
    at = round(plus * 2)
    return min(1.0, float(ways[: at + 1].sum())), min(1.0, float(ways[at:].sum()))


def paired_test(a: Values, b: Values, *, seed: int = 0, confidence: float = 0.95) -> TestResult:
    """Compare two programs on the same examples: `a` the baseline's scores, `b` the tuned program's.

    Scores that are all 0 or 1 get the exact McNemar test, others the sign-flip permutation test. The difference is
    `mean(b) - mean(a)` with its BCa interval.

    Raises:
        UserError: the two lists differ in length or are empty.
    """
    left, right = _clean(a), _clean(b)
    if left.size != right.size:
        raise UserError(f"paired scores must have equal length; found {left.size} and {right.size}")
    if left.size == 0:
        raise UserError("a paired test needs at least one pair of scores; found none")
    diffs = right - left
    wins, losses = int((diffs > 0).sum()), int((diffs < 0).sum())
    binary = bool(np.isin(left, (0.0, 1.0)).all() and np.isin(right, (0.0, 1.0)).all())
    p_value = mcnemar_exact(wins, losses) if binary else sign_flip_test(diffs, seed=seed)
    return TestResult(
        n=int(left.size),
        mean_a=float(left.mean()),
        mean_b=float(right.mean()),
        difference=float(diffs.mean()),
        interval=bootstrap_interval(diffs, confidence=confidence, seed=seed),
        p_value=p_value,
        test="exact McNemar" if binary else "sign-flip permutation",
        wins=wins,
        losses=losses,
    )


def smallest_detectable_difference(n: int, discordant: float = 0.2) -> float:
    """Difference in means that `n` paired 0/1 rows show with 80 % power: `2.8 * sqrt(discordant / n)`.

    `discordant` is the share of rows on which the two programs disagree. n=50 gives 0.177, 150 gives 0.102.
    """
    if n < 1:
        raise UserError(f"the number of rows must be at least 1; found {n}")
    if not 0.0 <= discordant <= 1.0:
        raise UserError(f"the discordant share must lie in 0..1; found {discordant}")
    return 2.8 * math.sqrt(discordant / n)


def binomial_lower_bound(hits: int, n: int, confidence: float = 0.99) -> float:
    """One-sided Clopper-Pearson lower bound on a rate after `hits` in `n` trials (0.0 when there was none).

    Used by the simulation that checks the false-claim rate: the rate is above its limit only when this bound is.
    """
    if not 0 <= hits <= n or n < 1:
        raise UserError(f"need 0 <= hits <= n and n >= 1; found {hits} of {n}")
    if hits == 0:
        return 0.0
    low, high = 0.0, hits / n
    for _ in range(100):
        rate = (low + high) / 2
        if _upper_tail(hits, n, rate) < 1 - confidence:
            low = rate
        else:
            high = rate
    return low


def _upper_tail(hits: int, n: int, rate: float) -> float:
    if rate <= 0.0:
        return 0.0
    if rate >= 1.0:
        return 1.0
    log_p, log_q = math.log(rate), math.log1p(-rate)
    whole = math.lgamma(n + 1)
    terms = (
        math.exp(whole - math.lgamma(k + 1) - math.lgamma(n - k + 1) + k * log_p + (n - k) * log_q)
        for k in range(hits, n + 1)
    )
    return min(1.0, math.fsum(terms))

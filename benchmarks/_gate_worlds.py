"""Simulated pairs with a known true difference, and the bounds that others would put on it.

A world draws paired differences d = score(capsule) - score(original), with the document each row is from where rows are
correlated. Its true mean is exact by construction, so that a false accept is a count and not an opinion.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from agentopt.capsules.gating._noninferior import bounds, units_of
from agentopt.evaluation import binomial_lower_bound, bootstrap_interval

Floats = NDArray[np.float64]
Draw = Callable[[np.random.Generator, int, float], tuple[Floats, NDArray[np.int64] | None]]
Z = NormalDist().inv_cdf(0.95)


@dataclass(frozen=True)
class World:
    """`draw(rng, n, mean)` gives n differences whose true mean is `mean`, and their documents."""

    name: str
    draw: Draw
    kind: str
    """binary, two-valued or graded; two-valued and binary samples repeat, so their bounds are looked up."""


def flips(rate: float) -> Draw:
    """0/1 scores; the smaller of gains and losses has this rate less the difference."""

    def draw(rng: np.random.Generator, n: int, mean: float) -> tuple[Floats, None]:
        gain = max((rate + mean) / 2, 0.0)
        return rng.choice([1.0, -1.0, 0.0], p=[gain, gain - mean, 1 - 2 * gain + mean], size=n), None

    return draw


def graded(spread: float) -> Draw:
    """Continuous differences, symmetric about their mean (a stretched beta distribution)."""

    def draw(rng: np.random.Generator, n: int, mean: float) -> tuple[Floats, None]:
        return mean + spread * (2 * rng.beta(3, 3, size=n) - 1), None

    return draw


def rare_losses(gain: float) -> Draw:
    """Nearly always a small gain, rarely a total loss."""

    def draw(rng: np.random.Generator, n: int, mean: float) -> tuple[Floats, None]:
        p = (gain - mean) / (1 + gain)
        return np.where(rng.random(n) < p, -1.0, gain), None

    return draw


def rare_gains(loss: float) -> Draw:
    """Nearly always a small loss, rarely a large gain."""

    def draw(rng: np.random.Generator, n: int, mean: float) -> tuple[Floats, None]:
        p = (loss + mean) / (1 + loss)
        return np.where(rng.random(n) < p, 1.0, -loss), None

    return draw


def skewed_graded(rate: float) -> Draw:
    """A share of rows loses an amount with a long tail, the others gain a little."""

    def draw(rng: np.random.Generator, n: int, mean: float) -> tuple[Floats, None]:
        lost = -rng.beta(0.6, 1.0, size=n)  # mean -0.375
        small = rng.uniform(0, 2, size=n) * (mean + rate * 0.375) / (1 - rate)
        return np.where(rng.random(n) < rate, lost, small), None

    return draw


def documents(share: float, even: bool) -> Draw:
    """0/1 flips of whole documents (all rows of a document flip together in `share` of the flips)."""

    def draw(rng: np.random.Generator, n: int, mean: float) -> tuple[Floats, NDArray[np.int64]]:
        rate = 0.1
        gain = max((rate + mean) / 2, 0.0)
        p = [gain, gain - mean, 1 - 2 * gain + mean]
        sizes: list[int] = []
        while sum(sizes) < n:
            sizes.append(5 if even else int(rng.integers(1, 10)))
        docs = np.repeat(np.arange(len(sizes)), sizes)
        whole = rng.choice([1.0, -1.0, 0.0], p=p, size=len(sizes))[docs]
        own = rng.choice([1.0, -1.0, 0.0], p=p, size=docs.size)
        together = (rng.random(len(sizes)) < share)[docs]
        return np.where(together, whole, own), docs

    return draw


WORLDS = (
    World("0/1, 5 % flip", flips(0.05), "binary"),
    World("0/1, 10 % flip", flips(0.10), "binary"),
    World("0/1, 20 % flip", flips(0.20), "binary"),
    World("rare total losses", rare_losses(0.01), "two-valued"),
    World("rare large gains", rare_gains(0.08), "two-valued"),
    World("graded, symmetric", graded(0.3), "graded"),
    World("graded, skewed", skewed_graded(0.2), "graded"),
    World("documents of 5 rows, flip together", documents(1.0, even=True), "documents"),
    World("documents of 1-9 rows, half flip together", documents(0.5, even=False), "documents"),
)


@cache
def _ours(key: tuple[tuple[float, int], ...], margin: float) -> str:
    return bounds(units_of(np.repeat([value for value, _ in key], [count for _, count in key])), margin).verdict


def ours(d: Floats, docs: NDArray[np.int64] | None, margin: float, kind: str) -> str:
    """The verdict of the gate; looked up where the sample was seen before."""
    if docs is None and kind != "graded":
        values, counts = np.unique(d, return_counts=True)
        return _ours(tuple(zip(values.tolist(), counts.tolist(), strict=True)), margin)
    return bounds(units_of(d, None if docs is None else docs.tolist()), margin).verdict


def accepts_bca(d: Floats, margin: float) -> bool:
    """The lower end of the 90 % BCa bootstrap interval, rows as units."""
    return bootstrap_interval(d, confidence=0.90, resamples=2000)[0] > -margin


def accepts_t(d: Floats, margin: float) -> bool:
    """The normal bound from the sample's standard deviation."""
    spread = float(d.std(ddof=1)) if d.size > 1 else 0.0
    return float(d.mean()) - Z * spread / math.sqrt(d.size) > -margin


def accepts_tango(d: Floats, margin: float) -> bool:
    """Tango's score test for paired proportions."""
    n, b, c = d.size, int((d > 0).sum()), int((d < 0).sum())
    half = -(b + c) - (2 * n - b + c) * margin
    q = (math.sqrt(max(half * half - 8 * n * c * margin * (1 + margin), 0.0)) - half) / (4 * n)
    variance = n * (2 * q - margin * (1 + margin))
    return variance > 0 and (b - c + n * margin) / math.sqrt(variance) >= Z


def accepts_newcombe(d: Floats, margin: float) -> bool:
    """Newcombe's hybrid score bound (method 10), with as many right answers as there can be."""
    n, b, c = d.size, int((d > 0).sum()), int((d < 0).sum())
    both = n - b - c
    old, new = (both + c) / n, (both + b) / n
    (_, old_high), (new_low, _) = _wilson(old, n), _wilson(new, n)
    cells = (both + c) * b * (both + b) * c
    phi = (0 - b * c) / math.sqrt(cells) if cells > 0 else 0.0
    below, above = new - new_low, old_high - old
    return (new - old) - math.sqrt(max(below**2 - 2 * phi * below * above + above**2, 0.0)) > -margin


def _wilson(p: float, n: int) -> tuple[float, float]:
    centre, spread = p + Z * Z / (2 * n), Z * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n))
    return (centre - spread) / (1 + Z * Z / n), (centre + spread) / (1 + Z * Z / n)


def exact_interval(hits: int, trials: int) -> tuple[float, float]:
    """95 % Clopper-Pearson interval of a rate."""
    return binomial_lower_bound(hits, trials, 0.975), 1 - binomial_lower_bound(trials - hits, trials, 0.975)


def exact_rate(accepted: Floats, n: int, gain: float, loss: float) -> float:
    """Chance of the accepted (gains, losses) among n rows."""
    gains, losses = np.nonzero(accepted)
    tied = n - gains - losses
    logs = np.array([math.lgamma(k + 1) for k in range(n + 1)])
    rates = [(gains, gain), (losses, loss), (tied, 1 - gain - loss)]
    total = logs[n] - logs[gains] - logs[losses] - logs[tied]
    possible = np.ones(gains.size, dtype=bool)
    for count, rate in rates:
        if rate <= 0:
            possible &= count == 0
        else:
            total = total + count * math.log(rate)
    return float(np.exp(total[possible]).sum())

"""Integer frequencies for the rANS coder: from counts, or from a generalized Gaussian on a grid.

A table from (nu, b, step) has to come out the same on every machine, to the last count. So its exponentials are made
of additions, multiplications and divisions of float64 alone, one numpy operation each, which IEEE 754 defines to the
last bit; a library's `exp` or `pow` is not. All sums are of integers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agentopt.weights.gg.archive._rans import Table

Array = NDArray[Any]

_LN2 = 0.6931471805599453
LARGEST_NU, FINEST = 64.0, 1e12
"""A table is computed for a shape up to the first, and a ratio of b and step up to the second either way."""
_POINTS = 8
_ZERO_POINTS = 64
_PEAK = float(1 << 30)


def from_counts(counts: Array, bits: int) -> Table | None:
    """The frequencies under which these counts take the fewest bits; None if more symbols occur than fit well."""
    whole = 1 << bits
    used = np.flatnonzero(counts)
    if len(used) > whole // 2 or not len(used):
        return None
    weight = counts[used].astype(np.float64)
    found = np.maximum(1, np.rint(weight * (whole / weight.sum()))).astype(np.int64)
    while (excess := int(found.sum()) - whole) != 0:
        # One count more or less where it costs least, many symbols at a time.
        if excess > 0:
            cost = np.where(found > 1, weight * np.log2(found / np.maximum(found - 1, 1)), np.inf)
        else:
            cost = -weight * np.log2((found + 1) / found)
        movable = int(np.isfinite(cost).sum())
        cheapest = np.argsort(cost, kind="stable")[: min(abs(excess), movable)]
        found[cheapest] -= 1 if excess > 0 else -1
    frequencies = np.zeros(len(counts), np.int64)
    frequencies[used] = found
    return Table(frequencies, bits)


def from_gg(nu: float, b: float, step: float, reach: int, bits: int) -> Table:
    """The table of `gg_masses`; every symbol has a frequency of 1 or more."""
    return from_masses(gg_masses(nu, b, step, reach), bits)


def from_masses(masses: Array, bits: int) -> Table:
    """`1 + mass (2^bits - symbols) // sum of masses`; what is left over goes to the symbol in the middle."""
    whole, symbols = 1 << bits, len(masses)
    frequencies = 1 + masses * (whole - symbols) // max(int(masses.sum()), 1)
    frequencies[symbols // 2] += whole - int(frequencies.sum())
    return Table(frequencies, bits)


def gg_masses(nu: float, b: float, step: float, reach: int) -> Array:
    """Masses of `exp(-(|x| / b)^nu)` in the cells of a grid, for the symbols `-reach` to `reach`, in this order.

    A mass is the mean density of the cell at 8 points times its width, of the middle cell at 64 points that lie denser
    toward 0, where a density with nu < 1 has its spike. Integers, 2^30 for the middle cell.
    """
    side, middle = _masses(nu, step / b, reach)
    unit = _PEAK / max(middle, 2.0**-30)
    return np.floor(np.concatenate([side[::-1], [middle], side]) * unit).astype(np.int64)


def fit_gg(magnitudes: Array, counts: Array) -> tuple[float, float]:
    """Shape and scale (in steps) of most likelihood for values on a grid, from how often each magnitude occurs.

    For a given nu, `b^nu = nu E|q|^nu`; nu is searched by golden section between 0.15 and 6. What is in the cell of 0
    counts as spread evenly over it: too rough for a coarse grid, but there a stored table is a few bytes long.
    """
    weight = counts / counts.sum()
    zero = float(weight[magnitudes == 0].sum())
    used = (magnitudes > 0) & (counts > 0)
    log_size, weight = np.log(magnitudes[used].astype(np.float64)), weight[used]
    if not len(weight):
        return 1.0, 0.1

    def scale(nu: float) -> float:
        moment = zero * 0.5**nu / (nu + 1) + float(np.dot(weight, np.exp(nu * log_size)))
        return math.exp(math.log(nu * moment) / nu)

    def loss(nu: float) -> float:
        return math.log(2 * scale(nu) / nu) + math.lgamma(1 / nu) + 1 / nu

    nu = _golden(loss, 0.15, 6.0, 24)
    return nu, scale(nu)


def _golden(loss: Callable[[float], float], low: float, high: float, rounds: int) -> float:
    """Where a function of one minimum is least."""
    ratio = (math.sqrt(5) - 1) / 2
    for _ in range(rounds):
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (low, right) if loss(left) < loss(right) else (left, high)
    return (low + high) / 2


def _masses(nu: float, scale: float, reach: int) -> tuple[Array, float]:
    """Of the cells 1 to `reach`, in widths of a cell, and of the one in the middle; the density at 0 is 1."""
    cells = np.arange(1, reach + 1, dtype=np.float64)
    offsets = (np.arange(_POINTS) + 0.5) / _POINTS - 0.5
    density = _density((cells + offsets[:, None]) * scale, nu)
    side = np.zeros(reach)
    for row in density:  # one row after the other: numpy's own sums may take another order on another machine
        side += row
    t = (np.arange(_ZERO_POINTS) + 0.5) / _ZERO_POINTS
    middle = 0.0
    for part in (_density(0.5 * t * t * scale, nu) * t).tolist():
        middle += part
    return side / _POINTS, middle * (2.0 / _ZERO_POINTS)


def _density(x: Array, nu: float) -> Array:
    """`exp(-x^nu)` for x > 0; 0 where it is below e^-60."""
    power = _exp(np.clip(_log(x) * nu, -40.0, 5.0))
    return np.where(power < 60.0, _exp(-np.minimum(power, 60.0)), 0.0)


def _log(x: Array) -> Array:
    mantissa, exponent = np.frexp(x)
    small = mantissa < 0.7071067811865476
    mantissa = np.where(small, mantissa * 2.0, mantissa)
    exponent = (exponent - small).astype(np.float64)
    s = (mantissa - 1.0) / (mantissa + 1.0)
    z = s * s
    total = np.full_like(z, 1 / 23)
    for odd in range(21, 0, -2):
        total = total * z
        total = total + 1 / odd
    total = total * s
    total = total * 2.0
    return total + exponent * _LN2


def _exp(y: Array) -> Array:
    doublings = np.rint(y / _LN2)
    rest = y - doublings * _LN2
    total = np.ones_like(rest)
    for term in range(15, 0, -1):
        total = total * rest
        total = total / float(term)
        total = total + 1.0
    return np.ldexp(total, doublings.astype(np.int32))

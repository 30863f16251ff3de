"""Weights on a uniform grid: `q = round(w / step)`. Which step gives an SQNR, and how often each q occurs.

Imports torch: only functions import this module.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from agentopt.errors import UserError
from agentopt.weights.gg.archive._numbers import floats
from agentopt.weights.gg.archive._streams import CHUNK, WINDOW, Counts

Array = NDArray[Any]

_SAMPLE = 1 << 18
_CLOSE = 0.02
"""dB within which a step is taken."""
_WIDEST = 4.0
"""A step is at most so many times what the formula says: past 12 dB, sparse weights would be coded too coarsely."""
_BLOCK = 1 << 14
_LARGEST = float(1 << 31)
_FLOAT32_STEPS = 4096.0
"""So many steps from 0, a float32 quotient is off by 2^-11 of a step; beyond, float64 is used."""


@dataclass(frozen=True)
class Grid:
    """A tensor on a grid.

    Attributes:
        step: of the grid.
        counts: of its symbols.
        power, noise: sums of squares of the weights and of what the grid takes from them.
    """

    step: float
    counts: Counts
    power: float
    noise: float

    @property
    def sqnr_db(self) -> float:
        """Infinite where nothing is lost."""
        return sqnr_db(self.power, self.noise)


def sqnr_db(power: float, noise: float) -> float:
    """`10 log10(power / noise)`; infinite without noise, minus infinity where only noise is left."""
    if noise <= 0:
        return math.inf
    return 10 * math.log10(power / noise) if power > 0 else -math.inf


def symbols(weights: Array, step: float) -> Array:
    """The nearest grid points of float32 weights, int64; exact zeros stay zero."""
    return np.rint(_steps(weights, step)).astype(np.int64)


def _steps(weights: Array, step: float) -> Array:
    """Weights in steps; float32 where that is exact enough to round them."""
    if 2.0**-100 < step < 2.0**100:
        ratio = weights / np.float32(step)
        if max(float(ratio.max(initial=0)), -float(ratio.min(initial=0))) <= _FLOAT32_STEPS:
            return ratio
    return weights.astype(np.float64) / step


def _square(values: Array) -> float:
    """Sum of squares; of float32 in blocks that are short enough for its precision."""
    if values.dtype == np.float64:
        return float(np.dot(values, values))
    blocks = (values[start : start + _BLOCK] for start in range(0, len(values), _BLOCK))
    return sum(float(np.dot(block, block)) for block in blocks)


def measure(numbers: Tensor, name: str) -> tuple[float, float]:
    """Sum of squares and largest magnitude of a flat tensor.

    Raises:
        UserError: a weight is infinite or not a number.
    """
    power = largest = 0.0
    for start in range(0, numbers.numel(), CHUNK):
        part = floats(numbers[start : start + CHUNK])
        largest = max(largest, float(part.max()), -float(part.min()))
        power += float(np.dot(wide := part.astype(np.float64), wide))
        if not math.isfinite(power):
            raise UserError(
                f"tensor {name!r}: found weights that are infinite or not a number, expected finite ones; repair the "
                "model, or pack it without loss (lossless)."
            )
    return power, largest


def on_grid(numbers: Tensor, step: float, power: float, largest: float) -> Grid | None:
    """Count a flat tensor on a grid; None if a symbol would not fit into 32 bits.

    Args:
        numbers: the tensor.
        step: of the grid.
        power: its sum of squares.
        largest: its largest magnitude.
    """
    if largest / step >= _LARGEST:
        return None
    counts = np.zeros(2 * WINDOW - 1, np.int64)
    rare: list[Array] = []
    noise = 0.0
    for start in range(0, numbers.numel(), CHUNK):
        steps = _steps(floats(numbers[start : start + CHUNK]), step)
        rounded = np.rint(steps)
        steps -= rounded
        noise += _square(steps) * step * step
        found = rounded.astype(np.int64)
        found += WINDOW - 1
        outside = (found < 0) | (found >= len(counts))
        if outside.any():
            rare.append(found[outside] - (WINDOW - 1))
            found = found[~outside]
        counts += np.bincount(found, minlength=len(counts))
    used = np.flatnonzero(counts)
    low, high = (int(used[0]), int(used[-1])) if len(used) else (WINDOW - 1, WINDOW - 2)
    held = Counts(low - (WINDOW - 1), counts[low : high + 1], np.concatenate(rare) if rare else np.zeros(0, np.int64))
    return Grid(step, held, power, noise)


def at_sqnr(numbers: Tensor, target: float, power: float, largest: float) -> Grid | None:
    """The grid whose SQNR is `target` dB, or a little more; None as for `on_grid`.

    The step starts at `rms sqrt(12 / 10^(target / 10))`, is corrected on a sample, and then on all weights.
    """
    total = numbers.numel()
    first = math.sqrt(12 * power / total / 10 ** (target / 10))
    if not first > 0:
        return on_grid(numbers, 1.0, power, largest)
    sample = floats(numbers[:: max(1, -(-total // _SAMPLE))]).astype(np.float64)
    step = first
    for _ in range(6):
        noise = float(np.mean((sample - np.rint(sample / step) * step) ** 2))
        off = sqnr_db(power / total, noise) - target - _CLOSE
        if abs(off) < _CLOSE:
            break
        step = min(step * 10 ** (min(off, 40.0) / 20), _WIDEST * first)
    found = on_grid(numbers, step, power, largest)
    for _ in range(3):
        if found is None or found.sqnr_db >= target - _CLOSE:
            break
        step *= 10 ** ((found.sqnr_db - target - _CLOSE) / 20)
        found = on_grid(numbers, step, power, largest)
    return found

"""What a tensor becomes: one stream of grid points, one of bytes per byte of a number, or its bytes as they are.

Imports torch: only functions import this module.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from agentopt.weights.gg.archive import _grid as grids
from agentopt.weights.gg.archive import _numbers as numbers
from agentopt.weights.gg.archive._streams import CHUNK, Coding, Counts, choose
from agentopt.weights.gg.archive._types import BYTES, EXP_GOLOMB, RANS, RANS_GG, RAW

Array = NDArray[Any]

SMALL = 1024
"""A tensor of fewer numbers is not put on a grid."""
_OF_GRID = {"eg": EXP_GOLOMB, "rans": RANS, "gg": RANS_GG}


@dataclass(frozen=True)
class Wanted:
    """What the caller asks of every tensor.

    Attributes:
        step: of the grid; None for one that is chosen by `sqnr`.
        sqnr: dB.
        exact: no grid.
    """

    step: float | None
    sqnr: float
    exact: bool


@dataclass(frozen=True)
class Plan:
    """How one tensor is written.

    Attributes:
        streams: a coding for the grid, one for every byte of a number (lowest first), or one for all bytes.
        planes: whether the streams are bytes of numbers.
        step: of the grid.
        entropy: of all symbols, bits.
        power, noise: as of a `Grid`; no noise where the tensor is stored exactly.
    """

    streams: tuple[Coding, ...]
    planes: bool
    step: float | None
    entropy: float
    power: float = 0.0
    noise: float = 0.0

    @property
    def coding(self) -> str:
        """One of `CODINGS`."""
        if self.step is not None:
            return _OF_GRID[self.streams[0].kind]
        return BYTES if self.planes else RAW

    @property
    def sqnr_db(self) -> float:
        """Infinite where nothing is lost."""
        return grids.sqnr_db(self.power, self.noise) if self.step is not None else math.inf


def plan(tensor: Tensor, name: str, dtype: str, wanted: Wanted) -> Plan:
    """The shortest way to write a flat tensor: on the grid that was asked for, or exactly if that is shorter.

    Raises:
        UserError: it has weights that are not finite, and was to be put on a grid.
    """
    if wanted.exact or dtype not in numbers.GRIDS or tensor.numel() < SMALL:
        return _exactly(tensor, _planes(tensor))
    power, largest = grids.measure(tensor, name)
    if wanted.step is None:
        grid = grids.at_sqnr(tensor, wanted.sqnr, power, largest)
    else:
        grid = grids.on_grid(tensor, wanted.step, power, largest)
    planes = _planes(tensor)
    if grid is None:
        return _exactly(tensor, planes)
    coding = choose(grid.counts, step=grid.step, raw=False)
    # The entropy of the bytes is less than they would take: what is above it need not be tried.
    if coding.size >= sum(one.entropy() for one in planes) / 8:
        exact = _exactly(tensor, planes)
        if coding.size >= sum(one.size for one in exact.streams):
            return exact
    return Plan((coding,), False, grid.step, grid.counts.entropy(), grid.power, grid.noise)


def chunks(tensor: Tensor, plan: Plan, stream: int) -> Iterator[Array]:
    """Symbols of one stream, chunk by chunk."""
    if plan.step is not None:
        for start in range(0, tensor.numel(), CHUNK):
            yield grids.symbols(numbers.floats(tensor[start : start + CHUNK]), plan.step)
        return
    if plan.planes:
        for start in range(0, tensor.numel(), CHUNK):
            yield _plane(turned(tensor[start : start + CHUNK]), stream)
        return
    plain = numbers.bits(tensor).view(np.uint8)
    for start in range(0, len(plain), CHUNK):
        yield plain[start : start + CHUNK]


def turned(part: Tensor) -> Array:
    """Bit patterns, of floating numbers with the sign moved to the lowest bit."""
    found = numbers.bits(part)
    if not part.is_floating_point() or part.element_size() == 1:
        return found
    top = 8 * part.element_size() - 1
    return (found << found.dtype.type(1)) | (found >> found.dtype.type(top))


def turned_back(found: Array) -> Array:
    """What `turned` was given."""
    top = found.dtype.type(8 * found.dtype.itemsize - 1)
    return (found >> found.dtype.type(1)) | (found << top)


def _plane(found: Array, stream: int) -> Array:
    return found.view(np.uint8)[stream :: found.dtype.itemsize]


def _planes(tensor: Tensor) -> list[Counts]:
    """How often each byte occurs, first byte of a number by first byte, and so on."""
    counts = [np.zeros(256, np.int64) for _ in range(tensor.element_size())]
    for start in range(0, tensor.numel(), CHUNK):
        part = turned(tensor[start : start + CHUNK])
        for stream, found in enumerate(counts):
            found += np.bincount(_plane(part, stream), minlength=256)
    return [Counts(0, found) for found in counts]


def _exactly(tensor: Tensor, planes: list[Counts]) -> Plan:
    codings = tuple(choose(one, step=None, raw=True) for one in planes)
    if all(one.kind == "raw" for one in codings):
        size = tensor.element_size() * tensor.numel()
        return Plan((Coding("raw", size),), False, None, 8.0 * size)
    return Plan(codings, True, None, sum(one.entropy() for one in planes))

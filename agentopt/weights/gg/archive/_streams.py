"""A stream of integers in chunks, coded by whichever code is shortest for it.

A chunk stands alone: any of them can be decoded without the others. Under rANS a value outside the table is coded as
the table's most frequent symbol and listed behind the chunk's head: gaps between such places, and their values.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agentopt.weights.gg.archive import _expgolomb as eg
from agentopt.weights.gg.archive import _rans as rans
from agentopt.weights.gg.archive import _tables as tables
from agentopt.weights.gg.archive._expgolomb import DamagedStream
from agentopt.weights.gg.archive._rans import Table

Array = NDArray[Any]
Render = Callable[[Array], Array]
"""int64 symbols to the numbers that a reader wants."""

CHUNK = 1 << 22
LARGEST_CHUNK = 1 << 24
HEAD = struct.Struct("<IIIBBH")
"""Of a rANS chunk: values outside the table, bytes of their gaps, bytes of their values, k of both, 0."""
TABLE_BITS = (12, 14, 16)
_TAILS = (0.0, 1e-5, 1e-4, 1e-3)
_STORED_ANYWAY = 1 << 22
"""From so many symbols on, what a stored table takes is less than what a computed one misses."""
WINDOW = 1 << 15
"""Symbols of this magnitude and above are never in a table."""


@dataclass(frozen=True)
class Counts:
    """How often each symbol occurs.

    Attributes:
        low: symbol of the first count.
        counts: of consecutive symbols.
        rare: symbols too large for a table, one by one, in any order.
    """

    low: int
    counts: Array
    rare: Array = field(default_factory=lambda: np.zeros(0, np.int64))

    @property
    def total(self) -> int:
        """Symbols in all."""
        return int(self.counts.sum()) + len(self.rare)

    def entropy(self) -> float:
        """Bits of all symbols at their order-0 entropy."""
        counts = self.counts[self.counts > 0]
        if len(self.rare):
            counts = np.concatenate([counts, np.unique(self.rare, return_counts=True)[1]])
        return abs(float(np.dot(counts, np.log2(counts / counts.sum())))) if len(counts) else 0.0


@dataclass(frozen=True)
class Coding:
    """How a stream is written.

    Attributes:
        kind: "raw" (one byte each), "eg", "rans" (stored table) or "gg" (computed table).
        size: bytes that the stream is expected to take, its table included.
        k: of "eg", and of the stored table of "rans".
        low: symbol of the table's first entry.
        table: of "rans" and "gg".
        gg: nu, b and step of "gg".
    """

    kind: str
    size: float
    k: int = 0
    low: int = 0
    table: Table | None = None
    gg: tuple[float, float, float] | None = None

    @property
    def stored_table(self) -> bytes:
        """The frequencies as an exp-Golomb stream of order `k`."""
        assert self.table is not None
        return eg.encode(self.table.frequencies, self.k)

    @property
    def checksum(self) -> int:
        """CRC-32 of the table's frequencies as little-endian uint32."""
        assert self.table is not None
        return zlib.crc32(self.table.frequencies.astype("<u4").tobytes())


def pieces(count: int) -> list[int]:
    """Symbols in each chunk of a stream."""
    return [min(CHUNK, count - start) for start in range(0, count, CHUNK)]


def choose(found: Counts, *, step: float | None, raw: bool) -> Coding:
    """The shortest coding. Exp-Golomb is counted to the bit, rANS to a few bytes per lane.

    Args:
        found: all symbols of the stream.
        step: of the grid they are on; None for bytes, which have no exp-Golomb and no computed table.
        raw: whether they may be stored as bytes.
    """
    total, parts = found.total, pieces(found.total)
    lanes = sum(eg.lanes(part) for part in parts)
    candidates = [Coding("raw", total)] if raw else []
    if step is not None:
        candidates.append(_exp_golomb(found, lanes))
    fixed = 3 * lanes + HEAD.size * len(parts)
    for low, high in _ranges(found):
        beside = fixed + _escape_bytes(found, low, high)
        inner = found.counts[low - found.low : high - found.low + 1]
        for bits in TABLE_BITS:
            table = tables.from_counts(inner, bits)
            if table is not None:
                k, table_bits = eg.best_order(table.frequencies)
                size = beside + eg.stream_bytes(len(inner), table_bits) + table.cost(inner) / 8
                candidates.append(Coding("rans", size, k, low, table))
    if step is not None and total <= _STORED_ANYWAY:
        candidates += _computed(found, step, fixed)
    return min(candidates, key=lambda one: one.size)


def encode(coding: Coding, symbols: Array) -> bytes:
    """One chunk."""
    if coding.kind == "raw":
        return symbols.astype(np.uint8).tobytes()
    if coding.kind == "eg":
        return eg.encode(eg.zigzag(symbols), coding.k)
    table = coding.table
    assert table is not None
    index = symbols.astype(np.int64) - coding.low
    outside = np.flatnonzero((index < 0) | (index >= len(table.frequencies)))
    gaps = values = b""
    orders = (0, 0)
    if len(outside):
        gap_numbers, value_numbers = np.diff(outside, prepend=-1) - 1, eg.zigzag(symbols[outside])
        orders = (eg.best_order(gap_numbers)[0], eg.best_order(value_numbers)[0])
        gaps, values = eg.encode(gap_numbers, orders[0]), eg.encode(value_numbers, orders[1])
        index[outside] = int(table.frequencies.argmax())
    head = HEAD.pack(len(outside), len(gaps), len(values), *orders, 0)
    return head + gaps + values + rans.encode(index, table)


def decode(coding: Coding, data: bytes | memoryview, count: int, render: Render) -> Array:
    """The rendered symbols of a chunk.

    Raises:
        DamagedStream: it is no chunk of this coding with so many symbols.
    """
    if coding.kind == "raw":
        _check(len(data) == count, "another length than it should have")
        return render(np.frombuffer(data, np.uint8))
    if coding.kind == "eg":
        return render(eg.unzigzag(eg.decode(data, count, coding.k)))
    table = coding.table
    assert table is not None
    view = memoryview(data)
    _check(len(view) >= HEAD.size, "cut off before its head ends")
    escapes, gap_bytes, value_bytes, gap_k, value_k, zero = HEAD.unpack_from(view)
    start = HEAD.size + gap_bytes + value_bytes
    _check(zero == 0 and escapes <= count and start <= len(view), "a head that does not fit")
    _check(max(gap_k, value_k) <= eg.LARGEST_ORDER, "an order that is not known")
    values = render(coding.low + np.arange(len(table.frequencies), dtype=np.int64))
    out = rans.decode(view[start:], count, table, values)
    gaps = eg.decode(view[HEAD.size : HEAD.size + gap_bytes], escapes, gap_k)
    numbers = eg.decode(view[HEAD.size + gap_bytes : start], escapes, value_k)
    if escapes:
        places = np.cumsum(gaps + 1) - 1
        _check(int(places[-1]) < count, "a place behind the end")
        out[places] = render(eg.unzigzag(numbers))
    return out


def table_of(data: bytes, size: int, k: int, bits: int) -> Table:
    """A stored table.

    Raises:
        DamagedStream: it is none.
    """
    return Table(eg.decode(data, size, k), bits)


def _exp_golomb(found: Counts, lanes: int) -> Coding:
    symbols = np.concatenate([found.low + np.arange(len(found.counts)), found.rare])
    counts = np.concatenate([found.counts, np.ones(len(found.rare), np.int64)])
    k, bits = eg.best_order(eg.zigzag(symbols), counts)
    return Coding("eg", 4 * lanes + bits / 8, k=k)


def _ranges(found: Counts) -> Sequence[tuple[int, int]]:
    """Ranges of symbols that a table may cover: all, or all but a small share at each end."""
    running = np.cumsum(found.counts)
    inside = int(running[-1]) if len(running) else 0
    ranges: list[tuple[int, int]] = []
    for tail in _TAILS if inside else ():
        spare = math.floor(tail * inside)
        low = found.low + int(np.searchsorted(running, spare, side="right"))
        high = found.low + int(np.searchsorted(running, inside - spare, side="left"))
        if (low, high) not in ranges and low <= high:
            ranges.append((low, high))
    return ranges


def _escape_bytes(found: Counts, low: int, high: int) -> float:
    """About what the values outside a table take."""
    left, right = found.counts[: max(low - found.low, 0)], found.counts[high - found.low + 1 :]
    symbols = np.concatenate([found.low + np.arange(len(left)), high + 1 + np.arange(len(right)), found.rare])
    counts = np.concatenate([left, right, np.ones(len(found.rare), np.int64)])
    escapes = int(counts.sum())
    if not escapes:
        return 0.0
    gap = math.log2(found.total / escapes) + 2
    return (eg.best_order(eg.zigzag(symbols), counts)[1] + escapes * (gap + 8)) / 8


def _computed(found: Counts, step: float, fixed: float) -> list[Coding]:
    """Codings with the table of the generalized Gaussian that fits best."""
    symbols = found.low + np.arange(len(found.counts))
    nu, scale = tables.fit_gg(np.abs(symbols), found.counts) if found.counts.any() else (1.0, 1.0)
    b = scale * step
    candidates: list[Coding] = []
    for reach in sorted({max(abs(low), abs(high), 1) for low, high in _ranges(found)}):
        if 2 * reach + 1 > 1 << TABLE_BITS[-1] - 1 or not 1 / tables.FINEST <= b / step <= tables.FINEST:
            continue
        first, last = max(found.low, -reach), min(found.low + len(found.counts) - 1, reach)
        inner = np.zeros(2 * reach + 1, np.int64)
        inner[first + reach : last + reach + 1] = found.counts[first - found.low : last - found.low + 1]
        masses = tables.gg_masses(nu, b, step, reach)
        beside = fixed + _escape_bytes(found, -reach, reach)
        for bits in TABLE_BITS:
            if 2 * reach + 1 <= 1 << bits - 1:
                table = tables.from_masses(masses, bits)
                candidates.append(Coding("gg", beside + table.cost(inner) / 8, 0, -reach, table, (nu, b, step)))
    return candidates


def _check(held: bool, what: str) -> None:
    if not held:
        raise DamagedStream(what)

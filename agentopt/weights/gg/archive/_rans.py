"""Interleaved range-ANS (Duda, arXiv 1311.2540) with thousands of lanes, one numpy operation for a symbol of each.

Every lane has a state in [2^16, 2^32), refilled by 16 bits. Symbol i of a stream belongs to lane i mod L. A stream is
the state of every lane (uint32) and then the 16-bit words in the order in which a decoder asks for them: step by step,
within a step by lane. A decoder ends with all states at 2^16 and no word left, which a damaged stream does not do.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agentopt.weights.gg.archive._expgolomb import DamagedStream, lanes

Array = NDArray[Any]

LOWEST = 1 << 16
_BLOCK = 8192
LEAST_BITS, MOST_BITS = 8, 16


@dataclass(frozen=True, eq=False)
class Table:
    """Frequencies of the symbols 0, 1, ... that add up to `2^bits`; 0 for a symbol that does not occur.

    Attributes:
        frequencies: (symbols,) int64.
        bits: 8 to 16.
    """

    frequencies: Array
    bits: int

    def __post_init__(self) -> None:
        found = self.frequencies
        if not LEAST_BITS <= self.bits <= MOST_BITS:
            raise DamagedStream(f"a table of 2^{self.bits}")
        if found.min(initial=1) < 0 or int(found.sum()) != 1 << self.bits:
            raise DamagedStream("frequencies that do not add up")

    @cached_property
    def starts(self) -> Array:
        """Sum of the frequencies of all lower symbols."""
        return np.cumsum(self.frequencies) - self.frequencies

    @cached_property
    def symbols(self) -> Array:
        """The symbol of every slot, (2^bits,)."""
        return np.repeat(np.arange(len(self.frequencies)), self.frequencies)

    def cost(self, counts: Array) -> float:
        """Bits that so many of each symbol take; infinite if one of them has no frequency."""
        used = counts > 0
        frequencies = self.frequencies[used]
        if not frequencies.all():
            return float("inf")
        return float(np.dot(counts[used], self.bits - np.log2(frequencies)))


def encode(symbols: Array, table: Table) -> bytes:
    """A stream of these symbols; each must have a frequency."""
    symbols = symbols.astype(np.intp, copy=False)
    count = len(symbols)
    if not count:
        return b""
    width, whole = lanes(count), 1 << table.bits
    frequencies = table.frequencies
    limit, gap = frequencies << (32 - table.bits), whole - frequencies
    inverse = 1.0 / np.maximum(frequencies, 1)
    state = np.full(width, LOWEST, np.int64)
    words = np.empty(count, "<u2")  # a symbol never takes more than one word
    at = count
    spare, ratio = np.empty(width, np.int64), np.empty(width)
    block = width * max(1, _BLOCK // width)
    for first in range((count - 1) // block * block, -1, -block):
        # What depends on the symbols alone is looked up for many steps at once: lanes may be few.
        symbol = symbols[first : first + block]
        limits, inverses, gaps, starts = limit[symbol], inverse[symbol], gap[symbol], table.starts[symbol]
        for start in range((len(symbol) - 1) // width * width, -1, -width):
            stop = min(start + width, len(symbol))
            lane = slice(start, stop)
            x, number, quotient = state[: stop - start], spare[: stop - start], ratio[: stop - start]
            full = (x >= limits[lane]).nonzero()[0]
            if len(full):
                high = x[full]
                at -= len(full)
                words[at : at + len(full)] = high & 0xFFFF
                x[full] = high >> 16
            # (x + 1/2) / f is at least 2^-17 away from an integer: the floor of the float64 product is exact.
            np.add(x, 0.5, out=quotient)
            quotient *= inverses[lane]
            np.copyto(number, quotient, casting="unsafe")
            number *= gaps[lane]
            x += number
            x += starts[lane]
    return state.astype("<u4").tobytes() + words[at:].tobytes()


def decode(data: bytes | memoryview, count: int, table: Table, values: Array) -> Array:
    """`values[symbol]` for every symbol of a stream, (count,) of the dtype of `values`.

    Raises:
        DamagedStream: it is shorter or longer than these symbols, or was not written with this table.
    """
    if not count:
        _check(len(data) == 0, "bytes behind the end")
        return np.empty(0, values.dtype)
    width, mask, bits = lanes(count), (1 << table.bits) - 1, table.bits
    _check(len(data) >= 4 * width and len(data) % 2 == 0, "cut off before the states end")
    state = np.frombuffer(data, "<u4", width).astype(np.int64)
    _check(int(state.min()) >= LOWEST, "a state out of range")
    words = np.frombuffer(data, "<u2", offset=4 * width)
    by_slot, frequency = values[table.symbols], table.frequencies[table.symbols]
    offset = np.arange(mask + 1) - table.starts[table.symbols]
    out = np.empty(count, values.dtype)
    block = width * max(1, _BLOCK // width)
    slots, spare = np.empty(block, np.int64), np.empty(width, np.int64)
    at = 0
    for first in range(0, count, block):
        part = out[first : first + block]
        for start in range(0, len(part), width):
            stop = min(start + width, len(part))
            x, slot, number = state[: stop - start], slots[start:stop], spare[: stop - start]
            np.bitwise_and(x, mask, out=slot)
            x >>= bits
            frequency.take(slot, out=number, mode="clip")
            x *= number
            offset.take(slot, out=number, mode="clip")
            x += number
            low = (x < LOWEST).nonzero()[0]
            if len(low):
                fresh = words[at : at + len(low)]
                _check(len(fresh) == len(low), "cut off")
                at += len(low)
                number = x[low]
                number <<= 16
                number |= fresh
                x[low] = number
        by_slot.take(slots[: len(part)], out=part, mode="clip")
    _check(at == len(words), "bytes behind the end")
    _check(bool((state == LOWEST).all()), "states that do not come back to where they began")
    return out


def _check(held: bool, what: str) -> None:
    if not held:
        raise DamagedStream(what)

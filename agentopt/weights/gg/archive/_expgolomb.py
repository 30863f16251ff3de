"""Exp-Golomb codes of order k, many lanes at a time.

A number n >= 0 is written as `v = n + 2^k`, which has b bits, behind `b - 1 - k` zeros: `2 b - 1 - k` bits. Lane j of L
holds the numbers j, j + L, j + 2L, ...; a stream is the bit length of every lane (uint32) and then their bits, one lane
behind the other, most significant bit first. All lanes are decoded in step, a numpy operation for one number of each.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

LARGEST_ORDER = 24
LARGEST = (1 << 32) - 1
"""Greatest number that is coded: its code has 33 bits behind 32 zeros."""
_TOGETHER = 1 << 14
LANE_NUMBERS, MOST_LANES = 1024, 4096


class DamagedStream(ValueError):
    """Bytes that are no stream; the caller knows of which tensor."""


def lanes(count: int) -> int:
    """Lanes of a stream of so many numbers: one for every 1,024, at most 4,096."""
    return min(MOST_LANES, max(1, -(-count // LANE_NUMBERS)))


def zigzag(values: Array) -> Array:
    """Signed to unsigned: `2q - 1` for q > 0, `-2q` for the others (int64)."""
    values = values.astype(np.int64)
    return np.where(values > 0, 2 * values - 1, -2 * values)


def unzigzag(numbers: Array) -> Array:
    """What `zigzag` was given."""
    numbers = numbers.astype(np.int64)
    return np.where(numbers & 1, (numbers + 1) >> 1, -(numbers >> 1))


def bits(numbers: Array, k: int) -> Array:
    """Length of every code: `2 floor(log2(n + 2^k)) - k + 1`."""
    return 2 * _width(numbers.astype(np.int64) + (1 << k)) - 1 - k


def best_order(numbers: Array, counts: Array | None = None) -> tuple[int, int]:
    """The order whose codes are shortest together, and their bits; `counts` says how often each number occurs."""
    weights = np.ones(len(numbers), np.int64) if counts is None else counts
    orders = np.arange(LARGEST_ORDER + 1)
    totals = np.zeros(len(orders), np.int64)
    wide = numbers.astype(np.float64)
    for start in range(0, len(wide), _TOGETHER):  # all orders in one operation: most lists are short
        part = wide[start : start + _TOGETHER]
        widths = np.frexp(part + (1 << orders)[:, None])[1]
        totals += (2 * widths.astype(np.int64) - 1 - orders[:, None]) @ weights[start : start + _TOGETHER]
    k = int(totals.argmin())
    return k, int(totals[k])


def stream_bytes(count: int, total_bits: int) -> int:
    """Length of a stream of `count` numbers whose codes have so many bits."""
    return 4 * lanes(count) + -(-total_bits // 8) if count else 0


def encode(numbers: Array, k: int) -> bytes:
    """A stream of these numbers, each 0 to 2^32 - 1."""
    count = len(numbers)
    if not count:
        return b""
    width, by_lane = lanes(count), _by_lane(count)
    codes = numbers.astype(np.int64)[by_lane] + (1 << k)
    sizes = _width(codes)
    ends = np.cumsum(2 * sizes - 1 - k)
    # A code has up to 33 bits: shifted to where it ends in a 32-bit word, it fits into that word and the one before.
    shifted = codes.astype(np.uint64) << ((-ends) & 31).astype(np.uint64)
    places = (ends - 1) >> 5
    words = np.zeros(int(places[-1]) + 2)
    # Codes share no bit, so a sum is an "or", and below 2^32 it is exact in float64.
    words[1:] += np.bincount(places, (shifted & np.uint64(0xFFFFFFFF)).astype(np.float64), len(words) - 1)
    words[:-1] += np.bincount(places, (shifted >> np.uint64(32)).astype(np.float64), len(words) - 1)[: len(words) - 1]
    payload = words[1:].astype(">u4").tobytes()[: -(-int(ends[-1]) // 8)]
    last = np.cumsum(_lane_counts(count)) - 1
    lengths = np.diff(ends[last], prepend=0)
    assert len(lengths) == width
    return lengths.astype("<u4").tobytes() + payload


def decode(data: bytes | memoryview, count: int, k: int) -> Array:
    """The numbers of a stream, (count,) int64.

    Raises:
        DamagedStream: it is shorter or longer than these numbers, or holds a code of more than 33 bits.
    """
    if not count:
        _check(len(data) == 0, "bytes behind the end")
        return np.zeros(0, np.int64)
    width = lanes(count)
    _check(len(data) >= 4 * width, "cut off before the lengths end")
    lengths = np.frombuffer(data, "<u4", width).astype(np.int64)
    total = int(lengths.sum())
    _check(len(data) == 4 * width + -(-total // 8), "another length than its lanes have")
    _check(total >= count, "fewer bits than numbers")
    window = _windows(data, 4 * width)
    ends = np.cumsum(lengths)
    at = ends - lengths
    out = np.empty(count, np.int64)
    for start in range(0, count, width):
        stop = min(start + width, count)
        number, at_end = _step(window, at[: stop - start], k)
        _check(bool((at_end <= ends[: stop - start]).all()), "a code that runs over the end of its lane")
        out[start:stop] = number
        at[: stop - start] = at_end
    _check(bool((at == ends).all()), "bits behind the last code")
    return out


def _step(window: Array, at: Array, k: int) -> tuple[Array, Array]:
    """The number of every lane at these bits, and the bit behind it."""
    zeros = 33 - _width((_read(window, at) >> np.uint64(31)).astype(np.int64))
    _check(bool((zeros + k <= 32).all()), "a code of more than 33 bits")
    size = zeros + k + 1
    code = (_read(window, at + zeros) >> (64 - size).astype(np.uint64)).astype(np.int64)
    return code - (1 << k), at + zeros + size


def _read(window: Array, at: Array) -> Array:
    """The 33 or more bits from these places on, at the top of a uint64; zeros behind the end."""
    place = np.minimum(at >> 5, len(window) - 1)
    return window[place] << (at & 31).astype(np.uint64)


def _windows(data: bytes | memoryview, start: int) -> Array:
    """For every 32-bit word, it and the next one as one uint64."""
    rest = len(data) - start
    words = np.zeros(rest // 4 + 4, np.uint64)
    whole = rest // 4
    words[:whole] = np.frombuffer(data, ">u4", whole, start)
    tail = bytes(data[start + 4 * whole :])
    words[whole] = int.from_bytes(tail.ljust(4, b"\0"), "big")
    return (words[:-1] << np.uint64(32)) | words[1:]


def _width(numbers: Array) -> Array:
    """Bits of every positive integer below 2^53; 0 of 0."""
    return np.frexp(numbers.astype(np.float64))[1].astype(np.int64)


def _lane_counts(count: int) -> Array:
    """Numbers in every lane."""
    width = lanes(count)
    return (count - np.arange(width) + width - 1) // width


def _by_lane(count: int) -> Array:
    """Indices of the numbers, lane by lane."""
    width = lanes(count)
    rows = -(-count // width)
    order = np.arange(rows * width).reshape(rows, width).T.ravel()
    return order[order < count]


def _check(held: bool, what: str) -> None:
    if not held:
        raise DamagedStream(what)

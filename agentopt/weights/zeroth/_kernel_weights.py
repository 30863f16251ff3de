"""Triton kernels that go over a weight once: move it, or build what it is at one or two shifts.

Noise is drawn where it is used. A tile has rows of 8 weights, which is what a thread loads at once in 16 bit: all that
is drawn for them comes from one call of the generator (two for a random mask), and no thread needs another's. The
arithmetic is that of the torch code in `_update`, operation by operation, and must be compiled without fused
multiply-adds to give the same bits.

Weights of 16 bits come in as integers: rounded at random they leave as integers, too.
"""
# A kernel is written in Triton's language, whose values have no Python types.
# pyright: reportMissingParameterType=false, reportUnknownParameterType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownMemberType=false, reportUntypedFunctionDecorator=false

from __future__ import annotations

import triton
import triton.language as tl

ROWS = 256
"""Rows of 8 weights per program."""


@triton.jit
def sign_rows(seed, tensor_id, row):
    """The signs of each row of 8 weights (int64 row numbers, one dimension), as the lowest bits of a word."""
    w0, w1, w2, w3 = tl.philox(seed, (row >> 4).to(tl.int32), tensor_id, 0, 0)
    place = (row >> 2) & 3
    word = tl.where(place == 0, w0, tl.where(place == 1, w1, tl.where(place == 2, w2, w3)))
    return word >> ((row & 3) * 8).to(tl.uint32)


@triton.jit
def by_column(column, w0, w1, w2, w3):
    """Of the words of each row the one with the number that stands in `column` (0 to 3)."""
    low = tl.where(column == 0, w0[:, None], w1[:, None])
    return tl.where(column < 2, low, tl.where(column == 2, w2[:, None], w3[:, None]))


@triton.jit
def widen(bits, FORMAT: tl.constexpr):
    """Float32 of what was loaded: 0 float32, 1 bfloat16 as int16, 2 float16 as int16."""
    if FORMAT == 1:
        return (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    elif FORMAT == 2:
        return bits.to(tl.float16, bitcast=True).to(tl.float32)
    else:
        return bits


@triton.jit
def narrow(value, FORMAT: tl.constexpr):
    """To nearest, ties to even; the opposite of `widen`."""
    if FORMAT == 1:
        return value.to(tl.bfloat16).to(tl.int16, bitcast=True)
    elif FORMAT == 2:
        return value.to(tl.float16).to(tl.int16, bitcast=True)
    else:
        return value


@triton.jit
def round_at_random(value, random, FORMAT: tl.constexpr):
    """One of the two neighbours of 16 bits; `random` has 32 bits per weight, the weight's own sixteen on top."""
    bits = value.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    finite = magnitude < 0x7F800000
    if FORMAT == 1:
        cut = (random >> 16).to(tl.int32)
        rounded = tl.minimum(tl.where(finite, magnitude + cut, 0), 0x7F7FFFFF)
        special = tl.where(magnitude > 0x7F800000, magnitude | 0x00400000, magnitude)
        rounded = tl.where(finite, rounded, special)
        return (((bits ^ magnitude) | rounded) >> 16).to(tl.int16)
    else:
        positive = magnitude.to(tl.float32, bitcast=True)
        exponent = tl.maximum(magnitude >> 23, 113)
        steps = tl.where(finite, positive, 0.0) * ((264 - exponent) << 23).to(tl.float32, bitcast=True)
        whole = tl.floor(steps)
        broken = ((steps - whole) * 4294967296.0).to(tl.int64)
        whole = whole + ((broken + random.to(tl.int64)) >> 32).to(tl.float32)
        rounded = tl.minimum(whole * ((exponent - 10) << 23).to(tl.float32, bitcast=True), 65504.0)
        rounded = tl.where(finite, rounded, positive)
        signed = rounded.to(tl.int32, bitcast=True) | (bits ^ magnitude)
        return signed.to(tl.float32, bitcast=True).to(tl.float16).to(tl.int16, bitcast=True)


@triton.jit
def moving(wide, seed, tensor_id, row, threshold, limit, MASK: tl.constexpr, ROWS: tl.constexpr):
    """Which weights of the tile move: 0 all, 1 small, 2 large, 3 random (a word below the limit)."""
    if MASK == 1:
        return tl.abs(wide) <= threshold
    elif MASK == 2:
        return tl.abs(wide) >= threshold
    elif MASK == 3:
        a0, a1, a2, a3 = tl.philox(seed, (row * 2).to(tl.int32), tensor_id, 3, 0)
        b0, b1, b2, b3 = tl.philox(seed, (row * 2 + 1).to(tl.int32), tensor_id, 3, 0)
        column = tl.arange(0, 8)[None, :]
        first, second = by_column(column & 3, a0, a1, a2, a3), by_column(column & 3, b0, b1, b2, b3)
        return tl.where(column < 4, first, second).to(tl.int64) < limit
    else:
        return tl.full((ROWS, 8), 1, tl.int1)


@triton.jit
def signed(word, size):
    """`size` or `-size` for each of the 8 lowest bits of every row's word."""
    lane = tl.arange(0, 8).to(tl.uint32)
    plus = ((word[:, None] >> lane[None, :]) & 1) != 0
    return tl.where(plus, size, -size)


# Sizes and starts are specialised: a multiple of 16 lets loads and stores take 16 bytes at a time.
@triton.jit(do_not_specialize=["tensor_id", "limit"])
def update_kernel(
    weight,
    seeds,
    steps,
    size,
    tensor_id,
    threshold,
    limit,
    decay,
    COUNT: tl.constexpr,
    MASK: tl.constexpr,
    CLAMP: tl.constexpr,
    DECAY: tl.constexpr,
    FORMAT: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Move a weight along `COUNT` directions; `seeds` has those of the mask and of the rounding first."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    place = row[:, None] * 8 + tl.arange(0, 8)[None, :]
    inside = place < size
    wide = widen(tl.load(weight + place, mask=inside, other=0), FORMAT)
    move = signed(sign_rows(tl.load(seeds + 2), tensor_id, row), tl.load(steps))
    for k in tl.static_range(1, COUNT):  # pyright: ignore[reportGeneralTypeIssues]
        move = move + signed(sign_rows(tl.load(seeds + 2 + k), tensor_id, row), tl.load(steps + k))
    moves = moving(wide, tl.load(seeds), tensor_id, row, threshold, limit, MASK, ROWS)
    if MASK != 0:
        move = tl.where(moves, move, 0.0)
    new = wide
    if DECAY:
        new = tl.where(moves, wide * decay, wide)
    new = new - move
    if CLAMP and MASK == 1:
        held = tl.where(new > threshold, threshold, tl.where(new < -threshold, -threshold, new))
        new = tl.where(moves, held, new)
    if CLAMP and MASK == 2:
        edge = tl.where(wide < 0, -threshold, threshold)
        new = tl.where(moves & (tl.abs(new) < threshold), edge, new)
    if FORMAT == 0:
        tl.store(weight + place, new, mask=inside)
    else:
        w0, w1, w2, w3 = tl.philox(tl.load(seeds + 1), row.to(tl.int32), tensor_id, 2, 0)
        column = tl.arange(0, 8)[None, :]
        word = by_column(column >> 1, w0, w1, w2, w3)
        random = tl.where((column & 1) == 0, (word << 16) | (word >> 16), word)
        tl.store(weight + place, round_at_random(new, random, FORMAT), mask=inside)


@triton.jit(do_not_specialize=["tensor_id", "limit"])
def shift_kernel(
    weight,
    plus,
    minus,
    seeds,
    scale,
    start,
    size,
    tensor_id,
    threshold,
    limit,
    MASK: tl.constexpr,
    PAIR: tl.constexpr,
    FORMAT: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The weights `start` to `start + size` at plus (and minus) `scale` times a direction, from one reading of them."""
    row = start // 8 + tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    place = row[:, None] * 8 + tl.arange(0, 8)[None, :]
    inside = (place >= start) & (place < start + size)
    wide = widen(tl.load(weight + place, mask=inside, other=0), FORMAT)
    noise = signed(sign_rows(tl.load(seeds + 1), tensor_id, row), scale)
    if MASK != 0:
        noise = tl.where(moving(wide, tl.load(seeds), tensor_id, row, threshold, limit, MASK, ROWS), noise, 0.0)
    tl.store(plus + (place - start), narrow(wide + noise, FORMAT), mask=inside)
    if PAIR:
        tl.store(minus + (place - start), narrow(wide - noise, FORMAT), mask=inside)

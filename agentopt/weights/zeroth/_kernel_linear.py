"""Triton kernel for a linear layer at shifted weights: the shift is added to a tile just before it is multiplied.

The shifted weight exists nowhere in memory. For a pair of opposite shifts the tile is read, its noise drawn and its
mask decided once for both. Every tile of tokens draws the noise again, so this serves passes of few tokens, whose time
is that of reading the weights; for many tokens `_kernels.linear` builds the shifted weight slice by slice instead.
"""
# A kernel is written in Triton's language, whose values have no Python types.
# pyright: reportMissingParameterType=false, reportUnknownParameterType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownMemberType=false, reportUntypedFunctionDecorator=false

from __future__ import annotations

import triton
import triton.language as tl

HALF = 64
"""Weights of a row multiplied at a time: half of what one call of the generator gives."""


@triton.jit
def _interleave(w0, w1, w2, w3):
    """Four words per block (any two dimensions) as one row, in the order of the words."""
    pairs = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    return tl.reshape(pairs, (w0.shape[0], 4 * w0.shape[1]))


@triton.jit
def _kept(seed, tensor_id, block, limit):
    """Where a random mask keeps the weights of blocks of four (int64, two dimensions): a word below the limit."""
    w0, w1, w2, w3 = tl.philox(seed, block.to(tl.int32), tensor_id, 3, 0)
    return _interleave(w0, w1, w2, w3).to(tl.int64) < limit


@triton.jit
def _tile_noise(first, second, scale, HALF: tl.constexpr):
    """The signed scale of `HALF` weights per row, from two words per row."""
    lane = tl.arange(0, HALF)
    word = tl.where(lane[None, :] < 32, first[:, None], second[:, None])
    plus = ((word >> (lane % 32).to(tl.uint32)[None, :]) & 1) != 0
    return tl.where(plus, scale, -scale)


@triton.jit
def _masked(noise, wide, seed, tensor_id, start, threshold, limit, MASK: tl.constexpr, HALF: tl.constexpr):
    """The noise of the weights that move; `start` is the flat index of each row's first weight."""
    if MASK == 1:
        return tl.where(tl.abs(wide) <= threshold, noise, 0.0)
    elif MASK == 2:
        return tl.where(tl.abs(wide) >= threshold, noise, 0.0)
    elif MASK == 3:
        block = (start[:, None] >> 2) + tl.arange(0, HALF // 4)[None, :]
        return tl.where(_kept(seed, tensor_id, block, limit), noise, 0.0)
    else:
        return noise


@triton.jit(do_not_specialize=["tokens", "tensor_id", "limit"])
def linear_kernel(
    x,
    weight,
    out,
    seeds,
    copies,
    scales,
    tokens,
    height,
    width,
    tensor_id,
    threshold,
    limit,
    MASK: tl.constexpr,
    PAIR: tl.constexpr,
    EXACT: tl.constexpr,
    OUT: tl.constexpr,
    TOKENS: tl.constexpr,
    HALF: tl.constexpr,
):
    """Multiply one tile of outputs by one tile of tokens, for one shift or a pair of opposite ones.

    `x` is (copies, tokens, width) and `out` (copies, tokens, height); group g of the grid works for the copies
    `copies[2 g]` and, in a pair, `copies[2 g + 1]`, with seed `seeds[1 + g]`; `seeds[0]` is that of a random mask.
    `width` is a multiple of 128. EXACT multiplies in float32: for float32 models, and in Triton's interpreter, whose
    product of bfloat16 tiles is wrong.
    """
    group = tl.program_id(2)
    outs = tl.program_id(0) * OUT + tl.arange(0, OUT)
    rows = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    seed, scale = tl.load(seeds + 1 + group), tl.load(scales + group)
    one = tl.load(copies + 2 * group).to(tl.int64) * tokens
    two = tl.load(copies + 2 * group + 1).to(tl.int64) * tokens
    start = outs.to(tl.int64) * width
    place = rows.to(tl.int64) * width
    lane = tl.arange(0, HALF)
    sum_one = tl.zeros((OUT, TOKENS), tl.float32)
    sum_two = tl.zeros((OUT, TOKENS), tl.float32)
    for block in range(0, width // 128):
        w0, w1, w2, w3 = tl.philox(seed, ((start >> 7) + block).to(tl.int32), tensor_id, 0, 0)
        for half in tl.static_range(2):  # pyright: ignore[reportGeneralTypeIssues]
            column = block * 128 + half * HALF
            tile = tl.load(weight + start[:, None] + (column + lane)[None, :], mask=(outs < height)[:, None], other=0.0)
            wide = tile.to(tl.float32)
            noise = _tile_noise(w0, w1, scale, HALF) if half == 0 else _tile_noise(w2, w3, scale, HALF)
            noise = _masked(noise, wide, tl.load(seeds), tensor_id, start + column, threshold, limit, MASK, HALF)
            where = x + place[None, :] + (column + lane)[:, None]
            inside = (rows < tokens)[None, :]
            left = tl.load(where + one * width, mask=inside, other=0.0)
            if EXACT:
                shifted = (wide + noise).to(tile.dtype).to(tl.float32)
                sum_one = tl.dot(shifted, left.to(tl.float32), sum_one, input_precision="ieee")
            else:
                sum_one = tl.dot((wide + noise).to(tile.dtype), left, sum_one)
            if PAIR:
                right = tl.load(where + two * width, mask=inside, other=0.0)
                if EXACT:
                    shifted = (wide - noise).to(tile.dtype).to(tl.float32)
                    sum_two = tl.dot(shifted, right.to(tl.float32), sum_two, input_precision="ieee")
                else:
                    sum_two = tl.dot((wide - noise).to(tile.dtype), right, sum_two)
    target = out + rows.to(tl.int64)[None, :] * height + outs[:, None]
    inside = (outs < height)[:, None] & (rows < tokens)[None, :]
    tl.store(target + one * height, sum_one.to(out.dtype.element_ty), mask=inside)
    if PAIR:
        tl.store(target + two * height, sum_two.to(out.dtype.element_ty), mask=inside)

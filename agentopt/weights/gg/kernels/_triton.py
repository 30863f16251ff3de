"""Triton kernels of a linear layer whose weights are bytes.

Weights are the left operand of the tensor cores' product and tokens the right one, so that few tokens are padded to 8
and not to 64. Sums are float32 and in a fixed order: a program sums its columns, `finish_kernel` sums the programs.
"""
# A kernel is written in Triton's language, whose values have no Python types.
# pyright: reportMissingParameterType=false, reportUnknownParameterType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownMemberType=false, reportUntypedFunctionDecorator=false
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false

from __future__ import annotations

import triton
import triton.language as tl

from agentopt.weights.gg.kernels._values import BOOKS, books, values


@triton.jit
def _product(weights, x, total, EXACT: tl.constexpr):
    """EXACT multiplies in float32: for float32 layers, and in Triton's interpreter, whose bfloat16 product is wrong."""
    if EXACT:
        return tl.dot(weights.to(tl.float32), x.to(tl.float32), total, input_precision="ieee")
    else:
        return tl.dot(weights, x, total)


@triton.jit
def _first(book_id, rows, height, ONE_BOOK: tl.constexpr):
    """Where each row's book begins."""
    if ONE_BOOK:
        return tl.zeros_like(rows)
    else:
        return tl.load(book_id + rows, mask=rows < height, other=0).to(tl.int32) * 256


@triton.jit
def _write(total, rows, tokens, scale, bias, out, count, height, unit, BIAS: tl.constexpr, SPLIT: tl.constexpr):
    """Scale, add the bias and store (rows, tokens); store the bare sums where other programs have a part in them."""
    inside = (rows < height)[:, None] & (tokens < count)[None, :]
    place = tokens[None, :].to(tl.int64) * height + rows[:, None]
    if SPLIT > 1:
        tl.store(out + tl.program_id(2).to(tl.int64) * count * height + place, total, mask=inside)
    else:
        total *= (tl.load(scale + rows, mask=rows < height, other=0.0) * unit)[:, None]
        if BIAS:
            total += tl.load(bias + rows, mask=rows < height, other=0.0).to(tl.float32)[:, None]
        tl.store(out + place, total.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["count", "steps", "book_count"])
def few_kernel(
    x, codes, scale, table, book_id, bias, out, count, height, width, stride, steps, book_count, unit,
    FORMAT: tl.constexpr, WORDS: tl.constexpr, EXACT: tl.constexpr, GATHER: tl.constexpr, BOOKS_PADDED: tl.constexpr,
    BIAS: tl.constexpr, ONE_BOOK: tl.constexpr, EVEN: tl.constexpr, SPLIT: tl.constexpr,
    OUT: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Few tokens: a program has OUT rows of weights, and each of its PARTS warps columns of its own.

    `x` is (count, width) with `stride` from row to row, `codes` (height, width) contiguous. Program (i, j, s) gives
    rows i OUT.., tokens j TOKENS.., and sums the s-th of SPLIT runs of `steps` steps of PARTS x COLUMNS columns. `unit`
    is what decoded values have to be multiplied by.
    """
    rows = tl.program_id(0) * OUT + tl.arange(0, OUT)
    tokens = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    column = tl.arange(0, PARTS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    column += tl.program_id(2) * steps * (PARTS * COLUMNS)
    first = _first(book_id, rows, height, ONE_BOOK)[None, :, None]
    lut = books(table, BOOKS_PADDED, book_count, GATHER and FORMAT == BOOKS, x.dtype.element_ty)
    row = codes + (rows.to(tl.int64) * width)[None, :, None]
    token = x + (tokens.to(tl.int64) * stride)[None, None, :]
    total = tl.zeros((PARTS, OUT, TOKENS), tl.float32)
    for _ in tl.range(0, steps, num_stages=STAGES):
        known, given = (rows < height)[None, :, None], (tokens < count)[None, None, :]
        if not EVEN:
            known, given = known & (column < width)[:, None, :], given & (column < width)[:, :, None]
        bytes_ = tl.load(row + column[:, None, :], mask=known, other=0)
        right = tl.load(token + column[:, :, None], mask=given, other=0.0)
        total = _product(values(bytes_, first, table, lut, FORMAT, WORDS, GATHER), right, total, EXACT)
        column += PARTS * COLUMNS
    _write(tl.sum(total, 0), rows, tokens, scale, bias, out, count, height, unit, BIAS, SPLIT)


@triton.jit(do_not_specialize=["count", "steps", "book_count"])
def tiled_kernel(
    x, codes, scale, table, book_id, bias, out, count, height, width, stride, steps, book_count, unit,
    FORMAT: tl.constexpr, WORDS: tl.constexpr, EXACT: tl.constexpr, GATHER: tl.constexpr, BOOKS_PADDED: tl.constexpr,
    BIAS: tl.constexpr, ONE_BOOK: tl.constexpr, EVEN: tl.constexpr, SPLIT: tl.constexpr,
    OUT: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """More tokens: tiles of OUT rows and TOKENS tokens; otherwise as `few_kernel`."""
    rows = tl.program_id(0) * OUT + tl.arange(0, OUT)
    tokens = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    column = tl.program_id(2) * steps * COLUMNS + tl.arange(0, COLUMNS)
    first = _first(book_id, rows, height, ONE_BOOK)[:, None]
    lut = books(table, BOOKS_PADDED, book_count, GATHER and FORMAT == BOOKS, x.dtype.element_ty)
    row = codes + (rows.to(tl.int64) * width)[:, None]
    token = x + (tokens.to(tl.int64) * stride)[None, :]
    total = tl.zeros((OUT, TOKENS), tl.float32)
    for _ in tl.range(0, steps, num_stages=STAGES):
        known, given = (rows < height)[:, None], (tokens < count)[None, :]
        if not EVEN:
            known, given = known & (column < width)[None, :], given & (column < width)[:, None]
        bytes_ = tl.load(row + column[None, :], mask=known, other=0)
        right = tl.load(token + column[:, None], mask=given, other=0.0)
        total = _product(values(bytes_, first, table, lut, FORMAT, WORDS, GATHER), right, total, EXACT)
        column += COLUMNS
    _write(total, rows, tokens, scale, bias, out, count, height, unit, BIAS, SPLIT)


@triton.jit(do_not_specialize=["count"])
def finish_kernel(
    parts, scale, bias, out, count, height, unit, BIAS: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr
):
    """Sum the parts (SPLIT, count, height), in their order; scale, add the bias. Program (i, j): columns i, token j."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = rows < height
    place = tl.program_id(1).to(tl.int64) * height + rows
    total = tl.zeros((BLOCK,), tl.float32)
    for part in tl.static_range(SPLIT):
        total += tl.load(parts + part * count.to(tl.int64) * height + place, mask=inside, other=0.0)
    total *= tl.load(scale + rows, mask=inside, other=0.0) * unit
    if BIAS:
        total += tl.load(bias + rows, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + place, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def decode_kernel(
    codes, scale, table, book_id, out, height, width, book_count,
    FORMAT: tl.constexpr, GATHER: tl.constexpr, BOOKS_PADDED: tl.constexpr, ONE_BOOK: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """Write weights: value times scale in float32, rounded to the type of `out`.

    ROUND rounds to bfloat16, to nearest even, by hand: Triton's interpreter would cut the bits off.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (rows < height)[:, None] & (column < width)[None, :]
    place = rows.to(tl.int64)[:, None] * width + column[None, :]
    first = _first(book_id, rows, height, ONE_BOOK)[:, None]
    lut = books(table, BOOKS_PADDED, book_count, GATHER and FORMAT == BOOKS, tl.float32)
    bytes_ = tl.load(codes + place, mask=inside, other=0)
    weight = values(bytes_, first, table, lut, FORMAT, False, GATHER)
    weight *= tl.load(scale + rows, mask=rows < height, other=0.0)[:, None]
    if ROUND:
        bits = weight.to(tl.int32, bitcast=True)
        weight = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    tl.store(out + place, weight.to(out.dtype.element_ty), mask=inside)

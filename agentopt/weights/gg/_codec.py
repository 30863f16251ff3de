"""Weights to bytes and back, in all four formats: the one codec that every other part uses.

    encoded = encode(weight, format="rf8-gg")      # codes, scales, books
    decode(encoded, dtype=torch.bfloat16)

`weight = table[book_id, code] * scale` in float32, then cast, is what every decoder gives.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor

from agentopt.errors import UserError
from agentopt.weights.gg import _books, _grid, _minifloat, _search, _strict, _tables
from agentopt.weights.gg._types import FORMATS, SCALES, Encoded, Format, Scale

_TILE = 1 << 18
_SMALLEST = 2.0**-126
_LARGEST = torch.finfo(torch.float32).max * (1 - 2**-22)


def encode(
    weight: Tensor,
    format: Format = "rf8-gg",
    axis: int | None = 0,
    *,
    scale: Scale = "channel",
    books: Tensor | None = None,
    column_weight: Tensor | None = None,
    name: str = "weight",
) -> Encoded:
    """One byte per weight. Every code is the nearest one (ties toward zero), but in `rf8-strict`; zeros stay zero.

    Args:
        weight: floating point, any shape; contiguous or not. It is not changed.
        format: `rf8-gg` (best quality), `rf8`, `rf8-strict` (the paper's rounding) or `e3m4`.
        axis: each index along it is a row with a scale of its own: 0 for the (out, in) of a linear layer. None for
            one scale.
        scale: "channel": the largest magnitude of a row is mapped to the largest value of the format (`rf8-gg`:
            scale and book of least squared error). "tensor_pow2", `rf8` and `rf8-strict` only: one power of two,
            whatever the axis, with the largest magnitude at most 1.9375.
        books: `rf8-gg`: (K, 256), each with a level of 0; None for `default_books()`.
        column_weight: `rf8-gg`: what a squared error counts, per place in a row, (in,): not negative, not all 0.
        name: of the tensor, for messages.

    Raises:
        UserError: a weight that is NaN or infinite; an unknown format, scale or axis; books or column weights of
            another shape.
    """
    _check(weight, format, scale, axis, name)
    axis = None if scale == "tensor_pow2" else axis
    rows = _rows(weight.detach(), axis)
    if format == "rf8-gg":
        codes, scales, chosen, held = _with_books(rows, books, column_weight, name)
    else:
        if books is not None or column_weight is not None:
            raise UserError(f"{name}: books and column_weight are for rf8-gg, found them with {format}.")
        codes, scales = _with_formula(rows, format, scale, name)
        chosen, held = None, None
    shape = [1] * weight.ndim
    if axis is not None:
        shape[axis] = weight.shape[axis]
    return Encoded(
        codes=_back(codes, weight.shape, axis),
        scale=scales.view(shape),
        format=format,
        axis=None if axis is None else axis % weight.ndim,
        books=held,
        book_id=None if chosen is None else chosen.view(shape),
    )


def decode(encoded: Encoded, dtype: torch.dtype = torch.float32) -> Tensor:
    """`table[book_id, code] * scale` in float32, cast to `dtype`; the shape of the codes."""
    table = _tables.table(encoded.format, encoded.books).to(encoded.codes.device)
    if encoded.book_id is None:
        value = table[0].index_select(0, encoded.codes.flatten().to(torch.int32)).view(encoded.codes.shape)
    else:
        place = encoded.codes.to(torch.int32) + encoded.book_id.to(torch.int32) * _grid.LEVELS
        value = table.flatten().index_select(0, place.flatten()).view(encoded.codes.shape)
    return (value * encoded.scale).to(dtype)


def sqnr(weight: Tensor, decoded: Tensor) -> float:
    """Signal to quantization noise in dB, `10 log10(sum w^2 / sum (w - w')^2)`; infinite where nothing was lost.

    Raises:
        UserError: the shapes differ.
    """
    if weight.shape != decoded.shape:
        raise UserError(f"sqnr: found {tuple(decoded.shape)}, expected the shape of the weight, {tuple(weight.shape)}.")
    signal = noise = 0.0
    exact, other = weight.detach().flatten(), decoded.detach().flatten()
    for start in range(0, len(exact), _TILE):
        part = exact[start : start + _TILE].double()
        signal += float(part.square().sum())
        noise += float((part - other[start : start + _TILE].double()).square_().sum())
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf


def code_entropy(codes: Tensor) -> float:
    """Entropy of the codes in bits per weight: what an ideal entropy coder would store; 0 for an empty tensor."""
    counts = torch.bincount(codes.flatten(), minlength=256).double()
    counts = counts[counts > 0]
    share = counts / counts.sum()
    return float(-(share * share.log2()).sum()) + 0.0


def _check(weight: Any, format: str, scale: str, axis: int | None, name: str) -> None:
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        found = str(weight.dtype) if isinstance(weight, Tensor) else type(cast("object", weight)).__name__
        raise UserError(f"{name}: found {found}, expected a tensor of floating-point weights.")
    if format not in FORMATS:
        raise UserError(f"{name}: format: found {format!r}, expected {', '.join(FORMATS)}.")
    if scale not in SCALES:
        raise UserError(f"{name}: scale: found {scale!r}, expected {' or '.join(SCALES)}.")
    if scale == "tensor_pow2" and format not in ("rf8", "rf8-strict"):
        raise UserError(f"{name}: the scale tensor_pow2 is for rf8 and rf8-strict, found it with {format}.")
    if axis is not None and not -weight.ndim <= axis < weight.ndim:
        raise UserError(f"{name}: axis: found {axis}, expected an axis of the {weight.ndim} of this tensor, or None.")


def _rows(weight: Tensor, axis: int | None) -> Tensor:
    """(rows, n): a view where the layout allows."""
    if axis is None:
        return weight.reshape(1, -1)
    moved = weight.movedim(axis, 0)
    return moved.reshape(len(moved), math.prod(moved.shape[1:]))


def _back(codes: Tensor, shape: torch.Size, axis: int | None) -> Tensor:
    """The codes of the rows in the shape of the weight."""
    if axis is None:
        return codes.view(shape)
    moved = list(shape)
    moved.insert(0, moved.pop(axis))
    return codes.view(moved).movedim(0, axis).contiguous()


def _check_finite(largest: Tensor, name: str) -> None:
    if not bool(torch.isfinite(largest).all()):
        raise UserError(f"{name}: found NaN or infinite weights, expected finite numbers: the tensor is damaged.")


def _peaks(rows: Tensor, name: str) -> Tensor:
    """The largest magnitude of every row, float32 (rows, 1)."""
    if not rows.numel():
        return rows.new_zeros((len(rows), 1), dtype=torch.float32)
    low, high = torch.aminmax(rows, dim=1, keepdim=True)
    found = torch.maximum(-low, high).to(torch.float32)
    _check_finite(found, name)
    return found


def _with_formula(rows: Tensor, format: Format, scale: Scale, name: str) -> tuple[Tensor, Tensor]:
    """Codes and scales of a format whose table is a formula."""
    peaks = _peaks(rows, name)
    largest = _minifloat.LARGEST[format]
    scales = _power_of_two(peaks) if scale == "tensor_pow2" else (peaks / largest).clamp(_SMALLEST, _LARGEST / largest)
    scales = torch.where(peaks == 0, torch.ones_like(peaks), scales)
    codes = torch.empty(rows.shape, dtype=torch.uint8, device=rows.device)
    step = max(1, _TILE // max(1, rows.shape[1]))
    for start in range(0, len(rows) if rows.numel() else 0, step):
        part = slice(start, start + step)
        unit = rows[part].to(torch.float32) / scales[part]
        codes[part] = _strict.codes(unit) if format == "rf8-strict" else _minifloat.codes(unit, format)
    return codes, scales


def _power_of_two(peaks: Tensor) -> Tensor:
    """2^ceil(log2(peak / 1.9375)), a normal float32."""
    mantissa, exponent = math.frexp(float(peaks.max()) / _minifloat.LARGEST["rf8"] if peaks.numel() else 0.0)
    power = exponent - (mantissa == 0.5)
    return torch.full_like(peaks, 2.0 ** min(max(power, -126), 127))


def _with_books(
    rows: Tensor, books: Tensor | None, column_weight: Tensor | None, name: str
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Codes, scales, chosen books and the books of `rf8-gg`."""
    grid = _books.default_grid() if books is None else _grid.Grid.of(_grid.check(books))
    grid = grid.to(rows.device)
    if column_weight is not None:
        _check_column_weight(column_weight, rows.shape[1], name)
        column_weight = column_weight.detach().to(rows.device, torch.float32)
    _peaks(rows, name)
    if rows.numel():
        codes, scales, chosen = _search.search(rows, grid, column_weight)
    else:
        codes = torch.empty(rows.shape, dtype=torch.uint8, device=rows.device)
        scales = torch.ones((len(rows), 1), device=rows.device)
        chosen = torch.zeros((len(rows), 1), dtype=torch.uint8, device=rows.device)
    return codes, scales, chosen if len(grid.books) > 1 else None, grid.books


def _check_column_weight(column_weight: Tensor, width: int, name: str) -> None:
    if column_weight.shape != (width,):
        raise UserError(f"{name}: column_weight: found shape {tuple(column_weight.shape)}, expected ({width},).")
    if not bool(torch.isfinite(column_weight).all()) or bool((column_weight < 0).any()):
        raise UserError(f"{name}: column_weight: found negative or infinite numbers, expected finite ones from 0 on.")
    if width and not bool((column_weight > 0).any()):
        raise UserError(f"{name}: column_weight: found zeros only, expected at least one positive number.")

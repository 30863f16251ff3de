"""Which book and which scale a row of `rf8-gg` takes: the pair of least squared error.

Per book some scales are tried, from the row's root mean square (weighed like the errors) to the one at which its
largest magnitude meets the outermost level; wide rows are tried on a part of their columns. The best few pairs are then
fitted on the whole row (least-squares scale, codes, again), beside the uniform book at the largest magnitude, which is
per-channel INT8: no row is worse than that.
"""

from __future__ import annotations

import torch
from torch import Tensor

from agentopt.weights.gg._grid import LEVELS, Grid

TILE = 1 << 18
"""Weights that are worked on at once: they and their intermediate values stay in the processor's cache."""
SAMPLE, LARGE = 512, 64
"""Columns on which books and scales are compared: this many, and those of the largest weights of the row."""
FINALISTS = 3
"""Books that are fitted on whole rows."""
TRIES = 9
"""Scales per book."""
_ROWS = 8192
"""At once, so that the scales tried for very short rows need no more room than the weights."""
_SMALLEST = 2.0**-126
_LARGEST = torch.finfo(torch.float32).max * (1 - 2**-22)
"""A little below the largest float32: a level times a scale is rounded."""


def search(weight: Tensor, grid: Grid, column_weight: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Encode rows.

    Args:
        weight: (rows, n), n at least 1, finite.
        grid: of the books.
        column_weight: (n,), not negative, not all zero: what a squared error counts in each column; None for 1.

    Returns:
        codes uint8 (rows, n); scale float32 (rows, 1), positive; book uint8 (rows, 1).
    """
    rows, width = weight.shape
    codes = torch.empty((rows, width), dtype=torch.uint8, device=weight.device)
    scale = torch.empty((rows, 1), device=weight.device)
    book = torch.empty((rows, 1), dtype=torch.uint8, device=weight.device)
    step = max(1, min(TILE // width, _ROWS))
    for start in range(0, rows, step):
        part = slice(start, start + step)
        codes[part], scale[part], book[part] = _tile(weight[part].to(torch.float32), grid, column_weight)
    return codes, scale, book


def _tile(weight: Tensor, grid: Grid, column_weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    largest = weight.abs().amax(1, keepdim=True)
    # In units of a power of two near the largest magnitude, squares neither overflow nor vanish.
    _, exponent = torch.frexp(largest)
    unit = torch.ldexp(weight, -exponent)
    peak = torch.ldexp(largest, -exponent)
    peak = torch.where(peak == 0, torch.ones_like(peak), peak)
    power = None if column_weight is None else (column_weight / column_weight.max()).to(torch.float32)[None]
    scale, book = _best(unit, peak, grid, power)
    scale = torch.ldexp(scale.double(), exponent).clamp(_SMALLEST, _LARGEST)
    scale = scale.minimum(_LARGEST / grid.outermost.double()[book.long()]).to(torch.float32)
    scale = torch.where(largest == 0, torch.ones_like(scale), scale)
    codes = grid.codes(weight / scale, book) - book * LEVELS
    return codes.to(torch.uint8), scale, book.to(torch.uint8)


def _best(unit: Tensor, peak: Tensor, grid: Grid, power: Tensor | None) -> tuple[Tensor, Tensor]:
    """Scale float32 (rows, 1) and book int32 (rows, 1) of rows whose largest magnitude is `peak`."""
    scales, errors = _tried(unit, peak, grid, power)
    best_of_book, which = errors.min(2)
    scales = scales.gather(2, which[..., None]).squeeze(2)
    finalists = best_of_book.sort(dim=1, stable=True).indices[:, : min(FINALISTS, len(grid.books))]
    uniform = int(grid.outermost.argmin())
    kept_scale, kept_book = peak / grid.outermost[uniform], torch.full_like(finalists[:, :1], uniform).to(torch.int32)
    kept_error = _error(unit, kept_scale, kept_book, grid, power)[0]
    for place in range(finalists.shape[1]):
        book = finalists[:, place : place + 1]
        scale, error = _fitted(unit, scales.gather(1, book), book.to(torch.int32), grid, power)
        better = error < kept_error
        kept_scale, kept_error = torch.where(better, scale, kept_scale), torch.where(better, error, kept_error)
        kept_book = torch.where(better, book.to(torch.int32), kept_book)
    return kept_scale, kept_book


def _tried(unit: Tensor, peak: Tensor, grid: Grid, power: Tensor | None) -> tuple[Tensor, Tensor]:
    """The scales that are tried, (rows, books, tries), and their squared errors."""
    square = unit.square() if power is None else unit.square() * (power / power.mean())
    square = square.mean(1, keepdim=True).sqrt().clamp(min=1e-12)
    unit, power = _sample(unit, power)
    between = torch.linspace(0, 1, TRIES, device=unit.device)
    scales: list[Tensor] = []
    errors: list[Tensor] = []
    for number in range(len(grid.books)):
        wide = peak / grid.outermost[number]
        tried = square * (wide / square) ** between
        scales.append(tried)
        errors.append(torch.stack([_rough_error(unit, one, number, grid, power) for one in tried.T], 1))
    return torch.stack(scales, 1), torch.stack(errors, 1)


def _rough_error(unit: Tensor, scale: Tensor, book: int, grid: Grid, power: Tensor | None) -> Tensor:
    """About the squared error (rows,) of one book: codes are as for the middle of their cell."""
    level = grid.rough(unit, scale[:, None], book)
    lost = level.mul_(scale[:, None]).sub_(unit)
    return torch.einsum("rn,rn->r", lost, lost if power is None else lost * power)


def _sample(unit: Tensor, power: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Some columns of wide rows, and all large weights: each of those can decide between two scales by itself."""
    width = unit.shape[1]
    if width <= SAMPLE + LARGE:
        return unit, power
    size = unit.abs()
    large = size.topk(LARGE, dim=1)
    chosen = torch.arange(SAMPLE, device=unit.device) * width // SAMPLE
    small = (size[:, chosen] < large.values[:, -1:]).to(torch.float32)
    small *= (width - LARGE) / small.sum(1, keepdim=True).clamp(min=1)
    ones = torch.ones_like(large.values)
    if power is not None:
        small, ones = small * power[:, chosen], power.expand_as(unit).gather(1, large.indices)
    return torch.cat([unit[:, chosen], unit.gather(1, large.indices)], 1), torch.cat([small, ones], 1)


def _fitted(unit: Tensor, scale: Tensor, book: Tensor, grid: Grid, power: Tensor | None) -> tuple[Tensor, Tensor]:
    """The least-squares scale given the codes, and its error with the codes that are nearest then."""
    error, better = _error(unit, scale, book, grid, power)
    for _ in range(2):
        new_error, new_better = _error(unit, better, book, grid, power)
        held = new_error < error
        scale, error = torch.where(held, better, scale), torch.where(held, new_error, error)
        better = torch.where(held, new_better, better)
    return scale, error


def _error(unit: Tensor, scale: Tensor, book: Tensor, grid: Grid, power: Tensor | None) -> tuple[Tensor, Tensor]:
    """The squared error (rows, 1) with the nearest codes, and the scale that suits those codes best."""
    level = grid.levels.index_select(0, grid.codes(unit / scale, book).flatten()).view(unit.shape)
    lost = unit - level * scale
    weighed = level if power is None else level * power
    error = (lost * lost if power is None else lost * lost * power).sum(1, keepdim=True)
    norm = (weighed * level).sum(1, keepdim=True)
    better = (weighed * unit).sum(1, keepdim=True) / norm
    return error, torch.where((norm > 0) & (better > 0), better, scale)

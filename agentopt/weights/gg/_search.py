"""Which book and which scale a row of `rf8-gg` takes: the pair of least squared error.

Per book some scales are tried, from the row's root mean square to the one at which its largest magnitude meets the
outermost level; wide rows are tried on a part of their columns. The best few pairs are then fitted on the whole row
(least-squares scale, codes, again), beside the uniform book at the largest magnitude, which is per-channel INT8: no row
is worse than that.
"""

from __future__ import annotations

import torch
from torch import Tensor

from agentopt.weights.gg._grid import LEVELS, Grid

TILE = 1 << 17
"""Weights that are worked on at once: they and their intermediate values stay in the processor's cache."""
SAMPLE = 512
"""Columns on which books and scales are compared."""
FINALISTS = 2
_BETWEEN = (0.0, 0.25, 0.5, 0.75, 1.0)
_SMALLEST = 2.0**-126
_LARGEST = torch.finfo(torch.float32).max


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
    step = max(1, TILE // width)
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
    square = unit.square().mean(1, keepdim=True).sqrt().clamp(min=1e-6)
    width = unit.shape[1]
    if width > 2 * SAMPLE:
        chosen = torch.arange(SAMPLE, device=unit.device) * width // SAMPLE
        unit, power = unit[:, chosen], None if power is None else power[:, chosen]
        # The largest magnitude is always among them: a scale that cuts it off must pay for that.
        share = torch.full((1, SAMPLE), width / SAMPLE, device=unit.device)
        power = share if power is None else power * share
        unit, power = torch.cat([unit, peak], 1), torch.cat([power, power.new_ones(1, 1)], 1)
    between = torch.tensor(_BETWEEN, device=unit.device)
    scales: list[Tensor] = []
    errors: list[Tensor] = []
    for number in range(len(grid.books)):
        wide = peak / grid.outermost[number]
        tried = square * (wide / square) ** between
        scales.append(tried)
        book = torch.full((len(unit), 1), number, dtype=torch.int32, device=unit.device)
        errors.append(
            torch.cat([_error(unit, tried[:, [one]], book, grid, power)[0] for one in range(len(between))], 1)
        )
    return torch.stack(scales, 1), torch.stack(errors, 1)


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

"""Books of 255 levels for `rf8-gg`: the optimal compander of a generalized Gaussian, and its refinement on weights.

At high rate the best quantizer of a density p has levels of density proportional to p^(1/3) (Panter and Dite 1951).
For a generalized Gaussian that is one of the same shape, 3^(1/nu) times as wide: its quantiles are the levels. An odd
number of them has 0 in the middle, so that pruned weights stay zero.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from agentopt.errors import UserError
from agentopt.weights.gg import _density, _grid

NUS = (0.5, 0.65, 0.8, 1.0, 1.3, 1.6, 2.0, 3.0, 5.0, math.inf)
"""The shapes of the default books; infinity is the uniform one, in which per-channel INT8 is contained.

Above 2 they are for short rows: of a few hundred Gaussian weights none lies far out, and levels there are wasted.
"""


def compander(nu: float, levels: int = 255) -> Tensor:
    """Levels for weights of unit variance that follow a generalized Gaussian of shape nu; float32 (levels,), rising.

    Level i is the quantile at `(i + 1/2) / levels` of a generalized Gaussian of that shape and of standard deviation
    `3^(1/nu)`; for an infinite nu the levels are equally spaced from -sqrt(3) to sqrt(3).

    Args:
        nu: shape, above 0.
        levels: 2 to 256; an odd number has the level 0.

    Raises:
        UserError: a nu or a number of levels outside these ranges.
    """
    if not nu > 0:
        raise UserError(f"compander: nu: found {nu!r}, expected a number above 0.")
    if not 2 <= levels <= _grid.LEVELS:
        raise UserError(f"compander: levels: found {levels!r}, expected 2 to {_grid.LEVELS}.")
    if math.isinf(nu):
        steps = torch.arange(1 - levels, levels, 2, dtype=torch.float64)
        return (math.sqrt(3) / (levels - 1) * steps).to(torch.float32)
    lower = (torch.arange(levels // 2, dtype=torch.float64) + 0.5) / levels
    negative = _density.quantile(lower, nu, 3 ** (1 / nu))
    middle = negative.new_zeros(levels % 2)
    return torch.cat([negative, middle, -negative.flip(0)]).to(torch.float32)


def default_books() -> Tensor:
    """The formula's books for `NUS`: float32 (10, 256), 255 levels each and a zero that pads them."""
    return torch.stack([torch.nn.functional.pad(compander(nu), (0, 1)) for nu in NUS])


@functools.cache
def default_grid() -> _grid.Grid:
    """The default books, ready to encode with; not to be changed."""
    return _grid.Grid.of(default_books())


def sample_rows(weight: Tensor, rows: int = 64, seed: int = 0) -> Tensor:
    """Rows to refine books on, without replacement: float32 (min(rows, out), in).

    Args:
        weight: (out, in).
        rows: how many.
        seed: of the draw.

    Raises:
        UserError: the weight is not a matrix, or no rows are asked for.
    """
    if weight.ndim != 2 or rows < 1:
        found = f"a weight of shape {tuple(weight.shape)} and rows={rows}"
        raise UserError(f"sample_rows: found {found}, expected a weight (out, in) and 1 row or more.")
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(weight), generator=generator)[:rows].sort().values
    return weight.detach()[chosen.to(weight.device)].to(torch.float32)


def refine(
    books: Tensor,
    samples: Sequence[Tensor],
    *,
    column_weights: Sequence[Tensor | None] | None = None,
    rounds: int = 3,
    inertia: float = 4.0,
) -> Tensor:
    """Move every level to the mean of the sampled weights that have its code, each in the unit of its row (Lloyd 1982).

    Every round chooses book and scale of every sampled row anew. The level 0 stays, a level with few weights stays
    near its place, the levels keep rising, and a book of equally spaced levels is left alone: with it no row is worse
    than per-channel INT8.

    Args:
        books: (K, 256).
        samples: weights (rows, in), of any widths.
        column_weights: one (in,) per sample, or None for equal ones; they are scaled to a mean of 1.
        rounds: how often.
        inertia: weights that the old place of a level counts for.

    Returns:
        float32 (K, 256).
    """
    from agentopt.weights.gg._search import search

    books = _grid.check(books)
    weights = list(column_weights) if column_weights is not None else [None] * len(samples)
    if len(weights) != len(samples):
        raise UserError(f"refine: found {len(weights)} column weights for {len(samples)} samples, expected as many.")
    for _ in range(rounds):
        grid = _grid.Grid.of(books)
        mass = torch.zeros(books.numel(), dtype=torch.float64)
        total = torch.zeros_like(mass)
        for sample, column_weight in zip(samples, weights, strict=True):
            if not sample.numel():
                continue
            codes, scale, book = search(sample, grid, column_weight)
            unit = (sample.to(torch.float32) / scale).flatten().double()
            place = (codes.long() + book.long() * _grid.LEVELS).flatten()
            pull = torch.ones(sample.shape[1], dtype=torch.float64) if column_weight is None else column_weight.double()
            pull = (pull / pull.mean()).expand(sample.shape).flatten()
            mass.scatter_add_(0, place, pull)
            total.scatter_add_(0, place, pull * unit)
        moved = ((total + inertia * books.flatten()) / (mass + inertia)).view_as(books)
        books = _kept(moved, books)
    return books


def _kept(moved: Tensor, books: Tensor) -> Tensor:
    """The moved levels, but zeros where they were, and books that are uniform or would no longer rise as they were."""
    moved = torch.where(books == 0, torch.zeros_like(moved), moved).to(torch.float32)
    take: list[bool] = []
    for new, old, count in zip(moved, books, _grid.level_counts(books), strict=True):
        steps = old[1:count] - old[: count - 1]
        take.append(bool((new[1:count] > new[: count - 1]).all()) and bool(steps.max() > 1.001 * steps.min()))
    return torch.where(torch.tensor(take)[:, None], moved, books)

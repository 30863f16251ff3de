"""The nearest level of a book, exactly, without a search: a uniform grid says how many thresholds lie below a cell.

Which cell a number falls in is computed by float operations that never reverse an order, for the thresholds by the
same ones. So the thresholds in earlier cells are passed, those in later cells are not, and only those of the cell
itself (one, at this fineness) are compared. That is three to five times as fast as a binary search.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from agentopt.errors import UserError

CELLS = 1 << 14
LEVELS = 256


def level_counts(books: Tensor) -> list[int]:
    """Levels of each book (K, 256): 255 where the last entry is padding, else 256."""
    return [256 if bool(book[255] > book[254]) else 255 for book in books]


def check(books: Any) -> Tensor:
    """The books as float32 (K, 256).

    Raises:
        UserError: another shape, levels that do not rise strictly or are not finite, no level of exactly 0, or one
            sign only.
    """
    if not isinstance(books, Tensor) or books.ndim != 2 or books.shape[1] != LEVELS or not 1 <= len(books) <= 256:
        found = tuple(books.shape) if isinstance(books, Tensor) else type(books).__name__
        raise UserError(f"books: found {found}, expected a tensor of 1 to 256 books with 256 entries each, (K, 256).")
    books = books.detach().to(torch.float32)
    for number, (book, count) in enumerate(zip(books, level_counts(books), strict=True)):
        levels = book[:count]
        if not bool(torch.isfinite(levels).all()) or not bool((levels[1:] > levels[:-1]).all()):
            raise UserError(f"books: book {number} has other levels than finite, strictly rising ones.")
        if not bool((levels == 0).any()) or not bool(levels[0] < 0 < levels[-1]):
            raise UserError(
                f"books: book {number} lacks a level of exactly 0 between negative and positive ones; expected one, "
                f"so that weights of 0 stay 0."
            )
    return books


@dataclass(frozen=True, slots=True)
class Grid:
    """Books with what finds their codes.

    Attributes:
        books: float32 (K, 256), as `check` gives them.
        outermost: float32 (K,): the largest magnitude among the levels.
        levels: float32 (K * 256,): the books, flat.
        thresholds: float32 (K * 256,): code i is left for i + 1 above `thresholds[i]`; infinite beyond the last.
        slope, offset: float32 (K,): the cell of u is `u * slope + offset`, cut off at both ends.
        passed: uint8 (K * CELLS,): the thresholds in earlier cells.
        depth: the most thresholds that share a cell.
        middle: float32 (K, CELLS): the level nearest to the middle of a cell.
    """

    books: Tensor
    outermost: Tensor
    levels: Tensor
    thresholds: Tensor
    slope: Tensor
    offset: Tensor
    passed: Tensor
    depth: int
    middle: Tensor

    @classmethod
    def of(cls, books: Tensor) -> Grid:
        """Prepare (K, 256) checked books, on the CPU."""
        books = books.cpu()
        counts = level_counts(books)
        thresholds = torch.stack([_thresholds(book[:count]) for book, count in zip(books, counts, strict=True)])
        finite = thresholds.isfinite()
        low = thresholds[:, 0].double()
        high = torch.stack([row[mask].max() for row, mask in zip(thresholds, finite, strict=True)]).double()
        slope = ((CELLS - 2) / (high - low)).to(torch.float32)
        offset = (1 - low * slope.double()).to(torch.float32)
        cells = _cells(thresholds, slope[:, None], offset[:, None])
        cells = torch.where(finite, cells, CELLS)
        passed = torch.stack([torch.bucketize(torch.arange(CELLS), row.long()) for row in cells])
        shared = max(int(torch.bincount(row[mask]).max()) for row, mask in zip(cells.long(), finite, strict=True))
        outermost = torch.stack([book[:count].abs().max() for book, count in zip(books, counts, strict=True)])
        centre = (torch.arange(CELLS) + 0.5 - offset[:, None]) / slope[:, None]
        near = [torch.bucketize(row, edges) for row, edges in zip(centre, thresholds, strict=True)]
        middle = books.gather(1, torch.stack(near))
        return cls(
            books,
            outermost,
            books.flatten(),
            thresholds.flatten(),
            slope,
            offset,
            passed.to(torch.uint8).flatten(),
            shared,
            middle,
        )

    def to(self, device: torch.device) -> Grid:
        """The same on another device."""
        if self.books.device == device:
            return self
        tensors: list[str] = [field.name for field in fields(self) if field.name != "depth"]
        return replace(self, **{name: getattr(self, name).to(device) for name in tensors})

    def codes(self, unit: Tensor, book: Tensor) -> Tensor:
        """The code of the level nearest to each number; of two as near, the one nearer to zero.

        Args:
            unit: float32 (rows, n): weights divided by the scale of their row.
            book: int32 (rows, 1).

        Returns:
            int32 (rows, n): codes that are offset by 256 times the book, as `levels` is indexed.
        """
        number = book.long().flatten()
        cells = _cells(unit, self.slope[number][:, None], self.offset[number][:, None])
        code = self.passed.index_select(0, cells.add_(book * CELLS).flatten()).view(unit.shape).to(torch.int32)
        code.add_(book * LEVELS)
        for _ in range(self.depth):
            code.add_(unit > self.thresholds.index_select(0, code.flatten()).view(unit.shape))
        return code

    def rough(self, unit: Tensor, scale: Tensor, book: int) -> Tensor:
        """About the nearest level of `unit / scale`, in a third of the time: it may be the neighbour of the nearest."""
        cells = (unit * (self.slope[book] / scale)).add_(self.offset[book]).clamp_(0, CELLS - 1).to(torch.int32)
        return self.middle[book].index_select(0, cells.flatten()).view(unit.shape)


def _cells(unit: Tensor, slope: Tensor, offset: Tensor) -> Tensor:
    return unit.mul(slope).add_(offset).clamp_(0, CELLS - 1).to(torch.int32)


def _thresholds(levels: Tensor) -> Tensor:
    """float32 (256,): a float32 above the i-th has a code beyond i. Midpoints, with ties broken toward zero."""
    middle = (levels[1:].double() + levels[:-1].double()) / 2
    single = middle.to(torch.float32)
    lower = torch.nextafter(single, torch.tensor(-math.inf))
    # Above a midpoint the code is the upper one. On it too where the midpoint is negative: that one is nearer to zero.
    step_down = (single.double() > middle) | ((single.double() == middle) & (middle < 0))
    found = torch.full((LEVELS,), math.inf)
    found[: len(middle)] = torch.where(step_down, lower, single)
    return found

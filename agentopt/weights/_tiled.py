"""`y = x W^T` for a weight that is never whole in memory. Only functions that need torch import this module."""

from __future__ import annotations

from typing import Any, Protocol, cast

import torch
from torch import Tensor

TILE = 1 << 20
"""Weights that are widened at a time: 4 MB of float32, which stay in the cache."""


class Rows(Protocol):
    """A weight (out, in) that can be widened some rows at a time."""

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        ...

    def tile(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Rows `start:stop` as numbers; good until the next call."""
        ...


def product(x: Any, weight: Rows, back: bool = False, tile: int = TILE) -> Any:
    """`x W^T`, or `x W` when `back`. Gradients flow to `x` (twice, too), not to the weight; torch.func knows it.

    Args:
        x: (..., in); (..., out) when `back`.
        weight: widened `tile` weights at a time.
        back: with the weight as it is stored.
        tile: weights that are widened at a time.
    """
    return cast(Any, _Product).apply(x, weight, back, tile)


class _Product(torch.autograd.Function):
    """Each of the two products is the derivative of the other, so it can be differentiated again and again."""

    @staticmethod
    def forward(x: Tensor, weight: Rows, back: bool, tile: int) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        out, wide = weight.shape
        y = flat.new_zeros(flat.shape[0], wide) if back else flat.new_empty(flat.shape[0], out)
        rows = max(1, tile // max(1, wide))
        for start in range(0, out, rows):
            stop = min(start + rows, out)
            part = weight.tile(start, stop, x.dtype)
            if back:
                y.addmm_(flat[:, start:stop], part)
            else:
                y[:, start:stop] = flat @ part.mT
        return y.reshape(*x.shape[:-1], y.shape[1])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.weight, ctx.back, ctx.tile = inputs

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return product(grads[0], ctx.weight, not ctx.back, ctx.tile), None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        # Only x can vary, and any number of leading axes will do.
        return product(args[0].movedim(in_dims[0], 0), *args[1:]), 0

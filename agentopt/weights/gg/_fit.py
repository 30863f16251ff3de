"""Which generalized Gaussian a tensor, or each of its rows, looks like.

Imports torch: only functions that need it import this module.
"""

from __future__ import annotations

import torch
from torch import Tensor

from agentopt.weights.gg import _density
from agentopt.weights.gg._types import GGFit

NU_MIN, NU_MAX = 0.1, 20.0



def fit(tensor: Tensor, axis: int | None = None) -> GGFit:
    """One fit of all values, or one per index of an axis, by moments."""
    rows = tensor.detach().double()
    rows = rows.flatten()[None] if axis is None else rows.movedim(axis, 0).flatten(1)
    count = torch.full((rows.shape[0],), rows.shape[1], dtype=torch.float64)
    nu = shape_of_moments(count, rows.abs().sum(1), rows.square().sum(1))
    sigma = rows.square().mean(1).sqrt()
    found = (nu, _density.beta_of(nu, sigma), sigma)
    return GGFit(*(float(one[0]) if axis is None else one for one in found))


def shape_of_moments(count: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """nu with `ratio(nu) = count * second / first^2`, by bisection on the logarithms; float64, one per entry.

    Args:
        count: numbers of values.
        first: sums of magnitudes.
        second: sums of squares.
    """
    goal = torch.log((count * second / first.square()).nan_to_num(nan=torch.pi / 2, posinf=1e9).clamp_min(1.0))
    low, high = torch.full_like(goal, NU_MIN).log(), torch.full_like(goal, NU_MAX).log()
    for _ in range(60):
        middle = (low + high) / 2
        right = _density.ratio(middle.exp()).log() > goal
        low, high = torch.where(right, middle, low), torch.where(right, high, middle)
    return ((low + high) / 2).exp()

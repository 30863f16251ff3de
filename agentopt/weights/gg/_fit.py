"""Which generalized Gaussian a tensor, or each of its rows, looks like: by moments, or by maximum likelihood.

By moments, E[x^2] / E[|x|]^2 depends on nu alone and is inverted. One outlier ruins the squares, so the largest
magnitudes are left out, and the ratio that is inverted is the one of the generalized Gaussian cut at the same share:
on clean data the answer is the same, only the outlier no longer matters. Imports torch.
"""

# torch's own annotations are partial: its values are checked by the tests, not by the type checker.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import functools
import math
from typing import Literal

import torch
from torch import Tensor

from agentopt.errors import UserError
from agentopt.weights.gg import _density
from agentopt.weights.gg._types import GGFit

NU_MIN, NU_MAX = 0.1, 20.0
"""Range of the estimates. nu = 20 is nearly uniform; what is flatter still (two values, a constant) is given 20."""
TRIM = 1e-3
"""Share of the largest magnitudes that the moments leave out by default."""
UNDETERMINED = 2.0
"""nu of a tensor of zeros."""
_POINTS = 512


def fit(
    tensor: Tensor, axis: int | None = None, method: Literal["moments", "ml"] = "moments", *, trim: float | None = None
) -> GGFit:
    """Fit a generalized Gaussian of mean 0 to all values, or one to each index of an axis.

    nu is kept within 0.1 and 20. Zeros alone give nu 2, beta 0 and sigma 0; a single value, or values of one magnitude,
    nu 20; values of which almost all are 0, nu 0.1. Below some hundred values the estimate is rough.

    Args:
        tensor: any floating-point dtype, device and shape.
        axis: one fit per index of this axis (0 for the rows of a weight (out, in)); None for one fit.
        method: "moments"; or "ml", maximum likelihood: more precise on clean data, about five times slower, thrown off
            by outliers, and blind to exact zeros (they would have infinite likelihood; they are left out).
        trim: "moments" only: share of the largest magnitudes left out, rounded up to whole values; None for 0.001,
            0 for the plain moment ratio.

    Returns:
        Numbers for `axis=None`, else float32 tensors (length of the axis,) on the tensor's device.

    Raises:
        UserError: no elements, NaN or infinity, an axis that is not there, an unknown method, or a trim out of range.
    """
    rows = _rows(tensor, axis)
    if method not in ("moments", "ml"):
        raise UserError(f"method: found {method!r}, expected 'moments' or 'ml'.")
    if trim is not None and (method == "ml" or not 0 <= trim < 0.5):
        raise UserError(f"trim: found {trim}, expected a share from 0 to below 0.5, with the method 'moments'.")
    size = rows.abs()
    if not bool(torch.isfinite(size.amax())):
        raise UserError("fit: found NaN or infinity among the values, expected finite ones.")
    nu, beta = _by_moments(size, TRIM if trim is None else trim)
    if method == "ml":
        nu, beta = _by_likelihood(size, nu, beta)
    found = (nu, beta, _density.sigma_of(nu, beta))
    if axis is None:
        return GGFit(*(float(one[0]) for one in found))
    return GGFit(*(one.to(tensor.device, torch.float32) for one in found))


def shape_of_moments(count: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Nu with `ratio(nu) = count * second / first^2`; float64, one per entry, `UNDETERMINED` where all is 0.

    Args:
        count: numbers of values.
        first: sums of magnitudes.
        second: sums of squares.
    """
    return _invert(count * second / first.square(), 0.0)


def _rows(tensor: Tensor, axis: int | None) -> Tensor:
    if tensor.numel() == 0:
        raise UserError(f"fit: found a tensor without elements (shape {tuple(tensor.shape)}), expected one or more.")
    data = tensor.detach()
    if data.dtype not in (torch.float32, torch.float64):
        data = data.float()
    if axis is None:
        return data.reshape(1, -1)
    if not -data.ndim <= axis < data.ndim:
        raise UserError(f"axis: found {axis} for a tensor with {data.ndim} axes, expected one of them.")
    return data.movedim(axis, 0).reshape(data.shape[axis], -1)


def _by_moments(size: Tensor, trim: float) -> tuple[Tensor, Tensor]:
    """Nu and beta per row; float64 on the CPU."""
    length = size.shape[1]
    cut = min(math.ceil(trim * length), (length - 1) // 2)
    first, second = _kept_sums(size, cut)
    kept = length - cut
    share = cut / length
    nu = _invert(kept * second / first.square(), share)
    beta = first / kept / _cut_moment(nu, share, 1).exp()
    flat = nu == NU_MAX  # no generalized Gaussian of ours: at least the standard deviation is the one found
    beta = torch.where(flat, _density.beta_of(nu, (second / kept).sqrt()), beta)
    sparse = first == 0
    if bool(sparse.any()):
        rms = torch.linalg.vector_norm(size, 2, dim=1, dtype=torch.float64).cpu() / math.sqrt(length)
        nu = torch.where(sparse, torch.where(rms > 0, torch.full_like(nu, NU_MIN), UNDETERMINED), nu)
        beta = torch.where(sparse, _density.beta_of(nu, rms), beta)
    return nu, beta


def _kept_sums(size: Tensor, cut: int) -> tuple[Tensor, Tensor]:
    """Sums of the magnitudes and of their squares per row, without the `cut` largest values."""
    above = torch.zeros(size.shape[0], dtype=torch.float64)
    edge = above
    if cut:
        limit = torch.topk(size, cut, dim=1, sorted=False).values.amin(1, keepdim=True)
        below = size < limit
        size = torch.where(below, size, 0)
        # Equal magnitudes at the edge: as many as must stay.
        above = (size.shape[1] - cut - below.sum(1)).double().cpu()
        edge = limit[:, 0].double().cpu()
    first = torch.linalg.vector_norm(size, 1, dim=1, dtype=torch.float64).cpu()
    second = torch.linalg.vector_norm(size, 2, dim=1, dtype=torch.float64).square().cpu()
    return first + above * edge, second + above * edge.square()


def _invert(found: Tensor, share: float) -> Tensor:
    """Nu whose ratio, cut at the share of largest magnitudes, is the one found; within the range of the estimates.

    The ratio falls with nu. A table brackets the root, the secant in the bracket finds it to rounding.
    """
    found = found.double()
    goal = found.clamp_min(1e-300).log()
    x, values = _table(share)
    at = torch.searchsorted(-values, -goal).clamp(1, _POINTS - 1)
    low, high = x[at - 1], x[at]
    at_low, at_high = values[at - 1] - goal, values[at] - goal
    middle = low
    for _ in range(4):
        middle = (low * at_high - high * at_low) / (at_high - at_low)
        middle = torch.where(torch.isfinite(middle), middle, low).clamp(math.log(NU_MIN), math.log(NU_MAX))
        value = _log_ratio(middle.exp(), share) - goal
        left = value > 0
        low, at_low = torch.where(left, middle, low), torch.where(left, value, at_low)
        high, at_high = torch.where(left, high, middle), torch.where(left, at_high, value)
    nu = middle.exp()
    nu = torch.where(goal >= values[0], NU_MIN, torch.where(goal <= values[-1], NU_MAX, nu))
    return torch.where(torch.isnan(found), UNDETERMINED, nu)


@functools.lru_cache(maxsize=64)
def _table(share: float) -> tuple[Tensor, Tensor]:
    """Log nu, rising, and the logarithm of the ratio, falling."""
    x = torch.linspace(math.log(NU_MIN), math.log(NU_MAX), _POINTS, dtype=torch.float64)
    return x, _log_ratio(x.exp(), share)


def _log_ratio(nu: Tensor, share: float) -> Tensor:
    return _cut_moment(nu, share, 2) - 2 * _cut_moment(nu, share, 1)


def _cut_moment(nu: Tensor, share: float, power: int) -> Tensor:
    """Log E[|x|^power] for beta = 1, given that |x| is not among the share of largest ones."""
    a = 1 / nu
    moment = torch.lgamma((power + 1) * a) - torch.lgamma(a)
    if share == 0:
        return moment
    edge = _density.gamma_tail_inverse(a, torch.full_like(a, share))
    return moment + torch.special.gammainc((power + 1) * a, edge).log() - math.log1p(-share)


def _by_likelihood(size: Tensor, nu: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """The maximum over nu of the likelihood with the best beta, from the given start; safeguarded Newton steps."""
    top = size.amax(1, keepdim=True)
    held = size > 0
    count = held.sum(1).double().cpu()
    logs = torch.where(held, (size / top.clamp_min(torch.finfo(size.dtype).tiny)).log(), 0)
    everywhere = bool(held.all())

    def means(shape: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of |x|^nu, and of its first and second derivative in nu, with the largest magnitude as unit."""
        power = (logs * shape[:, None].to(logs)).exp_()
        power = power if everywhere else power * held
        sums = [power.sum(1, dtype=torch.float64).cpu()]
        for _ in range(2):
            power = power.mul_(logs)
            sums.append(power.sum(1, dtype=torch.float64).cpu())
        total = count.clamp_min(1)
        return sums[0] / total, sums[1] / total, sums[2] / total

    low, high = torch.full_like(nu, NU_MIN), torch.full_like(nu, NU_MAX)
    shape = nu.clone()
    for _ in range(40):
        slope, curve = _score(shape, *means(shape))
        low, high = torch.where(slope > 0, shape, low), torch.where(slope > 0, high, shape)
        new = shape - slope / curve
        inside = (new > low) & (new < high) & torch.isfinite(new)
        new = torch.where(inside, new, (low * high).sqrt())
        done = bool(((new - shape).abs() <= 1e-9 * shape).all())
        shape = new
        if done:
            break
    mean, _, _ = means(shape)
    scale = top[:, 0].double().cpu() * (shape * mean) ** (1 / shape)
    some = count > 0
    return torch.where(some, shape, nu), torch.where(some, scale, beta)


def _score(nu: Tensor, mean: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """First and second derivative in nu of the log-likelihood per value, beta being the best one for nu."""
    a = 1 / nu
    log_mean, part = (nu * mean).log(), first / mean
    slope = a + a**2 * (torch.digamma(a) + log_mean) - a * part
    curve = -(a**2) - 2 * a**3 * (torch.digamma(a) + log_mean) - a**4 * torch.polygamma(1, a)
    curve = curve + a**2 * (a + 2 * part) - a * (second / mean - part.square())
    return slope, curve

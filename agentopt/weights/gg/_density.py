"""The generalized Gaussian itself: density, distribution function, quantiles, draws, moments. Mean 0.

    f(x) = nu / (2 beta Gamma(1/nu)) exp(-(|x| / beta)^nu)

nu = 2 is a Gaussian, nu = 1 a Laplacian, nu below 1 has a peak and heavy tails. Everything is worked out in float64;
`nu` and `sigma` may be numbers or tensors that broadcast against the data. Only functions that need torch import this.
"""

# torch's own annotations are partial: its values are checked by the tests, not by the type checker.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from agentopt.errors import UserError

Number = TypeVar("Number", float, Tensor)
SMALLEST_TAIL = 1e-200
"""Probability of both tails below which `quantile` no longer looks further out."""


def beta_of(nu: Number, sigma: float | Tensor = 1.0) -> Number:
    """The scale beta of a generalized Gaussian with this standard deviation: a number for numbers, else a tensor."""
    return _times(nu, sigma, 0.5)


def sigma_of(nu: Number, beta: float | Tensor = 1.0) -> Number:
    """The standard deviation: `beta sqrt(Gamma(3/nu) / Gamma(1/nu))`; a number for numbers, else a tensor."""
    return _times(nu, beta, -0.5)


def ratio(nu: Number) -> Number:
    """`E[x^2] / E[|x|]^2 = Gamma(1/nu) Gamma(3/nu) / Gamma(2/nu)^2`, falling in nu: 2 at nu = 1, pi/2 at nu = 2."""
    if isinstance(nu, Tensor):
        a = 1 / _shape(nu)
        return torch.exp(torch.lgamma(a) + torch.lgamma(3 * a) - 2 * torch.lgamma(2 * a))
    a = 1 / _checked(nu)
    return math.exp(math.lgamma(a) + math.lgamma(3 * a) - 2 * math.lgamma(2 * a))


def entropy(nu: Number, sigma: float | Tensor = 1.0) -> Number:
    """Differential entropy in nats. Quantized finely with a step D, a weight takes about `h / ln 2 - log2 D` bits."""
    if isinstance(nu, Tensor) or isinstance(sigma, Tensor):
        shape = _shape(nu)
        found = 1 / shape + torch.log(2 * beta_of(shape, sigma)) + torch.lgamma(1 / shape) - torch.log(shape)
        return found  # pyright: ignore[reportReturnType]  # a tensor, as the arguments
    return 1 / nu + math.log(2 * beta_of(nu, sigma)) + math.lgamma(1 / nu) - math.log(nu)


def logpdf(x: Tensor | float, nu: float | Tensor, sigma: float | Tensor = 1.0) -> Tensor:
    """Logarithm of the density at `x`, in the dtype of `x` (float64 for a number)."""
    data, shape = _data(x), _shape(nu)
    beta = beta_of(shape, sigma)
    found = torch.log(shape / (2 * beta)) - torch.lgamma(1 / shape) - (data.abs() / beta) ** shape
    return _as_asked(found, x)


def pdf(x: Tensor | float, nu: float | Tensor, sigma: float | Tensor = 1.0) -> Tensor:
    """Density at `x`, in the dtype of `x` (float64 for a number)."""
    return _as_asked(logpdf(_data(x), nu, sigma).exp(), x)


def cdf(x: Tensor | float, nu: float | Tensor, sigma: float | Tensor = 1.0) -> Tensor:
    """Probability of a value up to `x`, in the dtype of `x` (float64 for a number). The lower tail is exact."""
    data, shape = _data(x), _shape(nu)
    power = (data.abs() / beta_of(shape, sigma)) ** shape
    a, power = torch.broadcast_tensors(1 / shape, power)
    tail = torch.special.gammaincc(a, power) / 2
    return _as_asked(torch.where(data < 0, tail, 1 - tail), x)


def quantile(u: Tensor | float, nu: float | Tensor, sigma: float | Tensor = 1.0) -> Tensor:
    """The value that a draw stays below with probability `u`: the inverse of `cdf`, to about 1e-12 in float64.

    Args:
        u: probabilities; 0 and 1 give minus and plus infinity, what lies outside gives NaN. The lower tail is followed
            down to 1e-200; the upper one as far as `1 - u` can be told from 0.
        nu: shape.
        sigma: standard deviation.

    Returns:
        In the dtype of `u` (float64 for a number).
    """
    data, shape = _data(u), _shape(nu)
    tail = 2 * torch.minimum(data, 1 - data)
    power = gamma_tail_inverse(1 / shape, tail.clamp(SMALLEST_TAIL, 1.0))
    size = beta_of(shape, sigma) * power ** (1 / shape)
    size = torch.where(tail > 0, size, torch.where(tail == 0, math.inf, math.nan))
    return _as_asked(torch.where(data < 0.5, -size, size), u)


def gamma_tail_inverse(a: Tensor, tail: Tensor) -> Tensor:
    """The `y` for which the regularised upper incomplete gamma function Q(a, y) is `tail`; float64, broadcast.

    Newton on the logarithms: log P and log Q are concave in log y (the logarithm of a gamma variable has a log-concave
    density), so that steps from a proven bound on the far side of the root never jump over it. The smaller one of P
    and Q is used, which keeps both tails exact.

    Args:
        a: shape of the gamma variable, positive.
        tail: in (0, 1].
    """
    a, tail = torch.broadcast_tensors(a.double(), tail.double())
    upper = tail < 0.5
    body = 1 - tail
    log_goal = torch.log(torch.where(upper, tail, body))
    # P(a, y) <= y^a / Gamma(a + 1); and a gamma variable exceeds a + sqrt(2 a L) + L with probability exp(-L) at most.
    least = (log_goal + torch.lgamma(a + 1)) / a
    depth = -log_goal
    most = torch.log(a + torch.sqrt(2 * a * depth) + depth)
    t = torch.where(upper, most, least).clamp_min(-700.0)
    for _ in range(100):
        y = torch.exp(t)
        mass = torch.where(upper, torch.special.gammaincc(a, y), torch.special.gammainc(a, y)).clamp_min(1e-307)
        log_mass = torch.log(mass)
        slope = torch.exp(a * t - y - torch.lgamma(a) - log_mass)
        step = torch.where(upper, log_mass - log_goal, log_goal - log_mass) / slope
        step = torch.nan_to_num(step, nan=0.0, posinf=0.0, neginf=0.0).clamp(-50.0, 50.0)
        t = t + step
        if float(step.abs().max() if step.numel() else 0.0) < 1e-14:
            break
    return torch.where(body <= 0, torch.zeros_like(t), torch.exp(t))


def sample(
    shape: Sequence[int],
    nu: float,
    sigma: float = 1.0,
    *,
    generator: torch.Generator | int = 0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Independent draws.

    A generalized Gaussian is a uniform variable times a random width: `beta U Gamma(1 + 1/nu)^(1/nu)` with U in
    (-1, 1); the gamma variable is drawn by rejection (Marsaglia and Tsang, 2000).

    Args:
        shape: of the result.
        nu: shape of the density.
        sigma: standard deviation.
        generator: a torch generator, or the seed of a new one on the CPU.
        dtype: of the result.
    """
    _checked(nu)
    if isinstance(generator, int):
        generator = torch.Generator().manual_seed(generator)
    count = math.prod(shape)
    width = _gamma(1 + 1 / nu, count, generator).pow_(1 / nu)
    uniform = torch.rand(count, generator=generator, device=generator.device, dtype=torch.float64).mul_(2).sub_(1)
    return (width.mul_(uniform).mul_(beta_of(nu, sigma))).to(dtype).reshape(tuple(shape))


def _gamma(a: float, count: int, generator: torch.Generator) -> Tensor:
    """Draws of a gamma variable with shape a >= 1 and scale 1; float64."""
    device = generator.device
    d = a - 1 / 3
    c = 1 / math.sqrt(9 * d)
    out = torch.empty(count, dtype=torch.float64, device=device)
    missing = torch.arange(count, device=device)
    while len(missing):
        z = torch.randn(len(missing), generator=generator, device=device, dtype=torch.float64)
        u = torch.rand(len(missing), generator=generator, device=device, dtype=torch.float64)
        v = (1 + c * z) ** 3
        taken = (v > 0) & (torch.log(u) < z * z / 2 + d - d * v + d * torch.log(v.clamp_min(1e-300)))
        out[missing[taken]] = d * v[taken]
        missing = missing[~taken]
    return out


def _times(nu: Number, other: float | Tensor, power: float) -> Number:
    """`other * (Gamma(1/nu) / Gamma(3/nu))^power`."""
    if isinstance(nu, Tensor) or isinstance(other, Tensor):
        a = 1 / _shape(nu)
        return torch.exp(power * (torch.lgamma(a) - torch.lgamma(3 * a))) * other  # pyright: ignore[reportReturnType]
    a = 1 / _checked(nu)
    return other * math.exp(power * (math.lgamma(a) - math.lgamma(3 * a)))


def _shape(nu: float | Tensor) -> Tensor:
    if isinstance(nu, Tensor):
        return nu.double()
    return torch.tensor(_checked(nu), dtype=torch.float64)


def _checked(nu: float) -> float:
    if not (math.isfinite(nu) and nu > 0):
        raise UserError(f"nu, the shape of a generalized Gaussian: found {nu}, expected a positive number.")
    return float(nu)


def _data(x: Tensor | float) -> Tensor:
    return x.double() if isinstance(x, Tensor) else torch.tensor(x, dtype=torch.float64)


def _as_asked(found: Tensor, asked: Tensor | float) -> Tensor:
    keep = isinstance(asked, Tensor) and asked.dtype.is_floating_point
    return found.to(asked.dtype) if keep and isinstance(asked, Tensor) else found

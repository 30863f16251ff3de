"""The byte formats that `rf8-gg` is measured beside: what they make of a weight. None of them is in the package.

A peer gives the values it can store, in units of its scale, and the scale: their product is the weight it stands for,
and the entropy of the values is what an entropy coder would need for its codes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from agentopt.weights import gg
from agentopt.weights.gg import _density, _tables

Stored = tuple[Tensor, Tensor]
Peer = Callable[[Tensor], Stored]


def nearest(unit: Tensor, levels: Tensor) -> Tensor:
    """The nearest of rising levels."""
    return levels[torch.bucketize(unit, (levels[1:] + levels[:-1]) / 2)]


def peaks(weight: Tensor) -> Tensor:
    """The largest magnitude of every row, 1 for rows of zeros."""
    found = weight.abs().amax(1, keepdim=True)
    return torch.where(found > 0, found, 1.0)


def deviations(weight: Tensor) -> Tensor:
    return weight.square().mean(1, keepdim=True).sqrt().clamp(min=1e-30)


def power_of_two(weight: Tensor, largest: float) -> Tensor:
    return torch.tensor(2.0 ** math.ceil(math.log2(float(weight.abs().max()) / largest)))


def bf16(weight: Tensor) -> Stored:
    return weight.to(torch.bfloat16).float(), torch.tensor(1.0)


def float8(weight: Tensor, dtype: torch.dtype, largest: float, *, channel: bool) -> Stored:
    scale = (peaks(weight) if channel else weight.abs().max()) / largest
    return (weight / scale).clamp(-largest, largest).to(dtype).float(), scale


def e4m3(weight: Tensor) -> Stored:
    return float8(weight, torch.float8_e4m3fn, 448.0, channel=True)


def e4m3_tensor(weight: Tensor) -> Stored:
    return float8(weight, torch.float8_e4m3fn, 448.0, channel=False)


def e5m2_tensor(weight: Tensor) -> Stored:
    return float8(weight, torch.float8_e5m2, 57344.0, channel=False)


def int8(weight: Tensor) -> Stored:
    scale = peaks(weight) / 127
    return (weight / scale).round(), scale


def int8_groups(weight: Tensor, group: int) -> Stored:
    """A scale per `group` columns of a row (the last group may be short)."""
    rows, width = weight.shape
    padded = torch.nn.functional.pad(weight, (0, -width % group)).view(rows, -1, group)
    peak = padded.abs().amax(2, keepdim=True)
    scale = torch.where(peak > 0, peak, 1.0) / 127
    codes = (padded / scale).round().view(rows, -1)[:, :width]
    return codes, scale.expand_as(padded).reshape(rows, -1)[:, :width]


def rf8_reference(weight: Tensor) -> Stored:
    """The paper's rounding with an exponent of any size, which is more than a byte holds."""
    value = weight.double()
    sign = value.sign()
    first = torch.exp2(value.abs().log2().round())
    left = value.abs() - first
    below = left.abs().log2().round()
    kept = torch.where(first.log2() - below <= 4, left.sign() * torch.exp2(below), 0.0)
    found = torch.where(value == 0, 0.0, sign * (first + kept.nan_to_num()))
    return found.float(), torch.tensor(1.0)


def rf8_seven(weight: Tensor, *, channel: bool) -> Stored:
    """Nearest of the seven significands that the paper's rounding gives."""
    levels = _tables.rf8()
    levels = levels[(torch.arange(256) & 7) != 7].unique()
    scale = peaks(weight) / 1.875 if channel else power_of_two(weight, 1.9375)
    return nearest(weight / scale, levels), scale


def rf8_literal(weight: Tensor) -> Stored:
    """Two leading one-bits, no differences: the prose of the public description."""
    exponents = torch.arange(-40, 2)
    levels = (torch.tensor([1, 17 / 16, 9 / 8, 5 / 4, 3 / 2])[None] * torch.exp2(exponents)[:, None]).flatten()
    scale = power_of_two(weight, 1.5)
    return nearest(weight / scale, torch.cat([-levels.flip(0), torch.zeros(1), levels])), scale


def rf8(weight: Tensor, format: str = "rf8", *, channel: bool = True) -> Stored:
    encoded = gg.encode(weight, format, scale="channel" if channel else "tensor_pow2")  # pyright: ignore[reportArgumentType]
    return _tables.rf8()[encoded.codes.long()], encoded.scale


def e3m4(weight: Tensor) -> Stored:
    encoded = gg.encode(weight, "e3m4")
    return _tables.e3m4()[encoded.codes.long()], encoded.scale


def with_levels(weight: Tensor, levels: Tensor) -> Stored:
    scale = deviations(weight)
    return nearest(weight / scale, levels), scale


@functools.cache
def lloyd_max(nu: float, levels: int = 256, rounds: int = 200) -> Tensor:
    """Least squared error for a generalized Gaussian of unit variance: Lloyd's rounds on 262,144 quantiles."""
    count = 1 << 17
    tail = (torch.arange(count, dtype=torch.float64) + 0.5) / (2 * count)
    points = _density.quantile(tail, nu)
    points = torch.cat([points, -points.flip(0)])
    sums = torch.cat([points.new_zeros(1), points.cumsum(0)])
    found = gg.compander(nu, levels).double()
    for _ in range(rounds):
        edges = torch.searchsorted(points, (found[1:] + found[:-1]) / 2)
        edges = torch.cat([torch.tensor([0]), edges, torch.tensor([len(points)])])
        number = edges.diff()
        found = torch.where(number > 0, sums[edges].diff() / number.clamp(min=1), found)
    return found.float()


def equal_probability(nu: float, levels: int = 256) -> Tensor:
    return _density.quantile((torch.arange(levels, dtype=torch.float64) + 0.5) / levels, nu).float()


def entropy(values: Tensor) -> float:
    """Bits per weight of the distinct values."""
    share = values.flatten().unique(return_counts=True)[1].double()
    share = share / share.sum()
    return float(-(share * share.log2()).sum())

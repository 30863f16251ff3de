"""What a tensor costs on a uniform grid: bits per weight as entropy, Huffman code and exp-Golomb code.

Imports torch: only functions that need it import this module.
"""

# torch's own annotations are partial: its values are checked by the tests, not by the type checker.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from agentopt.errors import UserError

LARGEST_ORDER = 24


@dataclass(frozen=True, slots=True)
class Rates:
    """Bits per weight of the rounded weights, headers and tables not counted.

    Attributes:
        entropy: of order 0, the bound for a coder that looks at one weight at a time.
        huffman: the optimal prefix code.
        eg: exp-Golomb code of the order `k`, the best one.
        k: that order.
        zeros: share of weights that are rounded to 0.
    """

    entropy: float
    huffman: float
    eg: float
    k: int
    zeros: float


def bits_per_weight(tensor: Tensor, step: float) -> Rates:
    """Round to multiples of `step` (ties to even) and count.

    Raises:
        UserError: a step that is not positive, no weights, weights that are not finite, or a grid of over 2^40 values.
    """
    if not (math.isfinite(step) and step > 0):
        raise UserError(f"step: found {step}, expected a positive number.")
    if tensor.numel() == 0:
        raise UserError("bits per weight: found a tensor without elements, expected one or more.")
    grid = torch.round(tensor.detach().double().flatten() / step)
    if not bool(grid.abs().max() < 2**40):
        raise UserError(f"bits per weight: found weights that are not finite or above 2^40 steps of {step}.")
    values, counts = count(grid.long())
    total = tensor.numel()
    share = counts.double() / total
    eg, k = exp_golomb(values, counts)
    zeros = int(counts[values == 0].sum())
    return Rates(float(-(share * share.log2()).sum()), huffman(counts.tolist()) / total, eg / total, k, zeros / total)


def count(grid: Tensor) -> tuple[Tensor, Tensor]:
    """The different integers, rising, and how often each occurs."""
    low, high = int(grid.min()), int(grid.max())
    if high - low < 1 << 22:
        counts = torch.bincount(grid - low)
        values = counts.nonzero()[:, 0]
        return values + low, counts[values]
    values, counts = torch.unique(grid, return_counts=True)
    return values, counts


def exp_golomb(values: Tensor, counts: Tensor) -> tuple[int, int]:
    """Bits of all values under the best order k, and that k; signed values are mapped to 2q - 1 and -2q."""
    mapped = torch.where(values > 0, 2 * values - 1, -2 * values).double()
    best, order = math.inf, 0
    for k in range(LARGEST_ORDER + 1):
        # frexp: the exponent of an integer is one above the floor of its log2, exactly.
        bits = 2 * (torch.frexp(mapped + 2**k).exponent.long() - 1) - k + 1
        total = int((bits * counts).sum())
        if total < best:
            best, order = total, k
    return int(best), order


def huffman(counts: list[int]) -> int:
    """Bits of all symbols under a Huffman code; a single symbol takes 1 bit each."""
    if len(counts) == 1:
        return counts[0]
    heap = sorted(counts)
    bits = 0
    while len(heap) > 1:
        joined = heapq.heappop(heap) + heapq.heappop(heap)
        bits += joined
        heapq.heappush(heap, joined)
    return bits

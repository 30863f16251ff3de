"""The rounding of the paper that RF8 comes from (arXiv 2506.00486 v3), for parity: `rf8-strict`.

A weight is rounded to a power of two in the logarithm, and so is what is left of it; the second term is kept where it
is at most four binades below the first. That is not the nearest sum of two powers of two, and never 2 - 2^-4.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

_BOUNDARIES = (
    1 + 2**-4.5,
    1 + 2**-3.5,
    1 + 2**-2.5,
    1 + 2**-1.5,
    2 - 2**-1.5,
    2 - 2**-2.5,
    2 - 2**-3.5,
)
"""Of the significand. Above the last stands the next binade's 1; sqrt(2) is none: 3/2 is on both sides of it."""
_RESIDUALS = 7


def codes(unit: Tensor) -> Tensor:
    """The codes that the paper's rounding gives; 1.875 and below, 0x00 for what is nearer to it than to the least code.

    Args:
        unit: float32, any shape: weights divided by their scale.

    Returns:
        uint8 of the same shape.
    """
    boundaries, values = (part.to(unit.device) for part in _steps())
    found = values[torch.bucketize(unit.abs().contiguous(), boundaries)]
    return torch.where((unit < 0) & (found > 0), found + 128, found)


@functools.cache
def _steps() -> tuple[Tensor, Tensor]:
    """Boundaries float32 (B,), rising, and the code of each interval between them, uint8 (B + 1,)."""
    edges, values = [0.5 * 1.0625 * 2.0**-15], [0, 1]
    for exponent in range(16):
        for residual, edge in enumerate(_BOUNDARIES):
            code = exponent * 8 + residual + 1 if residual + 1 < _RESIDUALS else (exponent + 1) * 8
            if 1 < code < 128:
                edges.append(edge * 2.0 ** (exponent - 15))
                values.append(code)
    return _below(torch.tensor(edges, dtype=torch.float64)), torch.tensor(values, dtype=torch.uint8)


def _below(values: Tensor) -> Tensor:
    """The largest float32 not above each float64: a float32 is above the one where it is above the other."""
    single = values.to(torch.float32)
    return torch.where(single.double() > values, torch.nextafter(single, torch.tensor(-torch.inf)), single)

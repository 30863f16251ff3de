"""Nearest code in the two formats that are small floats, `rf8` and `e3m4`, by the leading bits of float32.

The boundary between neighbouring codes is a multiple of 2^-5 within its binade in both formats. So the sign, the
exponent and five bits of mantissa of a float32, as one integer, decide its code: a table of 2^14 bytes is the encoder.
The integer before the value's own is taken, so that a value on a boundary goes to the code nearer to zero.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from agentopt.weights.gg import _tables

LARGEST = {"rf8": 1.9375, "rf8-strict": 1.875, "e3m4": 31.0}
"""The largest value of each format: what the largest magnitude of a row is mapped to."""
_SHIFT = 18
_SIGN = 1 << 13


def codes(unit: Tensor, format: str) -> Tensor:
    """The nearest code of every value; ties go to the code nearer to zero, what rounds to zero becomes 0x00.

    Args:
        unit: float32, any shape: weights divided by their scale; what lies beyond the largest value saturates.
        format: `rf8` or `e3m4`.

    Returns:
        uint8 of the same shape.
    """
    bits = unit.contiguous().view(torch.int32)
    place = (bits & 0x7FFFFFFF).sub_(1).clamp_(min=0).bitwise_right_shift_(_SHIFT)
    place.bitwise_or_(bits.bitwise_right_shift(31).bitwise_and_(_SIGN))
    return _lookup(format).to(unit.device).index_select(0, place.flatten()).view(unit.shape)


@functools.cache
def _lookup(format: str) -> Tensor:
    """uint8 (2^14,): the code of all float32 that share sign, exponent and five bits of mantissa."""
    levels = (_tables.rf8() if format == "rf8" else _tables.e3m4())[:128].double()
    place = torch.arange(_SIGN, dtype=torch.int32)
    # The middle of the interval stands for all of it: no boundary lies inside.
    middle = ((place << _SHIFT) + (1 << (_SHIFT - 1))).view(torch.float32).double()
    boundaries = (levels[1:] + levels[:-1]) / 2
    found = torch.bucketize(middle.nan_to_num(nan=torch.inf), boundaries).to(torch.uint8)
    return torch.cat([found, torch.where(found > 0, found + 128, found)])

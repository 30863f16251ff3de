"""The value of every code. Only functions that need torch import this module.

A format is a table of 256 numbers: `weight = table[code] * scale`. Every decoder of the house (this lookup, the bit
tricks, the kernels, the plug-ins) gives these numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from agentopt.errors import UserError

RF8_SIGNIFICANDS = (16, 17, 18, 20, 24, 28, 30, 31)
"""Sixteenths. Each is a power of two plus or minus another one: 1, 1 + 1/16, 1 + 1/8, ... 2 - 1/8, 2 - 1/16."""


def rf8() -> Tensor:
    """RF8, sign 1, exponent 4, residual 3 (after arXiv 2506.00486 v3): `(-1)^s M[r] 2^(e-15)`, (256,) float32.

    0x00 and 0x80 are zero. Positive codes rise with the integer; the largest is 1.9375, no code is infinite or NaN.
    """
    code = torch.arange(256)
    significand = torch.tensor(RF8_SIGNIFICANDS, dtype=torch.float32)[code & 7] / 16
    value = torch.ldexp(significand, ((code >> 3) & 15) - 15)
    value = torch.where((code & 127) == 0, torch.zeros_like(value), value)
    return torch.where(code >= 128, -value, value) + 0.0


def e3m4() -> Tensor:
    """An 8-bit float with sign 1, exponent 3 (bias 3), mantissa 4, subnormals, no infinity, no NaN: (256,) float32.

    0x80 is zero. The largest is 31.
    """
    code = torch.arange(256)
    exponent, mantissa = (code >> 4) & 7, (code & 15).float()
    subnormal = mantissa * 2.0**-6
    normal = torch.ldexp(1 + mantissa / 16, exponent - 3)
    value = torch.where(exponent == 0, subnormal, normal)
    return torch.where(code >= 128, -value, value) + 0.0


def table(format: str, books: Tensor | None = None) -> Tensor:
    """The values of all codes, (K, 256) float32: one row per book, one row where the format is a formula.

    Raises:
        UserError: an unknown format, or `rf8-gg` without books.
    """
    if format in ("rf8", "rf8-strict"):
        return rf8()[None]
    if format == "e3m4":
        return e3m4()[None]
    if format == "rf8-gg":
        if books is None:
            raise UserError("rf8-gg: found no codebook, expected one or more with 255 or 256 levels.")
        return books.to(torch.float32)
    raise UserError(f"format: found {format!r}, expected rf8, rf8-strict, rf8-gg or e3m4.")

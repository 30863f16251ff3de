"""RF8 by its definition: the oracles of the code table, and the paper's rounding written out from its formulas."""

from __future__ import annotations

import math

import pytest
import torch

from agentopt.weights import gg
from agentopt.weights.gg import _minifloat, _strict, _tables
from agentopt.weights.gg._types import Format


def test_known_codes_decode_to_known_values() -> None:
    table = _tables.rf8()
    known = {0x78: 1, 0x7C: 1.5, 0x7F: 1.9375, 0x7E: 1.875, 0x70: 0.5, 0xF8: -1, 0x01: 1.0625 * 2**-15, 0: 0, 0x80: 0}
    assert {code: float(table[code]) for code in known} == known
    assert table[0x78].to(torch.bfloat16).view(torch.int16).item() == 0x3F80
    assert (table[1:128].diff() > 0).all()
    assert len(table.unique()) == 255


def test_the_bit_trick_gives_the_table_for_all_codes() -> None:
    found: list[int] = []
    for code in range(256):
        sign, exponent, residual = code >> 7, (code >> 3) & 15, code & 7
        mantissa = (0xFEC84210 >> 4 * residual) & 15
        found.append(0 if code & 127 == 0 else sign << 15 | (exponent + 112) << 7 | mantissa << 3)
    bits = torch.tensor(found, dtype=torch.int32).to(torch.int16)
    assert torch.equal(bits.view(torch.bfloat16).float(), _tables.rf8())


def test_e3m4_is_a_float_with_three_exponent_bits() -> None:
    table = _tables.e3m4()
    for code in range(256):
        exponent, mantissa = (code >> 4) & 7, code & 15
        value = math.ldexp(mantissa, -6) if exponent == 0 else math.ldexp(16 + mantissa, exponent - 7)
        assert float(table[code]) == (-value if code >= 128 else value)


@pytest.mark.parametrize(
    ("value", "code"),
    [
        (1.0, 0x78),
        (1.375, 0x7B),  # a tie between 1.25 and 1.5
        (1.3750001, 0x7C),
        (1.96875, 0x7F),
        (0.984375, 0x77),  # a tie between 31/32 and 1
        (0.98437506, 0x78),
        (5.0, 0x7F),
        (0.53125 * 2**-15, 0x00),
        (0.5312501 * 2**-15, 0x01),
        (2.0**-15, 0x01),
        (1e-45, 0x00),
    ],
)
def test_boundaries_underflow_and_saturation(value: float, code: int) -> None:
    unit = torch.tensor([value, -value])
    assert _minifloat.codes(unit, "rf8").tolist() == [code, code + 128 if code else 0]


def paper(value: float, keep: int = 4) -> float:
    """The nearest power of two in the logarithm, and the same of what is left, kept up to `keep` binades below."""
    a = round(math.log2(abs(value)))
    first = math.copysign(2.0**a, value)
    left = value - first
    if left == 0:
        return first
    b = round(math.log2(abs(left)))
    return first + math.copysign(2.0**b, left) if a - b <= keep else first


def test_strict_is_the_rounding_of_the_paper() -> None:
    generator = torch.Generator().manual_seed(0)
    size = torch.exp2(torch.rand(20_000, generator=generator) * 14 - 14) * 1.85
    sign = torch.randint(0, 2, size.shape, generator=generator) * 2 - 1
    unit = (size * sign).float()
    found = _tables.rf8()[_strict.codes(unit).long()]
    assert torch.equal(found, torch.tensor([paper(value) for value in unit.tolist()]))
    significands = torch.frexp(found.abs()).mantissa * 2
    assert set(significands.unique().tolist()) == {1, 17 / 16, 9 / 8, 5 / 4, 3 / 2, 7 / 4, 15 / 8}


def test_strict_differs_from_nearest_for_a_tenth_of_the_weights() -> None:
    unit = torch.randn(50_000, generator=torch.Generator().manual_seed(1)) / 4
    nearest, strict = _minifloat.codes(unit, "rf8"), _strict.codes(unit)
    seven = torch.where(nearest & 7 == 7, strict, nearest)  # the paper's rounding has no 31/16
    assert 0.08 < float((seven != strict).float().mean()) < 0.13
    assert not ((strict & 7) == 7).any()


@pytest.mark.parametrize(
    ("value", "code"),
    [(1.9, 0x7E), (100.0, 0x7E), (0.53125 * 2**-15, 0), (0.54 * 2**-15, 1), (2.0**-15, 1), (1.4, 0x7C), (1.43, 0x7C)],
)
def test_strict_saturates_and_underflows_like_rf8(value: float, code: int) -> None:
    assert _strict.codes(torch.tensor([value, -value])).tolist() == [code, code + 128 if code else 0]


def test_a_row_uses_the_whole_range() -> None:
    weight = torch.tensor([[0.5, -1.0, 0.01], [3e-5, 2e-5, 1e-5]])
    cases: tuple[tuple[Format, int], ...] = (("rf8", 0x7F), ("rf8-strict", 0x7E), ("e3m4", 0x7F))
    for format, code in cases:
        encoded = gg.encode(weight, format)
        assert (encoded.codes & 127).amax(1).tolist() == [code, code]
        assert gg.decode(encoded).abs().amax(1).tolist() == pytest.approx([1.0, 3e-5], rel=1e-6)

"""The codec: every code decodes alike, encode is the nearest code, and odd input does no harm."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agentopt.errors import UserError
from agentopt.weights import gg
from agentopt.weights.gg import _grid, _minifloat, _tables
from agentopt.weights.gg._types import Format

FORMATS = gg.FORMATS
FORMULAS = ("rf8", "rf8-strict", "e3m4")
FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def generalized(nu: float, *shape: int, seed: int = 0) -> torch.Tensor:
    """Draws of unit variance: sign * b * Gamma(1/nu)^(1/nu)."""
    generator = torch.Generator().manual_seed(seed)
    # A gamma variable of shape a is one of shape a + 1 times u^(1/a); the sum of exponentials covers whole shapes.
    whole = round(1 / nu)
    assert whole * nu == 1
    gamma = -torch.rand((whole, *shape), generator=generator, dtype=torch.float64).log().sum(0)
    sign = torch.randint(0, 2, shape, generator=generator) * 2 - 1
    return (sign * gamma ** (1 / nu) * math.sqrt(math.gamma(1 / nu) / math.gamma(3 / nu))).float()


def nearest(unit: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """Brute force in float64: the nearest level's value; of two as near the one nearer to zero."""
    levels = levels.double().unique()
    distance = (unit.double().flatten()[:, None] - levels).abs()
    # Levels in order of magnitude: argmin takes the first of equals.
    order = levels.abs().argsort(stable=True)
    return levels[order][distance[:, order].argmin(1)].view(unit.shape).float()


def rows_sqnr(weight: torch.Tensor, decoded: torch.Tensor) -> torch.Tensor:
    return 10 * torch.log10(weight.double().square().sum(1) / (weight - decoded).double().square().sum(1))


def unit_of(weight: torch.Tensor, encoded: gg.Encoded) -> torch.Tensor:
    return weight.float() / encoded.scale


@pytest.mark.parametrize("format", ["rf8", "e3m4"])
def test_encode_is_the_nearest_code_by_brute_force(format: Format) -> None:
    weight = torch.cat([normal(6, 700), normal(6, 300) * 1e-4, torch.zeros(6, 1)], 1)
    encoded = gg.encode(weight, format)
    table = _tables.table(format)[0]
    assert torch.equal(table[encoded.codes.long()], nearest(unit_of(weight, encoded), table))


@pytest.mark.parametrize("format", ["rf8", "e3m4"])
def test_all_boundaries_and_their_neighbours_go_to_the_nearest_code_and_ties_toward_zero(format: Format) -> None:
    table = _tables.table(format)[0]
    levels = table.double().unique()
    edge = ((levels[1:] + levels[:-1]) / 2).float()
    up, down = (torch.nextafter(edge, torch.full_like(edge, way * math.inf)) for way in (1, -1))
    unit = torch.cat([edge, up, down, table, torch.tensor([1e6, -1e6, 1e-40, -1e-40, 0.0, -0.0])])
    codes = _minifloat.codes(unit, format)
    assert torch.equal(table[codes.long()], nearest(unit, table))
    assert not (codes == 0x80).any()
    assert _minifloat.codes(torch.tensor([1e30, -1e30]), format).tolist() == [0x7F, 0xFF]


@pytest.mark.parametrize("books", ["default", "one", "even"])
def test_rf8_gg_gives_the_nearest_level_of_the_book_it_chose(books: str) -> None:
    chosen = None if books == "default" else gg.default_books()[3:4]
    if books == "even":  # 256 levels, not symmetric, one pair of them very close
        levels = torch.cat([torch.linspace(-3, -1e-3, 120), torch.zeros(1), torch.linspace(1e-5, 5, 135)])
        chosen = torch.cat([levels[None], gg.default_books()[:1]])
    weight = torch.cat([generalized(0.5, 8, 600), normal(8, 600, seed=1)])
    weight[:, ::50] = 0
    encoded = gg.encode(weight, books=chosen)
    assert encoded.books is not None
    assert (encoded.book_id is None) == (books == "one")
    decoded = gg.decode(encoded) / encoded.scale
    for row in range(len(weight)):
        book = encoded.books[0 if encoded.book_id is None else int(encoded.book_id[row])]
        levels = book if book[255] > book[254] else book[:255]
        expected = nearest(unit_of(weight, encoded)[row], levels)
        assert torch.allclose(decoded[row], expected, rtol=1e-6, atol=0)
    assert (gg.decode(encoded)[weight == 0] == 0).all()


def test_midpoints_of_a_book_go_toward_zero_on_both_sides() -> None:
    book = torch.cat([torch.arange(-127, 128) / 8, torch.zeros(1)])[None]
    weight = torch.cat([(torch.arange(-127, 127) + 0.5) / 8, torch.tensor([127 / 8, -127 / 8])])[None]
    codes = _grid.Grid.of(book).codes(weight, torch.zeros((1, 1), dtype=torch.int32))
    assert torch.equal(book[0][codes[0].long()], nearest(weight[0], book[0, :255]))
    assert (book[0][codes[0, :254].long()].abs() < weight[0, :254].abs()).all()


@pytest.mark.parametrize("format", FORMATS)
def test_decode_is_the_table_times_the_scale(format: Format) -> None:
    weight = generalized(0.5, 7, 260)
    encoded = gg.encode(weight, format)
    assert encoded.codes.dtype == torch.uint8 and encoded.scale.dtype == torch.float32
    table = _tables.table(format, encoded.books)
    book = torch.zeros(7, 1, dtype=torch.long) if encoded.book_id is None else encoded.book_id.long()
    expected = table[book, encoded.codes.long()] * encoded.scale
    assert torch.equal(gg.decode(encoded), expected)
    assert torch.equal(gg.decode(encoded, torch.bfloat16), expected.to(torch.bfloat16))


@pytest.mark.parametrize("format", FORMULAS)
def test_codes_are_idempotent_odd_and_monotone(format: Format) -> None:
    weight = torch.cat([normal(3, 500), -normal(3, 500)], 1)
    encoded = gg.encode(weight, format)
    decoded = gg.decode(encoded)
    assert torch.equal(gg.decode(gg.encode(decoded, format)), decoded)
    assert torch.equal(decoded[:, :500], -decoded[:, 500:])
    order = weight.argsort(1)
    assert (decoded.gather(1, order).diff(dim=1) >= 0).all()


@pytest.mark.parametrize("format", ["rf8", "e3m4"])
def test_every_code_but_minus_zero_survives_a_round_trip(format: Format) -> None:
    values = _tables.table(format)[0]
    codes = gg.encode(values[None], format).codes[0].tolist()
    assert codes == [0 if code == 0x80 else code for code in range(256)]


def test_every_level_of_every_book_survives_a_round_trip() -> None:
    books = gg.default_books()
    assert (books[:, 255] == 0).all()
    for book in books:
        encoded = gg.encode(book[None, :255] * 0.37, books=book[None])
        assert encoded.codes[0].tolist() == list(range(255))


@given(
    rows=st.lists(st.lists(FLOATS, min_size=3, max_size=3), min_size=1, max_size=4),
    format=st.sampled_from(FORMATS),
)
@settings(max_examples=100, deadline=None)
def test_any_finite_weights_give_finite_values_near_them(rows: list[list[float]], format: Format) -> None:
    weight = torch.tensor(rows)
    encoded = gg.encode(weight, format)
    decoded = gg.decode(encoded)
    assert torch.isfinite(encoded.scale).all() and (encoded.scale >= torch.finfo(torch.float32).tiny).all()
    assert torch.isfinite(decoded).all()
    assert (decoded[weight == 0] == 0).all()
    largest = weight.double().abs().amax(1, keepdim=True)
    # The step at the largest magnitude is at most an eighth of it, and never below that of the smallest scale.
    assert ((decoded.double() - weight.double()).abs() <= largest / 8 + 1e-38).all()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("factor", [1e30, 1e-30, 1e-40])
def test_huge_and_tiny_weights_keep_their_quality(format: Format, factor: float) -> None:
    weight = normal(4, 64)
    scaled = (weight.double() * factor).float()
    found = gg.sqnr(scaled, gg.decode(gg.encode(scaled, format)))
    if factor == 1e-40:  # subnormal numbers: the scale is the smallest normal one
        assert float((gg.decode(gg.encode(scaled, format)) - scaled).abs().max()) < 2**-126 * 0.0125
    else:
        assert found == pytest.approx(gg.sqnr(weight, gg.decode(gg.encode(weight, format))), abs=0.3)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_weight_that_is_not_finite_is_an_error_that_names_the_tensor(format: Format, bad: float) -> None:
    weight = normal(4, 64)
    weight[2, 5] = bad
    with pytest.raises(UserError, match=r"layers\.3\.q_proj"):
        gg.encode(weight, format, name="layers.3.q_proj")


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (1, 9), (9, 1), (3, 4, 5), (7,), (17, 33)])
@pytest.mark.parametrize("axis", [0, -1, None])
def test_shapes(format: Format, shape: tuple[int, ...], axis: int | None) -> None:
    weight = normal(*shape)
    before = weight.clone()
    encoded = gg.encode(weight, format, axis)
    expected = [1] * len(shape)
    if axis is not None:
        expected[axis] = shape[axis]
    assert tuple(encoded.scale.shape) == tuple(expected)
    assert encoded.book_id is None or encoded.book_id.shape == encoded.scale.shape
    assert encoded.axis == (None if axis is None else axis % len(shape))
    decoded = gg.decode(encoded)
    assert decoded.shape == weight.shape and encoded.codes.is_contiguous()
    assert torch.equal(weight, before)
    assert not weight.numel() or gg.sqnr(weight, decoded) > 25
    if axis == -1 and len(shape) == 2:
        assert torch.equal(decoded, gg.decode(gg.encode(weight.T, format)).T)


@pytest.mark.parametrize("format", FORMATS)
def test_rows_of_zeros_and_minus_zeros(format: Format) -> None:
    weight = torch.zeros(3, 8)
    weight[0] = -0.0
    weight[2, 1:] = -normal(7).abs()
    weight[2, 0] = -0.0
    encoded = gg.encode(weight, format)
    decoded = gg.decode(encoded)
    assert encoded.scale[:2].flatten().tolist() == [1, 1]
    assert (decoded[:2] == 0).all() and decoded[2, 0] == 0
    if format != "rf8-gg":
        assert (encoded.codes[:2] == 0).all() and encoded.codes[2, 0] == 0


@pytest.mark.parametrize("format", FORMATS)
def test_dtype_and_layout_do_not_matter(format: Format) -> None:
    weight = normal(24, 40).to(torch.bfloat16)
    plain = gg.encode(weight.float(), format)
    wide = torch.zeros(24, 80, dtype=torch.bfloat16)
    wide[:, ::2] = weight
    for other in (weight, wide[:, ::2], weight.T.contiguous().T, weight.double(), torch.nn.Parameter(weight)):
        found = gg.encode(other, format)
        assert torch.equal(found.codes, plain.codes) and torch.equal(found.scale, plain.scale)
        assert not found.scale.requires_grad


@pytest.mark.parametrize("format", ["rf8", "rf8-strict"])
def test_a_power_of_two_scale_covers_the_tensor_and_no_more(format: Format) -> None:
    for seed in range(5):
        weight = normal(5, 31, seed=seed) * 10.0 ** (seed - 2)
        encoded = gg.encode(weight, format, scale="tensor_pow2")
        assert encoded.axis is None and tuple(encoded.scale.shape) == (1, 1)
        scale, largest = float(encoded.scale), float(weight.abs().max())
        assert math.frexp(scale)[0] == 0.5
        assert 1.9375 / 2 * scale < largest <= 1.9375 * scale
    assert float(gg.encode(torch.tensor([[1.9375]]), format, scale="tensor_pow2").scale) == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"format": "rf7"}, "rf8-gg"),
        ({"scale": "row"}, "tensor_pow2"),
        ({"format": "e3m4", "scale": "tensor_pow2"}, "tensor_pow2"),
        ({"axis": 2}, "axis"),
        ({"format": "rf8", "books": gg.default_books()}, "rf8-gg"),
        ({"books": gg.default_books()[:, :255]}, "256"),
        ({"books": gg.default_books().flip(1)}, "rising"),
        ({"books": gg.default_books() + 0.001}, "exactly 0"),
        ({"column_weight": torch.ones(3)}, r"\(8,\)"),
        ({"column_weight": -torch.ones(8)}, "negative"),
        ({"column_weight": torch.zeros(8)}, "zeros only"),
    ],
)
def test_wrong_arguments_are_told(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        gg.encode(normal(4, 8), **arguments)


def test_whole_numbers_are_no_weights() -> None:
    with pytest.raises(UserError, match="int64"):
        gg.encode(torch.ones(2, 2, dtype=torch.int64))


def test_sqnr_and_entropy() -> None:
    weight = torch.tensor([3.0, 4.0])
    assert gg.sqnr(weight, torch.tensor([3.0, 3.5])) == pytest.approx(20)
    assert gg.sqnr(weight, weight) == math.inf
    with pytest.raises(UserError, match="shape"):
        gg.sqnr(weight, weight[:1])
    codes = torch.tensor([0, 0, 7, 255], dtype=torch.uint8)
    assert gg.code_entropy(codes) == pytest.approx(1.5)
    assert gg.code_entropy(codes[:0]) == 0


@pytest.mark.parametrize(("nu", "strict", "least"), [(0.5, (27.8, 28.4), 39.0), (1.0, (27.8, 28.3), 41.3)])
def test_quality_of_generalized_gaussian_rows(nu: float, strict: tuple[float, float], least: float) -> None:
    weight = generalized(nu, 192, 1024) * 0.02
    found = {format: gg.sqnr(weight, gg.decode(gg.encode(weight, format))) for format in FORMATS}
    assert found["rf8"] >= 28.3
    assert strict[0] <= found["rf8-strict"] <= strict[1]
    assert 37.3 <= found["e3m4"] <= 38.1
    assert found["rf8-gg"] >= least

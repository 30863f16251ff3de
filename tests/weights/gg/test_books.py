"""Books of rf8-gg: the compander against its definition, the search against INT8, and what refinement may change."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agentopt.errors import UserError
from agentopt.weights import gg
from agentopt.weights.gg import _grid, _search

special = pytest.importorskip("scipy.special")


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def squared(weight: torch.Tensor, decoded: torch.Tensor, column_weight: torch.Tensor | None = None) -> torch.Tensor:
    lost = (weight.double() - decoded.double()).square()
    return (lost if column_weight is None else lost * column_weight.double()).sum(1)


def int8(weight: torch.Tensor) -> torch.Tensor:
    """Per-row absmax with 255 levels."""
    scale = weight.double().abs().amax(1, keepdim=True) / 127
    return torch.where(scale > 0, (weight.double() / scale).round() * scale, 0.0)


@pytest.mark.parametrize("nu", [0.5, 0.8, 1.0, 2.0, 5.0])
@pytest.mark.parametrize("levels", [255, 256, 15])
def test_the_compander_is_the_formula(nu: float, levels: int) -> None:
    u = (torch.arange(levels).double() + 0.5) / levels
    size = torch.from_numpy(special.gammaincinv(1 / nu, (2 * u - 1).abs().numpy())) ** (1 / nu)
    b = math.sqrt(math.gamma(1 / nu) / math.gamma(3 / nu))
    expected = torch.sign(u - 0.5) * b * 3 ** (1 / nu) * size
    found = gg.compander(nu, levels)
    assert torch.allclose(found.double(), expected, rtol=1e-6, atol=1e-7)
    assert torch.equal(found, -found.flip(0)) and (found.diff() > 0).all()
    assert (levels % 2 == 1) == bool((found == 0).any())


def test_outermost_levels_and_the_uniform_book() -> None:
    outermost = [round(float(gg.compander(nu)[-1]), 1) for nu in (0.5, 0.8, 1.0, 1.3, 2.0)]
    assert outermost == [48.8, 17.2, 11.8, 8.1, 5.0]
    uniform = gg.compander(math.inf)
    assert torch.allclose(uniform, math.sqrt(3) * torch.arange(-127, 128) / 127, rtol=1e-6)
    assert float(uniform[127]) == 0
    books = gg.default_books()
    assert books.shape == (len(gg.NUS), 256) and _grid.level_counts(books) == [255] * len(gg.NUS)
    books[0, 0] = 7
    assert gg.default_books()[0, 0] != 7


@pytest.mark.parametrize(("nu", "levels"), [(0.0, 255), (-1.0, 255), (math.nan, 255), (1.0, 1), (1.0, 257)])
def test_a_compander_that_cannot_be_is_refused(nu: float, levels: int) -> None:
    with pytest.raises(UserError, match="compander"):
        gg.compander(nu, levels)


@given(
    rows=st.lists(st.lists(st.floats(-1000, 1000, width=32), min_size=24, max_size=24), min_size=1, max_size=3),
    outlier=st.floats(1, 1e6, width=32),
    seed=st.integers(0, 100),
    weighed=st.booleans(),
)
@settings(max_examples=80, deadline=None)
def test_a_row_is_never_worse_than_per_row_int8(
    rows: list[list[float]], outlier: float, seed: int, weighed: bool
) -> None:
    weight = torch.tensor(rows)
    weight[0, 3] *= outlier
    column_weight = normal(24, seed=seed).abs() + 1e-3 if weighed else None
    decoded = gg.decode(gg.encode(weight, column_weight=column_weight))
    # Both are computed in float32: a weight that INT8 meets exactly may be off by some units in the last place.
    rounding = 24 * (weight.double().abs().amax(1) * 1e-6) ** 2 * (1 if column_weight is None else column_weight.max())
    best = squared(weight, int8(weight), column_weight)
    assert (squared(weight, decoded, column_weight) <= best * (1 + 1e-4) + rounding + 1e-80).all()


def test_wide_rows_with_outliers_are_never_worse_than_int8() -> None:
    weight = normal(24, 1500)
    weight[::2, :7] *= 10
    weight[::3, 100] = 300
    decoded = gg.decode(gg.encode(weight))
    ratio = squared(weight, decoded) / squared(weight, int8(weight))
    assert (ratio <= 1 + 1e-4).all() and float(ratio.median()) < 0.7


def test_the_search_on_a_part_of_the_columns_is_as_good_as_on_all(monkeypatch: pytest.MonkeyPatch) -> None:
    gaussian = normal(64, 2048)
    for weight in (gaussian, gaussian.sign() * gaussian.square(), gaussian**3):
        quick = gg.sqnr(weight, gg.decode(gg.encode(weight)))
        with monkeypatch.context() as patched:
            patched.setattr(_search, "SAMPLE", 10_000)
            patched.setattr(_search, "FINALISTS", 10)
            assert quick > gg.sqnr(weight, gg.decode(gg.encode(weight))) - 0.1


def test_heavier_tails_take_heavier_books() -> None:
    gaussian = normal(32, 1024)
    books = [gg.encode(weight).book_id for weight in (gaussian**3, gaussian, gaussian.clamp(-1, 1))]
    chosen = [float(book.float().mean()) for book in books if book is not None]
    assert chosen[0] < 3 < chosen[1] < chosen[2]


def test_column_weights_move_the_error_to_where_it_counts_less() -> None:
    weight = normal(64, 256)
    column_weight = torch.cat([torch.full((32,), 100.0), torch.full((224,), 0.01)])
    weight[:, 32:] *= 8
    plain, weighed = (gg.decode(gg.encode(weight, column_weight=each)) for each in (None, column_weight))
    assert squared(weight, weighed, column_weight).sum() < 0.5 * squared(weight, plain, column_weight).sum()
    assert squared(weight, weighed).sum() > squared(weight, plain).sum()
    same = gg.decode(gg.encode(weight, column_weight=torch.full((256,), 3.0)))
    assert gg.sqnr(weight, same) == pytest.approx(gg.sqnr(weight, plain), abs=0.02)


def test_columns_of_weight_zero_may_be_clipped() -> None:
    weight = normal(4, 32)
    weight[:, 0] = 1e6
    column_weight = torch.ones(32)
    column_weight[0] = 0
    decoded = gg.decode(gg.encode(weight, column_weight=column_weight))
    assert gg.sqnr(weight[:, 1:], decoded[:, 1:]) > 20


def test_sampled_rows() -> None:
    weight = normal(50, 6).to(torch.bfloat16)
    found = gg.sample_rows(weight, 10, seed=3)
    assert found.shape == (10, 6) and found.dtype == torch.float32
    assert torch.equal(found, gg.sample_rows(weight, 10, seed=3))
    assert not torch.equal(found, gg.sample_rows(weight, 10, seed=4))
    assert all(any(torch.equal(row, other.float()) for other in weight) for row in found)
    assert torch.equal(gg.sample_rows(weight, 100), weight.float())
    for wrong, rows in ((weight[0], 10), (weight, 0)):
        with pytest.raises(UserError, match=r"expected a weight \(out, in\) and 1 row or more"):
            gg.sample_rows(wrong, rows)


def test_refined_books_fit_the_weights_better_and_keep_their_promises() -> None:
    # Skewed: no generalized Gaussian.
    weight = normal(200, 384).abs() ** 1.5 - 0.3
    weight[:, ::10] = 0
    books = gg.default_books()
    refined = gg.refine(books, [weight[:100], weight[100:, :200], weight[:0]])
    assert refined.shape == books.shape
    assert torch.equal(refined[-1], books[-1])
    assert ((books == 0) == (refined == 0)).all()
    before, after = (gg.sqnr(weight, gg.decode(gg.encode(weight, books=each))) for each in (books, refined))
    assert after > before + 0.05
    assert (gg.decode(gg.encode(weight, books=refined))[:, ::10] == 0).all()


def test_refining_on_nothing_changes_nothing() -> None:
    books = gg.default_books()
    assert torch.equal(gg.refine(books, []), books)
    with pytest.raises(UserError, match="column weights"):
        gg.refine(books, [normal(2, 3)], column_weights=[])

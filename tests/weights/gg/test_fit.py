"""Fits: on the mark, not moved by an outlier, and defined for odd input."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agentopt.errors import UserError
from agentopt.weights import gg


@pytest.mark.parametrize(("nu", "spread"), [(0.5, 0.020), (0.8, 0.026), (1.3, 0.040), (2.0, 0.075)])
@pytest.mark.parametrize("options", [{}, {"trim": 0.0}, {"trim": 0.05}, {"method": "ml"}])
def test_rows_of_4096_give_their_shape(nu: float, spread: float, options: dict[str, object]) -> None:
    rows = gg.sample((60, 4096), nu, 0.02, generator=5)
    found = gg.fit(rows, axis=0, **options)  # pyright: ignore[reportArgumentType]
    assert found.nu.shape == (60,)
    # Three standard errors of the mean, and the small bias of the plain ratio.
    assert float(found.nu.mean()) == pytest.approx(nu, abs=3 * 1.5 * spread / math.sqrt(60) + 0.004)
    assert float(found.nu.std()) < 1.6 * spread
    assert float(found.sigma.mean()) == pytest.approx(0.02, rel=0.01)
    assert torch.allclose(found.sigma.double(), gg.sigma_of(found.nu.double(), found.beta.double()).double(), rtol=1e-5)


def test_rows_columns_and_whole_agree() -> None:
    weight = gg.sample((3, 500), 1.0, generator=2)
    rows = gg.fit(weight, axis=0)
    assert [float(one) for one in rows.nu] == pytest.approx([gg.fit(row).nu for row in weight])
    assert torch.equal(gg.fit(weight.T, axis=1).nu, rows.nu)
    assert torch.equal(gg.fit(weight, axis=-2).nu, rows.nu)
    assert gg.fit(weight.double()).nu == pytest.approx(gg.fit(weight).nu)


def test_one_outlier_in_a_hundred_thousand_does_not_matter() -> None:
    clean = gg.sample((100_000,), 1.3, generator=1)
    dirty = clean.clone()
    dirty[77] = 1000.0
    assert gg.fit(dirty).nu == pytest.approx(gg.fit(clean).nu, rel=0.01)
    assert gg.fit(dirty).sigma == pytest.approx(gg.fit(clean).sigma, rel=0.01)
    assert gg.fit(dirty, trim=0.0).nu < 0.3  # what the plain ratio makes of it


def test_the_plain_ratio_is_inverted_to_rounding() -> None:
    values = torch.tensor([1.0, -2.0, 3.0, 0.5, 0.0, 7.0], dtype=torch.float64)
    found = gg.fit(values, trim=0.0)
    assert gg.ratio(found.nu) == pytest.approx(float(6 * values.square().sum() / values.abs().sum() ** 2), rel=1e-12)
    assert found.sigma == pytest.approx(float(values.square().mean().sqrt()))


def test_likelihood_has_its_maximum_there() -> None:
    values = gg.sample((2000,), 0.8, generator=3).double()
    found = gg.fit(values, method="ml")
    best = float(gg.logpdf(values, found.nu, found.sigma).sum())
    for nu, beta in ((1.001, 1.0), (0.999, 1.0), (1.0, 1.001), (1.0, 0.999)):
        other = gg.sigma_of(found.nu * nu, found.beta * beta)
        assert float(gg.logpdf(values, found.nu * nu, other).sum()) < best


def test_odd_input_has_defined_results() -> None:
    for method in ("moments", "ml"):
        zeros = gg.fit(torch.zeros(4, 5), method=method)  # pyright: ignore[reportArgumentType]
        assert (zeros.nu, zeros.beta, zeros.sigma) == (2.0, 0.0, 0.0)
        rows = gg.fit(torch.tensor([[0.0, 0, 0], [2.0, -2, 2]]), axis=0, method=method)  # pyright: ignore[reportArgumentType]
        assert rows.nu.tolist() == [2.0, pytest.approx(20.0)]
    assert gg.fit(torch.tensor(3.0)).nu == 20.0
    assert gg.fit(torch.tensor([5.0, -5.0])).sigma == pytest.approx(5.0)
    sparse = torch.zeros(10_000)
    sparse[3] = 2.0
    assert (gg.fit(sparse).nu, gg.fit(sparse).sigma) == (0.1, pytest.approx(0.02))
    assert gg.fit(torch.arange(-50, 50, dtype=torch.int64)).nu > 5
    assert gg.fit(gg.sample((2000,), 1.0).bfloat16()).nu == pytest.approx(1.0, abs=0.15)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=40),
    st.sampled_from(["moments", "ml"]),
)
def test_any_finite_values_have_a_fit(values: list[float], method: str) -> None:
    found = gg.fit(torch.tensor(values), method=method)  # pyright: ignore[reportArgumentType]
    assert 0.1 <= found.nu <= 20.0
    assert math.isfinite(found.beta)
    assert math.isfinite(found.sigma)
    assert (found.sigma > 0) == any(values)


def test_mistakes_are_named() -> None:
    one = torch.ones(3, 3)
    for call in (
        lambda: gg.fit(torch.zeros(0, 3)),
        lambda: gg.fit(torch.tensor([1.0, math.nan])),
        lambda: gg.fit(torch.tensor([1.0, -math.inf])),
        lambda: gg.fit(one, axis=2),
        lambda: gg.fit(one, trim=0.5),
        lambda: gg.fit(one, method="ml", trim=0.1),
        lambda: gg.fit(one, method="guess"),  # pyright: ignore[reportArgumentType]
    ):
        with pytest.raises(UserError, match="found"):
            call()

"""The generalized Gaussian against scipy's gennorm, and its draws."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import gennorm  # pyright: ignore[reportMissingTypeStubs]

from agentopt.errors import UserError
from agentopt.weights import gg

SHAPES = (0.3, 0.5, 1.0, 1.3, 2.0, 4.0, 20.0)


@pytest.mark.parametrize("nu", SHAPES)
def test_density_and_distribution_are_scipys(nu: float) -> None:
    x = torch.linspace(-9, 9, 181, dtype=torch.float64) * 0.02
    beta = gg.beta_of(nu, 0.02)
    assert torch.allclose(gg.pdf(x, nu, 0.02), torch.tensor(gennorm.pdf(x.numpy(), nu, scale=beta)), rtol=1e-10)
    assert torch.allclose(gg.logpdf(x, nu, 0.02), torch.tensor(gennorm.logpdf(x.numpy(), nu, scale=beta)), rtol=1e-10)
    assert torch.allclose(gg.cdf(x, nu, 0.02), torch.tensor(gennorm.cdf(x.numpy(), nu, scale=beta)), rtol=1e-12)
    assert gg.entropy(nu, 0.02) == pytest.approx(gennorm.entropy(nu, scale=beta), abs=1e-10)
    assert gg.sigma_of(nu, beta) == pytest.approx(0.02)


@pytest.mark.parametrize("nu", SHAPES)
def test_quantile_is_exact_in_the_middle_and_far_out(nu: float) -> None:
    u = torch.cat(
        [
            torch.logspace(-200, -2, 300, dtype=torch.float64),
            torch.linspace(0.01, 0.99, 99, dtype=torch.float64),
            1 - torch.logspace(-15, -3, 50, dtype=torch.float64),
        ]
    )
    expected = torch.tensor(gennorm.ppf(u.numpy(), nu, scale=gg.beta_of(nu)))
    found = gg.quantile(u, nu)
    # scipy's own tail of very small shapes is the less exact one; there the way back is the test.
    assert torch.allclose(found, expected, rtol=1e-12, atol=1e-14)
    assert float(((gg.cdf(found, nu) - u).abs() / u).max()) < 1e-11


def test_quantile_at_the_ends() -> None:
    u = torch.tensor([0.0, 0.5, 1.0, -0.1, 1.1, math.nan])
    found = gg.quantile(u, 0.7, 3.0)
    assert found.dtype == torch.float32
    assert found[:3].tolist() == [-math.inf, 0.0, math.inf]
    assert bool(found[3:].isnan().all())
    assert float(gg.quantile(0.8, 1.0)) == pytest.approx(-math.log(0.4) / math.sqrt(2))
    assert gg.quantile(torch.zeros(0), 1.0).shape == (0,)


def test_published_numbers() -> None:
    for nu, ratio in {0.1: 216.83, 0.5: 3.3333, 1.0: 2.0, 1.3: 1.7844, 2.0: math.pi / 2, 3.0: 1.4610}.items():
        assert gg.ratio(nu) == pytest.approx(ratio, rel=1e-4)
        assert float(gg.ratio(torch.tensor(nu))) == pytest.approx(gg.ratio(nu))
    assert gg.entropy(1.0, gg.sigma_of(1.0, 0.3)) == pytest.approx(1 + math.log(0.6))
    assert gg.entropy(2.0, gg.sigma_of(2.0, 0.3)) == pytest.approx(0.5 + math.log(0.3 * math.sqrt(math.pi)))


def test_arguments_broadcast() -> None:
    nu = torch.tensor([[0.5], [2.0]])
    found = gg.quantile(torch.tensor([0.1, 0.2, 0.9]), nu, torch.tensor([[1.0], [2.0]]))
    assert found.shape == (2, 3)
    assert found[1, 2] == pytest.approx(2.0 * gennorm.ppf(0.9, 2.0, scale=math.sqrt(2)))
    assert float(gg.entropy(nu)[0, 0]) == pytest.approx(gg.entropy(0.5))


@pytest.mark.parametrize("nu", [0.5, 1.0, 2.0, 5.0])
def test_draws_follow_the_distribution(nu: float) -> None:
    drawn = gg.sample((300, 200), nu, 0.7, generator=4, dtype=torch.float64).flatten().sort().values
    # Kolmogorov and Smirnov: 1.63 / sqrt(n) is exceeded by one in a hundred.
    share = torch.arange(1, len(drawn) + 1) / len(drawn)
    assert float((gg.cdf(drawn, nu, 0.7) - share).abs().max()) < 1.63 / math.sqrt(len(drawn))
    assert float(drawn.std()) == pytest.approx(0.7, rel=0.02)


def test_draws_depend_on_the_seed_alone() -> None:
    before = torch.get_rng_state()
    first, again, other = (gg.sample((5, 7), 1.0, generator=seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.dtype == torch.float32
    assert torch.equal(before, torch.get_rng_state())
    assert gg.sample((0, 3), 1.0).shape == (0, 3)


@pytest.mark.parametrize("nu", [0.0, -1.0, math.inf, math.nan])
def test_shapes_that_are_none_are_refused(nu: float) -> None:
    for call in (gg.beta_of, gg.ratio, lambda one: gg.quantile(0.5, one), lambda one: gg.sample((2,), one)):
        with pytest.raises(UserError, match="positive number"):
            call(nu)


def test_rates_of_known_grids() -> None:
    rates = gg.bits_per_weight(torch.tensor([0.0, 0.0, 1.0, -1.0]) * 2**-10, 2**-10)
    assert (rates.entropy, rates.huffman, rates.zeros) == (1.5, 1.5, 0.5)
    assert (rates.k, rates.eg) == (0, (1 + 1 + 3 + 3) / 4)
    constant = gg.bits_per_weight(torch.full((8,), 3.0), 0.5)
    assert (constant.entropy, constant.huffman) == (0.0, 1.0)
    drawn = gg.bits_per_weight(gg.sample((500, 1000), 1.0, 0.02, generator=3), 2**-10)
    assert drawn.entropy == pytest.approx(6.30, abs=0.02)
    assert (drawn.huffman, drawn.eg, drawn.k) == (pytest.approx(6.32, abs=0.03), pytest.approx(6.58, abs=0.03), 4)


def test_exp_golomb_order_is_the_best_one() -> None:
    values = torch.round(gg.sample((4000,), 0.5, 30.0, generator=1)).long().tolist()

    def bits(k: int) -> int:
        mapped = [2 * value - 1 if value > 0 else -2 * value for value in values]
        return sum(2 * ((one + 2**k).bit_length() - 1) - k + 1 for one in mapped)

    rates = gg.bits_per_weight(torch.tensor(values).float(), 1.0)
    best = min(range(20), key=bits)
    assert (rates.k, rates.eg * 4000) == (best, pytest.approx(bits(best)))


def test_rates_refuse_what_cannot_be_counted() -> None:
    for tensor, step in ((torch.zeros(0), 1.0), (torch.ones(2), 0.0), (torch.tensor([math.nan]), 1.0)):
        with pytest.raises(UserError):
            gg.bits_per_weight(tensor, step)

"""Our statistics against scipy's, plus the cases scipy leaves open."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from scipy import stats

from agentopt.errors import UserError
from agentopt.evaluation._statistics import (
    Alternative,
    binomial_lower_bound,
    bootstrap_interval,
    mcnemar_exact,
    paired_test,
    sign_flip_test,
    smallest_detectable_difference,
    wilcoxon,
)


@pytest.mark.parametrize("case", range(6))
def test_bca_interval_agrees_with_scipy(case: int) -> None:
    rng = np.random.default_rng(case)
    n = int(rng.integers(20, 200))
    x = rng.normal(0.1, 1, n) if case % 2 else rng.exponential(0.3, n) - 0.2
    ours = bootstrap_interval(x.tolist(), seed=case)
    theirs = stats.bootstrap((x,), np.mean, n_resamples=9999, method="BCa", rng=np.random.default_rng(99))
    # The simulation error of an end point is about 2 % of the width at 9,999 resamples.
    width = theirs.confidence_interval.high - theirs.confidence_interval.low
    assert ours[0] == pytest.approx(theirs.confidence_interval.low, abs=0.06 * width)
    assert ours[1] == pytest.approx(theirs.confidence_interval.high, abs=0.06 * width)


def test_bca_interval_of_zero_one_differences_agrees_with_scipy() -> None:
    rng = np.random.default_rng(3)
    x = rng.choice([-1.0, 0.0, 1.0], size=150, p=[0.1, 0.7, 0.2])
    ours = bootstrap_interval(x, seed=1)
    theirs = stats.bootstrap((x,), np.mean, n_resamples=9999, method="BCa", rng=np.random.default_rng(5))
    assert ours[0] == pytest.approx(theirs.confidence_interval.low, abs=0.014)
    assert ours[1] == pytest.approx(theirs.confidence_interval.high, abs=0.014)


def test_interval_is_reproducible_and_widens_with_confidence() -> None:
    x = np.random.default_rng(0).normal(size=40)
    assert bootstrap_interval(x, seed=4) == bootstrap_interval(x, seed=4)
    narrow, wide = bootstrap_interval(x, confidence=0.8), bootstrap_interval(x, confidence=0.99)
    assert wide[0] < narrow[0] < narrow[1] < wide[1]


def test_interval_of_degenerate_samples_is_the_mean() -> None:
    assert bootstrap_interval([0.25]) == (0.25, 0.25)
    assert bootstrap_interval([0.0] * 50) == (0.0, 0.0)
    assert bootstrap_interval([1.0] * 50) == (1.0, 1.0)


def test_interval_with_one_discordant_row_is_finite_and_ordered() -> None:
    low, high = bootstrap_interval([0.0] * 99 + [1.0])
    assert math.isfinite(low) and math.isfinite(high) and 0.0 <= low <= high <= 1.0


@pytest.mark.parametrize("values", [[], [math.nan], [math.inf, 1.0]])
def test_interval_refuses_empty_and_non_finite_input(values: list[float]) -> None:
    with pytest.raises(UserError):
        bootstrap_interval(values)


@pytest.mark.parametrize("n", [2, 5, 12, 16])
def test_sign_flip_is_exact_for_small_samples(n: int) -> None:
    x = np.random.default_rng(n).normal(0.3, 1, n)
    theirs = stats.permutation_test(
        (x,), lambda v, axis: np.mean(v, axis=axis), permutation_type="samples", vectorized=True, n_resamples=10**6
    )
    # scipy doubles the smaller tail; the sign-flip null is symmetric, so both give the same number.
    assert sign_flip_test(x) == pytest.approx(theirs.pvalue)


def test_sign_flip_monte_carlo_is_near_the_exact_value_and_never_zero() -> None:
    x = np.random.default_rng(1).normal(0.25, 1, 60)
    theirs = stats.permutation_test(
        (x,),
        lambda v, axis: np.mean(v, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=20_000,
        rng=np.random.default_rng(0),
    )
    assert sign_flip_test(x, seed=2) == pytest.approx(theirs.pvalue, abs=0.012)
    assert sign_flip_test(x, seed=2) == sign_flip_test(x, seed=2)
    assert 0 < sign_flip_test([1.0 + i * 1e-3 for i in range(200)]) < 1e-3
    assert sign_flip_test([0.0, 0.0]) == 1.0


@pytest.mark.parametrize(("b", "c"), [(0, 0), (1, 0), (5, 5), (3, 14), (40, 22), (300, 200)])
def test_mcnemar_equals_the_exact_binomial_test(b: int, c: int) -> None:
    theirs = stats.binomtest(b, b + c, 0.5).pvalue if b + c else 1.0
    assert mcnemar_exact(b, c) == pytest.approx(theirs)


@pytest.mark.parametrize("alternative", ["two-sided", "less", "greater"])
@pytest.mark.parametrize("n", [1, 6, 25, 45])
def test_wilcoxon_without_ties_equals_scipy_exact(n: int, alternative: Alternative) -> None:
    x = np.random.default_rng(n).normal(0.2, 1, n)
    theirs: Any = stats.wilcoxon(x, method="exact", alternative=alternative)
    assert wilcoxon(x, alternative) == pytest.approx(theirs.pvalue)


@pytest.mark.parametrize("alternative", ["two-sided", "less", "greater"])
def test_wilcoxon_large_samples_equal_scipy_normal_approximation(alternative: Alternative) -> None:
    x = np.round(np.random.default_rng(8).normal(0.1, 1, 120), 1)
    theirs: Any = stats.wilcoxon(x, method="approx", alternative=alternative)
    assert wilcoxon(x, alternative) == pytest.approx(theirs.pvalue, rel=1e-6)


def test_wilcoxon_with_ties_is_the_exact_conditional_test() -> None:
    x = np.array([1.0, 1.0, -1.0, 0.5, 0.5, 0.5, 2.0, 0.0])
    ranks = stats.rankdata(np.abs(x[x != 0]))
    signs = (np.arange(2**7)[:, None] >> np.arange(7)) & 1
    null = signs @ ranks
    plus = ranks[x[x != 0] > 0].sum()
    expected = min(1.0, 2 * min((null <= plus).mean(), (null >= plus).mean()))
    assert wilcoxon(x) == pytest.approx(expected)
    # On 0/1 scores every magnitude ties, and the test is McNemar's.
    assert wilcoxon([1.0] * 9 + [-1.0] * 2 + [0.0] * 30) == pytest.approx(mcnemar_exact(9, 2))


def test_paired_test_picks_mcnemar_for_zero_one_scores_and_sign_flip_otherwise() -> None:
    a, b = [0, 0, 1, 1, 0, 1] * 8, [1, 1, 1, 0, 0, 1] * 8
    binary = paired_test(a, b)
    assert binary.test == "exact McNemar" and (binary.wins, binary.losses) == (16, 8)
    assert binary.p_value == pytest.approx(mcnemar_exact(16, 8))
    assert binary.difference == pytest.approx(binary.mean_b - binary.mean_a)
    assert binary.interval[0] < binary.difference < binary.interval[1]
    graded = paired_test([0.5, 0.25, 0.75], [0.75, 0.5, 0.75])
    assert graded.test == "sign-flip permutation" and graded.p_value == pytest.approx(0.5)
    assert graded.to_dict()["n"] == 3
    with pytest.raises(UserError, match="equal length"):
        paired_test([1.0], [1.0, 0.0])


def test_smallest_detectable_difference_matches_the_printed_guide() -> None:
    assert [round(100 * smallest_detectable_difference(n), 1) for n in (50, 150, 500)] == [17.7, 10.2, 5.6]


@pytest.mark.parametrize(("hits", "n"), [(0, 500), (1, 500), (13, 500), (40, 500), (500, 500)])
def test_binomial_lower_bound_equals_clopper_pearson(hits: int, n: int) -> None:
    theirs = stats.binomtest(hits, n, alternative="greater").proportion_ci(0.99, method="exact").low
    assert binomial_lower_bound(hits, n) == pytest.approx(theirs, abs=1e-9)

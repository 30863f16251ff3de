"""Where a step measures, and what the losses say about each direction."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from agentopt.errors import RunError, UserError
from agentopt.weights.zeroth import _estimators as estimators
from agentopt.weights.zeroth._types import Probe, Shift

SIZE = 6
CURVATURE = np.linspace(0.5, 3.0, SIZE)
TARGET = np.linspace(-1.0, 1.0, SIZE)
POINT = np.full(SIZE, 0.7)
GRADIENT = CURVATURE * (POINT - TARGET)


def quadratic(weights: Any) -> float:
    return float(0.5 * (CURVATURE * (weights - TARGET) ** 2).sum())


def direction(kind: str, seed: int) -> Any:
    draw = np.random.default_rng(seed)
    return draw.choice([-1.0, 1.0], SIZE) if kind == "rademacher" else draw.normal(size=SIZE)


def estimate(probe: Probe, eps: float, seeds: list[int], loss: Any = quadratic) -> Any:
    """The gradient estimate of one step on the quadratic, with numpy directions."""
    variants = estimators.plan(probe, eps, seeds)
    places = [POINT + sum((s.scale * direction(probe.kind, s.seed) for s in v), np.zeros(SIZE)) for v in variants]
    weights = estimators.coefficients(probe, eps, [[loss(place)] for place in places])
    assert weights.dtype == np.float32
    return sum(float(c) * direction(probe.kind, seed) for c, seed in zip(weights, seeds, strict=True))


@pytest.mark.parametrize("kind", ["rademacher", "normal"])
@pytest.mark.parametrize("sides", [1, 2])
@pytest.mark.parametrize("population", [1, 3])
def test_the_estimate_is_the_gradient_on_average(kind: Any, sides: Any, population: int) -> None:
    probe = Probe(kind=kind, sides=sides, population=population)
    steps = 600
    drawn = np.array(
        [estimate(probe, 1e-4, [step * population + k for k in range(population)]) for step in range(steps)]
    )
    error = drawn.std(axis=0, ddof=1) / np.sqrt(steps)
    # Six weights in eight cases: four standard errors leave a true estimator alone.
    assert (np.abs(drawn.mean(axis=0) - GRADIENT) < 4 * error + 1e-3).all()


def test_a_larger_population_lowers_the_spread() -> None:
    def spread(population: int) -> float:
        probe = Probe(population=population)
        return float(
            np.var([estimate(probe, 1e-4, list(range(s * 8, s * 8 + population))) for s in range(300)], 0).sum()
        )

    assert spread(8) < spread(1) / 5


def test_two_sides_measure_plus_then_minus_for_each_direction() -> None:
    plan = estimators.plan(Probe(population=2), 0.5, [11, 12])
    assert plan == [(Shift(11, 0.5),), (Shift(11, -0.5),), (Shift(12, 0.5),), (Shift(12, -0.5),)]
    found = estimators.coefficients(Probe(population=2), 0.5, [[3.0], [1.0], [1.0], [2.0]])
    np.testing.assert_allclose(found, [1.0, -0.5])


def test_one_side_measures_the_weights_themselves_first() -> None:
    probe = Probe(kind="lowrank", sides=1, population=2)
    assert estimators.plan(probe, 0.5, [11, 12], [7, 8]) == [(), (Shift(11, 0.5, 7),), (Shift(12, 0.5, 8),)]
    np.testing.assert_allclose(estimators.coefficients(probe, 0.5, [[1.0], [2.0], [0.0]]), [1.0, -1.0])


@pytest.mark.parametrize("probe", [Probe(), Probe(sides=1), Probe(population=4), Probe(sides=1, population=4)])
@pytest.mark.parametrize("factor", [1e-4, 1000.0])
def test_normalised_coefficients_do_not_know_the_scale_of_the_loss(probe: Probe, factor: float) -> None:
    probe = replace(probe, normalize="std")
    losses = np.random.default_rng(3).normal(
        2.0, 0.3, size=(len(estimators.plan(probe, 1e-3, [1] * probe.population)), 5)
    )
    one = estimators.coefficients(probe, 1e-3, losses)
    np.testing.assert_allclose(estimators.coefficients(probe, 1e-3, losses * factor), one, rtol=1e-6)
    np.testing.assert_allclose(estimators.coefficients(probe, 1e-1, losses), one)
    np.testing.assert_allclose(estimators.coefficients(probe, 1e-3, losses + 100.0), one, rtol=1e-5)


def test_normalised_steps_have_the_length_of_the_rate_on_average() -> None:
    probe = Probe(sides=1, population=64, normalize="std")
    mean = np.mean([estimate(probe, 1e-4, list(range(s * 64, s * 64 + 64))) for s in range(60)], axis=0)
    assert np.linalg.norm(mean) == pytest.approx(1.0, rel=0.1)
    assert mean @ GRADIENT / np.linalg.norm(mean) / np.linalg.norm(GRADIENT) > 0.99


def test_one_normalised_direction_with_two_sides_gives_a_sign() -> None:
    probe = Probe(normalize="std")
    assert estimators.coefficients(probe, 1e-3, [[1.3], [1.1]]).tolist() == [1.0]
    assert estimators.coefficients(probe, 1e-3, [[1.1], [1.3]]).tolist() == [-1.0]


@pytest.mark.parametrize("per_example", [False, True])
@pytest.mark.parametrize("sides", [1, 2])
def test_equal_losses_give_no_step(sides: Any, per_example: bool) -> None:
    probe = Probe(sides=sides, population=2, per_example=per_example, normalize="std")
    found = estimators.coefficients(probe, 1e-3, np.full((3 if sides == 1 else 4, 7), 0.1))
    assert not found.any()


def test_agreeing_probes_do_not_give_a_step_without_bound() -> None:
    probe = Probe(sides=1, population=2, normalize="std")
    found = estimators.coefficients(probe, 1e-3, [[1.0], [2.0], [2.0]])
    assert np.abs(found).max() < 3


def test_every_example_is_weighed_by_its_own_measurements() -> None:
    losses = [[1.0, 5.0, 2.0], [0.0, 5.0, 4.0]]
    found = estimators.coefficients(Probe(per_example=True), 0.5, losses)
    np.testing.assert_allclose(found, np.array([1.0, 0.0, -2.0]) / 3)
    one_side = estimators.coefficients(Probe(per_example=True, sides=1), 0.5, losses)
    np.testing.assert_allclose(one_side, np.array([-2.0, 0.0, 4.0]) / 3)


def test_a_hard_example_does_not_pass_for_a_steep_one() -> None:
    probe = Probe(per_example=True, normalize="std")
    easy = estimators.coefficients(probe, 1e-3, [[1.0, 1.0], [0.0, 2.0]])
    hard = estimators.coefficients(probe, 1e-3, [[1.0, 901.0], [0.0, 902.0]])
    np.testing.assert_allclose(easy, hard)
    np.testing.assert_allclose(easy, [0.5, -0.5])


def test_per_example_with_a_population_goes_direction_by_direction() -> None:
    probe = Probe(per_example=True, population=2)
    losses = [[2.0, 0.0], [0.0, 0.0], [0.0, 0.0], [0.0, 4.0]]
    np.testing.assert_allclose(estimators.coefficients(probe, 0.5, losses), np.array([2.0, 0.0, 0.0, -4.0]) / 4)


tables = hnp.arrays(np.float64, st.tuples(st.just(5), st.integers(1, 17)), elements=st.floats(-1e6, 1e6))


@settings(max_examples=40)
@given(tables, st.randoms(use_true_random=False))
def test_it_does_not_matter_how_the_examples_are_spread_over_workers(table: Any, order: Any) -> None:
    """Workers gather their examples in some order and in some memory layout: the same bits come out."""
    probe = Probe(sides=1, population=4, normalize="std")
    shuffled = list(range(table.shape[1]))
    order.shuffle(shuffled)
    cut = order.randint(0, len(shuffled))
    gathered = np.concatenate([table[:, shuffled[:cut]], table[:, shuffled[cut:]]], axis=1)
    expected = estimators.coefficients(probe, 1e-3, table).tobytes()
    assert estimators.coefficients(probe, 1e-3, gathered).tobytes() == expected
    assert estimators.coefficients(probe, 1e-3, np.asfortranarray(table)).tobytes() == expected
    assert estimators.means(gathered) == estimators.means(table)


def test_hizoo_measures_at_three_places_and_sees_slope_and_curvature() -> None:
    probe, eps = Probe(kind="normal"), 1e-2
    variants = estimators.hessian_plan(probe, eps, [5])
    assert variants == [(), (Shift(5, eps),), (Shift(5, -eps),)]
    z = direction("normal", 5)
    losses = [[quadratic(POINT)], [quadratic(POINT + eps * z)], [quadratic(POINT - eps * z)]]
    slope, curvature = estimators.hessian_coefficients(eps, losses)
    assert slope == pytest.approx(GRADIENT @ z, rel=1e-5)
    assert curvature == pytest.approx(0.5 * (CURVATURE * z * z).sum(), rel=1e-5)


def test_hizoo_refuses_signs() -> None:
    with pytest.raises(UserError, match="signs all have square 1"):
        estimators.hessian_plan(Probe(), 1e-3, [1])


def test_exact_derivatives_take_the_place_of_differences() -> None:
    np.testing.assert_allclose(estimators.from_derivatives(Probe(population=2), [3.0, -1.0]), [1.5, -0.5])
    std = Probe(population=2, normalize="std")
    np.testing.assert_allclose(
        estimators.from_derivatives(std, [3.0, -1.0]), estimators.from_derivatives(std, [3000.0, -1000.0])
    )
    assert not estimators.from_derivatives(std, [0.0, 0.0]).any()


@pytest.mark.parametrize(
    ("losses", "factor"), [((1.0, 0.5, 2.0), 1), ((1.0, 2.0, 0.5), -1), ((1.0, 1.0, 2.0), 0), ((1.0, 1.5, 2.0), 0)]
)
def test_a_conservative_step_takes_the_best_candidate(losses: Any, factor: int) -> None:
    scalars = np.array([2.0, -3.0], dtype=np.float32)
    found = estimators.conservative_pick(scalars, [[loss] for loss in losses])
    assert (found == factor * scalars).all()


def test_conservative_candidates_are_the_steps_that_would_be_taken() -> None:
    stay, step, back = estimators.conservative_plan([1, 2], [], [2.0, -3.0], 0.25)
    assert stay == ()
    assert step == (Shift(1, -0.5), Shift(2, 0.75))
    assert back == (Shift(1, 0.5), Shift(2, -0.75))


def test_a_candidate_without_a_loss_is_never_taken() -> None:
    assert estimators.conservative_pick([1.0], [[1.0], [float("nan")], [0.5]]).tolist() == [-1.0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("normalize", ["none", "std"])
def test_a_loss_that_is_not_a_number_is_named(bad: float, normalize: Any) -> None:
    with pytest.raises(RunError, match="example 2 at variant 1"):
        estimators.coefficients(Probe(normalize=normalize), 1e-3, [[0.0, 0.0, 0.0], [0.0, 0.0, bad]])
    with pytest.raises(RunError, match="derivative"):
        estimators.from_derivatives(Probe(), [bad])


def test_losses_that_differ_too_much_are_refused() -> None:
    with pytest.raises(RunError, match="differ by too much"):
        estimators.coefficients(Probe(), 1e-3, [[1e37], [0.0]])
    with pytest.raises(RunError, match="differ by too much"):
        estimators.coefficients(Probe(), 1e-3, [[1.7e308], [0.0]])
    with pytest.raises(RunError, match="differ by too much"):
        estimators.hessian_coefficients(1e-3, [[0.0], [1e35], [0.0]])


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(UserError, match=r"3 variants"):
        estimators.coefficients(Probe(), 1e-3, [[1.0], [1.0], [1.0]])
    with pytest.raises(UserError, match="shape"):
        estimators.coefficients(Probe(), 1e-3, [1.0, 2.0])
    with pytest.raises(UserError, match="expected one per direction"):
        estimators.plan(Probe(population=2), 1e-3, [1])
    with pytest.raises(UserError, match="eps"):
        estimators.plan(Probe(), 0.0, [1])
